"""The definition of lightning attention, in two formulas in plain torch, and of
softmax attention. Every test compares with it.

    o_t = scale * q_t . S_t,   S_t = lambda * S_{t-1} + k_t v_t^T,   S_0 = initial_state

(TransNormerLLM, arXiv 2405.17381, eq. 15-22; lambda = exp(log_decay), one number per head. With
one per token and head, lambda_t: simple gated linear attention, Mamba-2's SSD, arXiv 2405.21060.)
Both functions compute in the dtype they are given, up to float64, and are differentiable by
autograd. They are slow on purpose: nothing here is rearranged for speed.

Legend: B batch, T tokens, H heads, D key size, E value size, N documents.
"""

import torch

__all__ = ["quadratic", "recurrent", "softmax"]


def recurrent(
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    v_BTHE: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lightning attention token by token.

    Shapes: q, k [B, T, H, D], v [B, T, H, E], log_decay [H] or [B, T, H] (None: no decay),
    initial_state [N, H, D, E] with N = B, or the number of documents when cu_seqlens [N + 1] is
    given (B = 1). Returns o [B, T, H, E] and the state after each document's last token,
    [N, H, D, E].
    """
    outputs, states = [], []
    for n, (b, start, stop) in enumerate(_documents(q_BTHD, cu_seqlens)):
        state_HDE = _zero_state(q_BTHD, v_BTHE) if initial_state is None else initial_state[n]
        rate_TH = _rates(log_decay, q_BTHD, b)
        for t in range(start, stop):
            update = k_BTHD[b, t, :, :, None] * v_BTHE[b, t, :, None, :]
            state_HDE = torch.exp(rate_TH[t])[:, None, None] * state_HDE + update
            outputs.append(scale * torch.einsum("hd,hde->he", q_BTHD[b, t], state_HDE))
        states.append(state_HDE)
    B, T, H, _ = q_BTHD.shape
    if not outputs:
        return v_BTHE.new_zeros(v_BTHE.shape), torch.stack(states)
    return torch.stack(outputs).reshape(B, T, H, -1), torch.stack(states)


def quadratic(
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    v_BTHE: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `recurrent`, as one masked product of O(T^2): o = ((Q K^T) * M) V.

    M_ij = lambda^(i-j) for i >= j and 0 above (arXiv 2405.17381, eq. 15), or the product of
    lambda_s for j < s <= i. Same arguments, same results; quicker for the lengths of a test, and an
    independent formula.
    """
    outputs, states = [], []
    for n, (b, start, stop) in enumerate(_documents(q_BTHD, cu_seqlens)):
        q, k, v = (x[b, start:stop] for x in (q_BTHD, k_BTHD, v_BTHE))
        between, from_start, to_end = _exponents(log_decay, q_BTHD, b, start, stop)
        weights = torch.einsum("ihd,jhd->hij", q, k) * between.exp()
        out = torch.einsum("hij,jhe->ihe", weights, v)
        state = torch.einsum("jhd,jhe->hde", k * to_end.exp()[..., None], v)
        if initial_state is not None:
            age = from_start.exp()
            out = out + torch.einsum("ihd,hde->ihe", q * age[..., None], initial_state[n])
            whole = age[-1] if stop > start else torch.ones_like(to_end.sum(0))
            state = state + whole[:, None, None] * initial_state[n]
        outputs.append(scale * out)
        states.append(state)
    B, T, H, E = v_BTHE.shape
    return torch.cat(outputs).reshape(B, T, H, E), torch.stack(states)


def softmax(
    q_BTHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax attention, o [B, T, H, D]: what `lasp.softmax_attention` computes.

    Shapes: q [B, T, H, D], k and v [B, S, G, D], H a multiple of G, S >= T (the last T keys are the
    queries' own). With cu_seqlens [N + 1] (B = 1, S = T) tokens see their own document only.
    """
    T, S, repeats = q_BTHD.shape[1], k_BSGD.shape[1], q_BTHD.shape[2] // k_BSGD.shape[2]
    k_BSHD, v_BSHD = (x.repeat_interleave(repeats, dim=2) for x in (k_BSGD, v_BSGD))
    scale = q_BTHD.shape[3] ** -0.5 if scale is None else scale
    key = torch.arange(S, device=q_BTHD.device)
    query = key[S - T :, None]
    seen = key <= query
    if cu_seqlens is not None:
        starts = cu_seqlens.to(key)[1:-1]
        document = (key[:, None] >= starts).sum(1)
        seen = seen & (document == document[S - T :, None])
    scores = scale * torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v_BSHD)


def _documents(q, cu_seqlens):
    """(batch row, first token, end) of each document."""
    if cu_seqlens is None:
        return [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    offsets = cu_seqlens.tolist()
    return [(0, start, stop) for start, stop in zip(offsets, offsets[1:], strict=False)]


def _zero_state(q, v):
    return q.new_zeros(q.shape[2], q.shape[3], v.shape[3])


def _rates(log_decay, q, b):
    """The log decay of every token of batch row b, [T, H]."""
    if log_decay is None:
        return q.new_zeros(q.shape[1:3])
    rates = log_decay.to(q.dtype)
    return rates[b] if rates.dim() == 3 else rates.expand(q.shape[1:3])


def _exponents(log_decay, q, b, start, stop):
    """The log of what remains between two tokens [H, i, j], -inf for j > i; of what enters the
    document at token i, and of token j at the end, [T, H].

    Sums of the rates of exactly the tokens between, never differences of larger sums.
    """
    if log_decay is None or log_decay.dim() == 1:
        rate = _rates(log_decay, q, b)[0] if q.shape[1] else q.new_zeros(q.shape[2])
        position = torch.arange(stop - start, device=q.device)
        distance = (position[:, None] - position[None, :]).to(q.dtype)
        # Masked before the exponential: above the diagonal it would overflow.
        between = (rate[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))
        from_start = rate * (position + 1).to(q.dtype)[:, None]
        return between, from_start, rate * (stop - start - 1 - position).to(q.dtype)[:, None]
    rate_TH = _rates(log_decay, q, b)[start:stop]
    T, H = rate_TH.shape
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    # Row i of column j adds the rate of token i, from i = j + 1 on.
    added = rate_TH.mT[:, :, None].expand(H, T, T).masked_fill(~visible.tril(-1), 0.0)
    between = added.cumsum(1).masked_fill(~visible, float("-inf"))
    to_end = between[:, -1].mT if T else rate_TH
    return between, rate_TH.cumsum(0), to_end
