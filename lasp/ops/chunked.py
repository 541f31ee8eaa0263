"""CPU backend in chunked plain torch; it also documents the kernels' algorithm.

Within a chunk of C tokens attention is a masked C x C product; between chunks only the state
is passed on (Lightning Attention-2, arXiv 2401.04658, algorithms 1 and 2). One function, `scan`, is
the forward and, with its arguments exchanged, every gradient:

    o  = scan(q, k, v, S0)                    dq = scan(do, v, k, S0^T)
    dv = scan(k, q, do, G, reverse=True)      dk = scan(v, do, q, G^T, reverse=True)

where S0 is the state before the first token and G the gradient of the state after the last one.
With a decay per token, lambda^(i-j) is the product of lambda_s for j < s <= i. Exponents of the
decay are never positive, so no decay overflows. float32 arithmetic, or float64 for float64 inputs,
under autocast too.

The gradient of a log decay per token sums the pairs of tokens that it lies between,

    dlog_decay_t = sum_{i >= t > j} w_ij,    w_ij = scale * lambda^(i-j) (q_i . k_j) (v_j . do_i),

where states from outside the document count as tokens. Row i of q . dq sums w_ij over j <= i, row j
of k . dk over i >= j, so that dlog_decay_{t+1} = dlog_decay_t - (q_t . dq_t - k_t . dk_t)
(arXiv 2312.06635, section 4 has this for gates per key dimension).

Legend: B batch, T tokens, H heads, D key size, E value size, C chunk, N documents.
"""

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import NamedTuple

import torch

__all__ = [
    "chunk_states",
    "decay_gradient",
    "decay_sums",
    "prepare_decay",
    "scan",
    "scan_dkdv",
    "step",
]

# Long enough for little loop overhead, short enough for little C x C work.
SCAN_CHUNK = 128
STATE_CHUNK = 2048


