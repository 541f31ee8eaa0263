"""CPU backend in chunked plain torch; it also documents the kernels' algorithm.

Within a chunk of C tokens attention is a masked C x C product; between chunks only the state
is passed on (Lightning Attention-2, arXiv 2401.04658, algorithms 1 and 2). One function, `scan`, is
the forward and, with its arguments exchanged, every gradient:

    o  = scan(q, k, v, S0)                    dq = scan(do, v, k, S0^T)
    dv = scan(k, q, do, G, reverse=True)      dk = scan(v, do, q, G^T, reverse=True)

where S0 is the state before the first token and G the gradient of the state after the last one.
Exponents of the decay are never positive, so no decay overflows. float32 arithmetic, or float64
for float64 inputs, under autocast too.

Legend: B batch, T tokens, H heads, D key size, E value size, C chunk, N documents.
"""

from collections.abc import Callable
from functools import wraps
from itertools import pairwise

import torch

__all__ = ["chunk_states", "scan", "scan_dkdv", "step"]

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
    rows = _rows((k_BTHD, v_BTHE), cu_seqlens)
    if state_rows is not None:
        rows = [rows[n] for n in state_rows]
    return None, torch.cat([_local_state(k, v, log_decay, reverse, scale) for k, v in rows])


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
) -> torch.Tensor:
    """One pass over the tokens from a given state; returns y [B, T, H, E] in a's dtype.

    Forward: y_i = scale * (sum_{j<=i} lambda^(i-j) (a_i . b_j) x_j + lambda^(i+1) a_i S0).
    Reverse: y_j = scale * sum_{i>=j} lambda^(i-j) (a_j . b_i) x_i + lambda^(n-1-j) a_j G.
    initial_state is S0 or G, [N, H, D, E]; None is zero. With `state_rows` it has a row for each of
    these packed documents, in that order, and a last one of zeros, for all others.
    """
    y_BTHE = torch.empty(x_BTHE.shape, dtype=a_BTHD.dtype, device=a_BTHD.device)
    for n, tensors in enumerate(_rows((a_BTHD, b_BTHD, x_BTHE, y_BTHE), cu_seqlens)):
        state = initial_state
        if state is not None and cu_seqlens is not None:
            row = n
            if state_rows is not None:
                row = state_rows.index(n) if n in state_rows else len(state_rows)
            state = state[row : row + 1]
        _scan(*tensors, log_decay, scale, state, reverse)
    return y_BTHE


def scan_dkdv(
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    v_BTHE: torch.Tensor,
    do_BTHE: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None = None,
    segment_states: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv) by two reverse scans; the states are gradients G [N, H, D, E], options as `scan`."""
    states = dict(initial_state=initial_state, segment_states=segment_states)
    transposed = {name: None if s is None else s.mT for name, s in states.items()}
    dv = scan(k_BTHD, q_BTHD, do_BTHE, log_decay, reverse=True, **states, **options)
    dk = scan(v_BTHE, do_BTHE, q_BTHD, log_decay, reverse=True, **transposed, **options)
    return dk, dv


@_without_autocast
def step(
    q_BHD: torch.Tensor,
    k_BHD: torch.Tensor,
    v_BHE: torch.Tensor,
    state_BHDE: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: S <- lambda S + k v^T, o = scale * q . S. Returns (o, S)."""
    compute = state_BHDE.dtype
    decay = 1.0 if log_decay is None else log_decay.to(compute).exp()[:, None, None]
    update = k_BHD.to(compute)[..., :, None] * v_BHE.to(compute)[..., None, :]
    state_BHDE = decay * state_BHDE + update
    o_BHE = scale * (q_BHD.to(compute)[..., None, :] @ state_BHDE).squeeze(-2)
    return o_BHE.to(q_BHD.dtype), state_BHDE


