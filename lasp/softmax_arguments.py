"""What softmax attention takes: every wrong argument gets a sentence. See `lasp.arguments`."""

from __future__ import annotations

import torch

from lasp.arguments import (
    _device_problem,
    _documents_problem,
    _dtype_problem,
    _group_problem,
    _lengths_problem,
    _shapes,
)
from lasp.shard import LAYOUTS

__all__ = ["find_softmax_problem"]

_MAX_HEAD_SIZE = 256


def find_softmax_problem(q, k, v, scale, cu_seqlens, group, layout, shard_lengths) -> str | None:
    """What is wrong with the arguments of `lasp.softmax_attention`; None if nothing is."""
    for name, x in {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}.items():
        if not isinstance(x, torch.Tensor) and not (x is None and name == "cu_seqlens"):
            return f"{name} is {type(x).__name__}: it must be a tensor."
    if not isinstance(scale, int | float | torch.SymInt | torch.SymFloat | None):
        return f"scale is {scale!r}: it must be a number, or None for 1 / sqrt(head size)."
    if not isinstance(layout, str) or layout not in LAYOUTS:
        return f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}."
    return (
        _shape_problem(q, k, v)
        or _dtype_problem(q, k, v)
        or _device_problem(q, ("k", k), ("v", v))
        or _documents_problem(q, cu_seqlens)
        or _past_problem(q, k, cu_seqlens, layout)
        or _group_problem(q, k, v, None, None, group)
        or _lengths_problem(shard_lengths)
        or _lengths_over_ranks_problem(k, group, layout, shard_lengths)
    )


def _shape_problem(q, k, v):
    if any(x.dim() != 4 for x in (q, k, v)):
        return f"{_shapes(q, k, v)}: each must have 4 dimensions [batch, tokens, heads, head size]."
    B, T, H, D = q.shape
    if k.shape != v.shape or k.shape[::3] != (B, D) or k.shape[1] < T:
        return (
            f"{_shapes(q, k, v)} do not fit: q is [B, T, H, D] and k, v are [B, S, G, D] with the "
            "same B and D and S >= T."
        )
    if B < 1 or k.shape[2] < 1 or H < 1 or H % k.shape[2] or not 1 <= D <= _MAX_HEAD_SIZE:
        return (
            f"{_shapes(q, k, v)}: the heads of q must be a multiple of those of k and v, the head "
            f"size 1..{_MAX_HEAD_SIZE}, and the batch at least 1."
        )
    return None


def _past_problem(q, k, cu_seqlens, layout):
    if k.shape[1] > q.shape[1] and (cu_seqlens is not None or layout != "contiguous"):
        return (
            f"k holds {k.shape[1]} tokens and q {q.shape[1]}: a past (k longer than q) works with "
            "neither cu_seqlens nor the zigzag layout."
        )
    return None


def _lengths_over_ranks_problem(k, group, layout, shard_lengths):
    if group is None:
        return None
    length = k.shape[1]
    if layout == "zigzag" and length % 2:
        return f"this rank holds {length} tokens: the zigzag layout is two equal parts per rank."
    if shard_lengths is None:
        return None
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if len(shard_lengths) != size or shard_lengths[rank] != length:
        return (
            f"shard_lengths is {list(shard_lengths)}, but rank {rank} of {size} holds {length} "
            "tokens of k: give the number of every rank, in group order."
        )
    return None