def _without_autocast(function: Callable) -> Callable:
    """Runs `function` without autocast, which would make products and states bfloat16."""

    @wraps(function)
    def exact(first, *args, **kwargs):
        device_type = first.device.type
        # (There is none on "meta".)
        if not torch.amp.is_autocast_available(device_type):
            return function(first, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(first, *args, **kwargs)

    return exact


@_without_autocast
def chunk_states(
    k_BTHD: torch.Tensor,
    v_BTHE: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    cu_seqlens: tuple[int, ...] | None = None,
    state_rows: tuple[int, ...] | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    with_total: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The local state of each document, from its own tokens alone, [N, H, D, E].

    Forward: sum_j lambda^(n-1-j) k_j v_j^T over a document of n tokens. Reverse (with q for k and
    do for v): sum_i scale * lambda^(i+1) k_i v_i^T, the gradient of the state that enters it.

    Returns (segment_states, local_state), the latter None if not with_total. This backend has no
    segments: the first is None. With `state_rows` only these packed documents have a local state,
    in that order.
    """
    if not with_total:
        return None, None
    rows = _rows((k_BTHD, v_BTHE, log_decay), cu_seqlens)
    if state_rows is not None:
        rows = [rows[n] for n in state_rows]
    return None, torch.cat([_local_state(*row, reverse, scale) for row in rows])


@_without_autocast
def scan(
    a_BTHD: torch.Tensor,
    b_BTHD: torch.Tensor,
    x_BTHE: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    segment_states: torch.Tensor | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
    state_rows: tuple[int, ...] | None = None,
    reverse: bool = False,
    dot_with: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One pass over the tokens from a given state; returns y [B, T, H, E] in a's dtype.

    Forward: y_i = scale * (sum_{j<=i} lambda^(i-j) (a_i . b_j) x_j + lambda^(i+1) a_i S0).
    Reverse: y_j = scale * sum_{i>=j} lambda^(i-j) (a_j . b_i) x_i + lambda^(n-1-j) a_j G.
    initial_state is S0 or G, [N, H, D, E]; None is zero. With `state_rows` it has a row for each of
    these packed documents, in that order, and a last one of zeros, for all others. With `dot_with`
    [B, T, H, E], also returns its dot product with every row of y, for `decay_gradient`: float64
    [B, T, H], of rows in float64, since what the gradient sums nearly cancels.
    """
    y_BTHE = torch.empty(x_BTHE.shape, dtype=a_BTHD.dtype, device=a_BTHD.device)
    dots_BTH = None
    if dot_with is not None:
        dots_BTH = y_BTHE.new_empty(y_BTHE.shape[:3], dtype=torch.float64)
    tensors = a_BTHD, b_BTHD, x_BTHE, log_decay, y_BTHE, dot_with, dots_BTH
    for n, document in enumerate(_rows(tensors, cu_seqlens)):
        state = initial_state
        if state is not None and cu_seqlens is not None:
            row = n
            if state_rows is not None:
                row = state_rows.index(n) if n in state_rows else len(state_rows)
            state = state[row : row + 1]
        _scan(*document, scale, state, reverse)
    return y_BTHE if dots_BTH is None else (y_BTHE, dots_BTH)


def scan_dkdv(
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    v_BTHE: torch.Tensor,
    do_BTHE: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None = None,
    segment_states: torch.Tensor | None = None,
    with_dots: bool = False,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dk, dv, dots of k and dk or None) by two reverse scans.

    The states are gradients G [N, H, D, E], options as `scan`.
    """
    states = dict(initial_state=initial_state, segment_states=segment_states)
    transposed = {name: None if s is None else s.mT for name, s in states.items()}
    dv = scan(k_BTHD, q_BTHD, do_BTHE, log_decay, reverse=True, **states, **options)
    options |= dict(dot_with=k_BTHD if with_dots else None)
    dk = scan(v_BTHE, do_BTHE, q_BTHD, log_decay, reverse=True, **transposed, **options)
    return (dk[0], dv, dk[1]) if with_dots else (dk, dv, None)


def prepare_decay(log_decay: torch.Tensor) -> torch.Tensor:
    """A decay per token as the functions of this backend take it: as it is."""
    return log_decay


def decay_sums(
    log_decay_BTH: torch.Tensor,
    cu_seqlens: tuple[int, ...] | None,
    state_rows: tuple[int, ...] | None,
) -> torch.Tensor:
    """The log of what remains of a state after each row: the sum of a decay per token, [N, H].

    The rows are those of `chunk_states`.
    """
    rows = [row for (row,) in _rows((log_decay_BTH,), cu_seqlens)]
    if state_rows is not None:
        rows = [rows[n] for n in state_rows]
    return torch.cat([row.double().sum(1) for row in rows])


def decay_gradient(
    q_dots: torch.Tensor,
    k_dots: torch.Tensor,
    log_decay_BTH: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
    **states,
) -> torch.Tensor:
    """The gradient of a decay per token, [B, T, H], from the dots of q, dq and of k, dk.

    Args:
        start: [N, H], the gradient at the first token of each row, which is the dot product of the
            state that enters the row and of its gradient; None: no state enters any.
        states: not used by this backend.
    """
    gradient_BTH = log_decay_BTH.new_empty(log_decay_BTH.shape)
    for n, row in enumerate(_rows((gradient_BTH, q_dots, k_dots), cu_seqlens)):
        gradient, q_dots_row, k_dots_row = row
        step = q_dots_row - k_dots_row
        gradient.copy_(step - step.cumsum(1))
        if start is not None:
            gradient += (start if cu_seqlens is None else start[n : n + 1])[:, None]
    return gradient_BTH


@_without_autocast
def step(
    q_BHD: torch.Tensor,
    k_BHD: torch.Tensor,
    v_BHE: torch.Tensor,
    state_BHDE: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    scale: float,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: S <- lambda S + k v^T, o = scale * q . S. Returns (o, S).

    log_decay: [H] or [B, H]. inplace: write over the state.
    """
    compute = state_BHDE.dtype
    decay = 1.0 if log_decay is None else log_decay.to(compute).exp()[..., None, None]
    update = k_BHD.to(compute)[..., :, None] * v_BHE.to(compute)[..., None, :]
    if inplace:
        state_BHDE.mul_(decay).add_(update)
    else:
        state_BHDE = decay * state_BHDE + update
    o_BHE = scale * (q_BHD.to(compute)[..., None, :] @ state_BHDE).squeeze(-2)
    return o_BHE.to(q_BHD.dtype), state_BHDE


def _local_state(k_BTHD, v_BTHE, log_decay, reverse, scale):
    B, T, H, D = k_BTHD.shape
    compute = _compute_dtype(k_BTHD)
    state_BHDE = k_BTHD.new_zeros(B, H, D, v_BTHE.shape[3], dtype=compute)
    for start, stop in _chunks(T, STATE_CHUNK, reverse):
        decay = _chunk_decay(log_decay, H, start, stop, compute, k_BTHD.device)
        weight = torch.exp(decay.from_start if reverse else decay.to_end)
        k_BHCD = _heads_first(k_BTHD[:, start:stop], compute)
        k_BHCD = k_BHCD * (weight * (scale if reverse else 1.0))[..., None]
        update_BHDE = k_BHCD.transpose(-1, -2) @ _heads_first(v_BTHE[:, start:stop], compute)
        state_BHDE = torch.exp(decay.total)[..., None, None] * state_BHDE + update_BHDE
    return state_BHDE


def _scan(
    a_BTHD, b_BTHD, x_BTHE, log_decay, y_BTHE, dot_with, dots_BTH, scale, initial_state, reverse
):
    B, T, H, D = a_BTHD.shape
    compute = _compute_dtype(a_BTHD) if dot_with is None else torch.float64
    state_BHDE = initial_state
    if state_BHDE is None:
        state_BHDE = a_BTHD.new_zeros(B, H, D, x_BTHE.shape[3])
    state_BHDE = state_BHDE.to(compute)
    weights = decay = None
    for start, stop in _chunks(T, SCAN_CHUNK, reverse):
        # With a constant decay, all chunks but the last are full and share their weights.
        if decay is None or weights.shape[-1] != stop - start or not decay.is_constant:
            decay = _chunk_decay(log_decay, H, start, stop, compute, a_BTHD.device)
            between = decay.between()
            weights = scale * (between.mT if reverse else between).exp()
            enters, leaves = decay.from_start.exp(), decay.to_end.exp()
            if reverse:
                enters, leaves = leaves, scale * enters
            else:
                enters = scale * enters
            chunk_decay = torch.exp(decay.total)[..., None, None]
        a_BHCD, b_BHCD, x_BHCE = (
            _heads_first(t[:, start:stop], compute) for t in (a_BTHD, b_BTHD, x_BTHE)
        )
        y_BHCE = (a_BHCD @ b_BHCD.transpose(-1, -2) * weights) @ x_BHCE
        y_BHCE += (a_BHCD @ state_BHDE) * enters[..., None]
        update_BHDE = b_BHCD.transpose(-1, -2) @ (x_BHCE * leaves[..., None])
        state_BHDE = chunk_decay * state_BHDE + update_BHDE
        y_BTHE[:, start:stop] = y_BHCE.transpose(1, 2)
        if dot_with is not None:
            dots_BHC = (y_BHCE * _heads_first(dot_with[:, start:stop], compute)).sum(-1)
            dots_BTH[:, start:stop] = dots_BHC.transpose(1, 2)


class _ChunkDecay(NamedTuple):
    """Logs of what remains within a chunk: [H, C] or [B, H, C], [H] or [B, H] over all of it.

    Attributes:
        rates: of every token.
        from_start: of a state that enters the chunk, after each token.
        to_end: of each token, after the chunk.
        total: of a state that enters the chunk, after it.
        is_constant: all tokens have the same rates.
    """

    rates: torch.Tensor
    from_start: torch.Tensor
    to_end: torch.Tensor
    total: torch.Tensor
    is_constant: bool

    def between(self) -> torch.Tensor:
        """Of token j after token i, [., H, i, j]; -inf where j comes after i."""
        C = self.rates.shape[-1]
        visible = torch.ones(C, C, dtype=torch.bool, device=self.rates.device).tril()
        if self.is_constant:
            position = torch.arange(C, device=self.rates.device)
            added = self.rates[..., :1, None] * (position[:, None] - position)
        else:
            # Sums of exactly the tokens between: differences of larger sums lose digits.
            added = self.rates[..., :, None].expand(*self.rates.shape, C)
            added = added.masked_fill(~visible.tril(-1), 0.0).cumsum(-2)
        # Masked before the exponential: elsewhere it would overflow.
        return added.masked_fill(~visible, -torch.inf)


def _chunk_decay(log_decay, num_heads, start, stop, compute, device) -> _ChunkDecay:
    length = stop - start
    if log_decay is None or log_decay.dim() == 1:
        rates = torch.zeros(num_heads, dtype=compute, device=device)
        if log_decay is not None:
            rates = log_decay.to(compute)
        position = torch.arange(1, length + 1, device=device)
        from_start = rates[:, None] * position
        to_end = rates[:, None] * (length - position)
        return _ChunkDecay(
            rates[:, None].expand(-1, length), from_start, to_end, rates * length, True
        )
    rates = _heads_first(log_decay[:, start:stop, :, None], compute)[..., 0]
    after = rates.flip(-1).cumsum(-1).flip(-1)
    to_end = torch.nn.functional.pad(after[..., 1:], (0, 1))
    return _ChunkDecay(rates, rates.cumsum(-1), to_end, after[..., 0], False)


def _chunks(length, size, reverse):
    boundaries = [(start, min(start + size, length)) for start in range(0, length, size)]
    return boundaries[::-1] if reverse else boundaries


def _rows(tensors, cu_seqlens):
    """The batch as it is, or tensors [1, n, ...] for each packed document; no tensor of one
    dimension has tokens."""
    if cu_seqlens is None:
        return [tensors]

    def part(x, start, stop):
        return x if x is None or x.dim() == 1 else x[:, start:stop]

    return [[part(x, start, stop) for x in tensors] for start, stop in pairwise(cu_seqlens)]


def _heads_first(x_BCHD, compute):
    return x_BCHD.transpose(1, 2).to(compute)


def _compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