def _local_state(k_BTHD, v_BTHE, log_decay, reverse, scale):
    B, T, H, D = k_BTHD.shape
    compute = _compute_dtype(k_BTHD)
    rate_H = _rates(log_decay, H, k_BTHD)
    state_BHDE = k_BTHD.new_zeros(B, H, D, v_BTHE.shape[3], dtype=compute)
    for start, stop in _chunks(T, STATE_CHUNK, reverse):
        _, _, weight_C = _chunk_exponents(stop - start, reverse, k_BTHD.device)
        weight = torch.exp(rate_H[:, None] * weight_C) * (scale if reverse else 1.0)
        k_BHCD = _heads_first(k_BTHD[:, start:stop]) * weight[..., None]
        update_BHDE = k_BHCD.transpose(-1, -2) @ _heads_first(v_BTHE[:, start:stop])
        state_BHDE = torch.exp(rate_H * (stop - start))[:, None, None] * state_BHDE + update_BHDE
    return state_BHDE


def _scan(a_BTHD, b_BTHD, x_BTHE, y_BTHE, log_decay, scale, initial_state, reverse):
    B, T, H, D = a_BTHD.shape
    compute = _compute_dtype(a_BTHD)
    rate_H = _rates(log_decay, H, a_BTHD)
    state_BHDE = initial_state
    if state_BHDE is None:
        state_BHDE = a_BTHD.new_zeros(B, H, D, x_BTHE.shape[3], dtype=compute)
    weights_HCC = None
    for start, stop in _chunks(T, SCAN_CHUNK, reverse):
        # All chunks but the last in the sequence are full and share their weights.
        if weights_HCC is None or weights_HCC.shape[-1] != stop - start:
            exponents = _chunk_exponents(stop - start, reverse, a_BTHD.device)
            distance_CC, read_C, write_C = exponents
            # Masked before the exponential: elsewhere it would overflow.
            masked = (rate_H[:, None, None] * distance_CC).masked_fill(distance_CC < 0, -torch.inf)
            weights_HCC = scale * masked.exp()
            read_HC = torch.exp(rate_H[:, None] * read_C) * (1.0 if reverse else scale)
            write_HC = torch.exp(rate_H[:, None] * write_C) * (scale if reverse else 1.0)
            chunk_decay_H11 = torch.exp(rate_H * (stop - start))[:, None, None]
        a_BHCD, b_BHCD, x_BHCE = (_heads_first(t[:, start:stop]) for t in (a_BTHD, b_BTHD, x_BTHE))
        y_BHCE = (a_BHCD @ b_BHCD.transpose(-1, -2) * weights_HCC) @ x_BHCE
        y_BHCE += (a_BHCD @ state_BHDE) * read_HC[..., None]
        update_BHDE = b_BHCD.transpose(-1, -2) @ (x_BHCE * write_HC[..., None])
        state_BHDE = chunk_decay_H11 * state_BHDE + update_BHDE
        y_BTHE[:, start:stop] = y_BHCE.transpose(1, 2)


def _chunk_exponents(length, reverse, device):
    """How many times the decay applies: between two tokens [C, C] (negative where one may not see
    the other), from the state that enters the chunk to a token [C], and from a token to the state
    that leaves it [C]."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    from_start, to_end = position + 1, length - 1 - position
    if reverse:
        return -distance, to_end, from_start
    return distance, from_start, to_end


def _chunks(length, size, reverse):
    boundaries = [(start, min(start + size, length)) for start in range(0, length, size)]
    return boundaries[::-1] if reverse else boundaries


def _rows(tensors, cu_seqlens):
    """The batch as it is, or tensors [1, n, H, .] for each packed document."""
    if cu_seqlens is None:
        return [tensors]
    return [[t[:, start:stop] for t in tensors] for start, stop in pairwise(cu_seqlens)]


def _heads_first(x_BCHD):
    return x_BCHD.transpose(1, 2).to(_compute_dtype(x_BCHD))


def _rates(log_decay, num_heads, like):
    compute = _compute_dtype(like)
    if log_decay is None:
        return like.new_zeros(num_heads, dtype=compute)
    return log_decay.to(compute)


def _compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
