"""`prefix_states`: the states that enter every segment, and every document's whole state."""

from __future__ import annotations

import torch

from lasp.ops.triton import scan_chained
from lasp.ops.triton.combine import combine
from lasp.ops.triton.plan import NONE, States, make_plan
from lasp.ops.triton.state import local_states
from lasp.ops.triton.tiles import addressable, check_operands, decay_or_zeros, on_device_of


def is_one_pass(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    offsets: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> bool:
    """Whether `scan` over k [B, T, H, D] and v [B, T, H, E] needs no states of segments.

    If so, `prefix_states` is needed for its total alone: skip it where that has no use.
    """
    chained = not reverse and scan_chained.applies(k, v, offsets)
    return chained or make_plan(k, v, offsets).num_slots == 0


def prefix_states(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    offsets: tuple[int, ...] | None = None,
    held: tuple[int, ...] | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    with_total: bool = True,
    segment_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States of k [B, T, H, D] and v [B, T, H, E], started from zero at every document's edge.

    Returns (segment_states [S, H, D, E], total [N, H, D, E]), both float32. With
    l = exp(log_decay) and a document of n tokens, the total is

        forward: sum_j l^(n-1-j) k_j v_j^T          (`scale` is not used)
        reverse: sum_i scale * l^(i+1) k_i v_i^T    (k=q, v=do: the gradient of the entering state)

    The segment states are what `scan` needs of the segments before each (reverse: after each); it
    knows how to read them. `with_total=False` saves the work of the total, which is then None;
    with `held` it is that of those packed documents alone, in that order. S depends on shapes
    alone, so packed documents may leave some unused; the tensor is empty, of shape [0], where every
    document is sure to be one segment. The order of every sum is fixed by the shapes: the same
    inputs give the same bits. `offsets` packs documents (0, ..., T) into a batch of one. Raises
    ValueError for dtypes or head dims that the kernels do not have. `segment_length` is for tests.
    """
    check_operands(k=k, v=v)
    assert k.shape[:3] == v.shape[:3], (k.shape, v.shape)
    seq_len, num_heads, key_dim = k.shape[1:]
    plan = make_plan(k, v, offsets, segment_length, States(held) if with_total else NONE)
    shape = (num_heads, key_dim, v.shape[-1])
    wide = dict(dtype=torch.float32, device=k.device)
    if seq_len == 0:
        total = torch.zeros(plan.num_states, *shape, **wide) if with_total else None
        return torch.empty(0, **wide), total
    states = torch.empty((plan.num_slots, *shape) if plan.num_slots else 0, **wide)
    total = torch.empty(plan.num_states, *shape, **wide) if with_total else None
    if plan.single and not with_total:
        return states, None
    k, v = addressable(k), addressable(v)
    log_decay = decay_or_zeros(log_decay, num_heads, k.device)
    with on_device_of(k):
        segment_table, document_table = plan.device_tables(k.device)
        local_states(
            k,
            v,
            log_decay,
            plan,
            segment_table,
            reverse=reverse,
            scale=scale,
            states=states,
            total=total,
        )
        if not plan.single:
            combine(states, log_decay, seq_len, plan, document_table, reverse=reverse, total=total)
    return states, total
