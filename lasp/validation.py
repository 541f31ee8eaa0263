"""Argument checks of the public functions; each returns an error message.

Only types, shapes, dtypes and devices are checked here. Values (decays, document boundaries) are
checked inside the operator, where torch.compile does not trace.
"""

from __future__ import annotations

import torch
from torch.distributed import GroupMember, ProcessGroup

from lasp.context import CPContext
from lasp.exchange import METHODS
from lasp.exchange.comm import device_types
from lasp.shard import LAYOUTS

__all__ = [
    "attention_problem",
    "describe_shape",
    "previous_tokens_problem",
    "resolve_group",
    "softmax_problem",
    "state_dtype",
    "step_problem",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_SIZE = 256
# Tuples made once: these checks are part of every call.
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def attention_problem(
    q,
    k,
    v,
    log_decay,
    *,
    scale=1.0,
    initial_state=None,
    cu_seqlens=None,
    context: CPContext,
    state_name="initial_state",
) -> str | None:
    """The error in the arguments of `lasp.lightning_attention`; None: no error."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            return f"{name} is {type(x).__name__}: it must be a tensor."
    optional = (("log_decay", log_decay), (state_name, initial_state), ("cu_seqlens", cu_seqlens))
    for name, x in optional:
        if x is not None and not isinstance(x, torch.Tensor):
            return f"{name} is {type(x).__name__}: it must be a tensor."
    if not isinstance(scale, _NUMBERS):
        return f"scale is {scale!r}: it must be a number."
    if not isinstance(context.exchange, str) or context.exchange not in METHODS:
        return f"exchange is {context.exchange!r}: choose one of {', '.join(sorted(METHODS))}."
    return (
        _layout_problem(context.layout)
        or _shape_problem(q, k, v)
        or _dtype_problem(q, k, v)
        or _device_problem(q, ("k", k), ("v", v), *optional[:2])
        or _decay_problem(q, log_decay)
        or _documents_problem(q, cu_seqlens)
        or _state_problem(q, v, initial_state, cu_seqlens, state_name)
        or _lengths_problem(context.shard_lengths)
        or _group_problem(q, context.group)
        or _group_state_problem((k, v, log_decay), initial_state, cu_seqlens, context.group)
    )


def step_problem(q, k, v, state, log_decay, *, scale=1.0) -> str | None:
    """The error in the arguments of `lasp.lightning_attention_step`; None: no error."""
    if not all(isinstance(x, torch.Tensor) for x in (q, k, v, state)):
        return "q, k, v and state must be tensors; a first state is torch.zeros."
    if q.dim() != 3 or k.shape != q.shape or v.shape[:2] != q.shape[:2] or v.dim() != 3:
        return f"{_shapes(q, k, v)} do not fit: one token's q and k are [B, H, D], its v [B, H, E]."
    if isinstance(log_decay, torch.Tensor) and log_decay.dim() > 1:
        if log_decay.shape != q.shape[:2]:
            return (
                f"log_decay is {describe_shape(log_decay)}: it must be [{q.shape[1]}], one number "
                f"per head, or {list(q.shape[:2])}, one per sequence and head."
            )
        log_decay = log_decay.unsqueeze(1)
    return attention_problem(
        *(x.unsqueeze(1) for x in (q, k, v)),
        log_decay,
        scale=scale,
        initial_state=state,
        context=CPContext(),
        state_name="state",
    )


def softmax_problem(q, k, v, *, scale=None, cu_seqlens=None, context: CPContext) -> str | None:
    """The error in the arguments of `lasp.softmax_attention`; None: no error."""
    for name, x in {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}.items():
        if not isinstance(x, torch.Tensor) and not (x is None and name == "cu_seqlens"):
            return f"{name} is {type(x).__name__}: it must be a tensor."
    if scale is not None and not isinstance(scale, _NUMBERS):
        return f"scale is {scale!r}: it must be a number, or None for 1 / sqrt(head size)."
    return (
        _layout_problem(context.layout)
        or _softmax_shape_problem(q, k, v)
        or _dtype_problem(q, k, v)
        or _device_problem(q, ("k", k), ("v", v))
        or _documents_problem(q, cu_seqlens)
        or _past_problem(q, k, cu_seqlens, context.layout)
        or _group_problem(q, context.group)
        or _lengths_problem(context.shard_lengths)
        or _softmax_lengths_problem(k, context)
    )


def previous_tokens_problem(x, count, cu_seqlens, context: CPContext) -> str | None:
    """The error in the arguments of `lasp.exchange_previous_tokens`; None: no error."""
    for name, value in (("x", x), ("cu_seqlens", cu_seqlens)):
        if not isinstance(value, torch.Tensor) and not (value is None and name == "cu_seqlens"):
            return f"{name} is {type(value).__name__}: it must be a tensor."
    if not isinstance(count, int | torch.SymInt) or isinstance(count, bool) or count < 0:
        return f"count is {count!r}: it must be the number of tokens, an integer >= 0."
    if x.dim() < 2 or 0 in (x.shape[0], *x.shape[2:]) or not x.is_floating_point():
        return (
            f"x is {x.dtype} {describe_shape(x)}: it must be floating point, [batch, "
            "tokens, ...], and no size but that of the tokens may be 0."
        )
    return (
        _layout_problem(context.layout)
        or _documents_problem(x, cu_seqlens)
        or _group_problem(x, context.group, "x")
        or _lengths_problem(context.shard_lengths)
    )


def resolve_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group, or None if this process is all of it.

    Raises:
        ValueError: not a process group, or one that this process is not a member of.
    """
    if group is None:
        return None
    # torch represents a group that this process is not in by a number.
    if not isinstance(group, ProcessGroup) and group != GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"group is {type(group).__name__}: it must be a torch.distributed.ProcessGroup (of a "
            "DeviceMesh, mesh.get_group(axis))."
        )
    size = torch.distributed.get_world_size(group)
    if size < 1:
        raise ValueError("this process is not a member of `group`: only its members call this.")
    return None if size == 1 else group


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe_shape(x: torch.Tensor) -> str:
    return str(list(x.shape))


def _shapes(q, k, v):
    return f"q {describe_shape(q)}, k {describe_shape(k)}, v {describe_shape(v)}"


def _layout_problem(layout):
    if not isinstance(layout, str) or layout not in LAYOUTS:
        return f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}."
    return None


def _dimensions_problem(q, k, v):
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return f"{_shapes(q, k, v)}: each must have 4 dimensions [batch, tokens, heads, head size]."
    return None


def _shape_problem(q, k, v):
    if problem := _dimensions_problem(q, k, v):
        return problem
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        return (
            f"{_shapes(q, k, v)} do not fit: q and k are [B, T, H, D] and v is [B, T, H, E] with "
            "the same B, T, H. (For grouped heads, expand k and v.)"
        )
    B, _, H, D = q.shape
    if not (1 <= D <= _MAX_HEAD_SIZE and 1 <= v.shape[3] <= _MAX_HEAD_SIZE and H >= 1 and B >= 1):
        return f"{_shapes(q, k, v)}: head sizes must be 1..{_MAX_HEAD_SIZE}, batch and heads >= 1."
    return None


def _softmax_shape_problem(q, k, v):
    if problem := _dimensions_problem(q, k, v):
        return problem
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


def _dtype_problem(q, k, v):
    if not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: they must share one dtype. Cast them."
    if q.dtype not in _DTYPES and not (q.dtype == torch.float64 and q.device.type == "cpu"):
        return (
            f"q, k, v are {q.dtype} on {q.device.type}: allowed are bfloat16, float16 and float32, "
            "and float64 on the CPU."
        )
    return None


def _device_problem(q, *others):
    device = q.device
    for name, x in others:
        if x is not None and x.device != device:
            return f"q is on {device} but {name} on {x.device}: move both to one device."
    return None


def _decay_problem(q, log_decay):
    if log_decay is None:
        return None
    B, T, H, _ = q.shape
    shape, by_token = tuple(log_decay.shape), log_decay.dim() > 1
    allowed = (torch.float32, state_dtype(q.dtype)) if by_token else (torch.float32,)
    if log_decay.dtype not in allowed or shape not in ((H,), (B, T, H)):
        return (
            f"log_decay is {log_decay.dtype} {describe_shape(log_decay)}: it must be float32 "
            f"[{H}], one number per head, or {[B, T, H]}, one per token and head. (Low precision "
            "loses digits of slow decays.)"
        )
    if log_decay.requires_grad and not by_token:
        return (
            "log_decay requires a gradient, but one number per head is a constant: pass .detach(), "
            f"or for a gradient a decay per token, {[B, T, H]} (.expand makes one)."
        )
    return None


def _documents_problem(q, cu_seqlens):
    if cu_seqlens is None:
        return None
    if q.shape[0] != 1:
        return f"cu_seqlens is given and the batch is {q.shape[0]}: packed documents need batch 1."
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        return (
            f"cu_seqlens is {cu_seqlens.dtype} {describe_shape(cu_seqlens)}: it must be int32 "
            "[documents + 1], the cumulative lengths from 0 to the number of tokens."
        )
    if cu_seqlens.shape[0] < 2:
        return f"cu_seqlens has {cu_seqlens.shape[0]} entries: it needs at least [0, tokens]."
    return None


def _state_problem(q, v, initial_state, cu_seqlens, state_name):
    if initial_state is None:
        return None
    B, _, H, D = q.shape
    allowed = (B if cu_seqlens is None else cu_seqlens.shape[0] - 1, H, D, v.shape[3])
    if tuple(initial_state.shape) != allowed or initial_state.dtype != state_dtype(q.dtype):
        return (
            f"{state_name} is {initial_state.dtype} {describe_shape(initial_state)}: it must be "
            f"{state_dtype(q.dtype)} {list(allowed)} (sequences, heads, size of k, size of v)."
        )
    return None


def _lengths_problem(shard_lengths):
    if shard_lengths is None:
        return None
    if not isinstance(shard_lengths, list | tuple) or not all(
        isinstance(length, int) and length >= 0 for length in shard_lengths
    ):
        return f"shard_lengths is {shard_lengths!r}: give the tokens of every rank, as integers."
    return None


def _group_problem(q, group, name="q"):
    if group is None:
        return None
    allowed = device_types(group)
    if q.device.type not in allowed:
        return (
            f"{name} is on {q.device}, but the ranks of group communicate on "
            f"{' and '.join(sorted(allowed))}: move the tensors there."
        )
    return None


def _group_state_problem(others, initial_state, cu_seqlens, group):
    if group is None or initial_state is None:
        return None
    needs_grad = torch.is_grad_enabled() and initial_state.requires_grad
    if needs_grad and not any(x is not None and x.requires_grad for x in others):
        return (
            "initial_state requires a gradient, but neither k nor v does: other ranks would not "
            "send what it needs. Let k and v require gradients too."
        )
    rank = torch.distributed.get_rank(group)
    if rank != 0 and cu_seqlens is None:
        return (
            f"initial_state is given on rank {rank} of the group: it belongs to the global "
            "sequence, so only rank 0 passes it."
        )
    return None


def _past_problem(q, k, cu_seqlens, layout):
    if k.shape[1] > q.shape[1] and (cu_seqlens is not None or layout != "contiguous"):
        return (
            f"k holds {k.shape[1]} tokens and q {q.shape[1]}: a past (k longer than q) works with "
            "neither cu_seqlens nor the zigzag layout."
        )
    return None


def _softmax_lengths_problem(k, context):
    group, shard_lengths = context.group, context.shard_lengths
    if group is None:
        return None
    length = k.shape[1]
    if context.layout == "zigzag" and length % 2:
        return f"this rank holds {length} tokens: the zigzag layout is two equal chunks per rank."
    if shard_lengths is None:
        return None
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if len(shard_lengths) != size or shard_lengths[rank] != length:
        return (
            f"shard_lengths is {list(shard_lengths)}, but rank {rank} of {size} holds {length} "
            "tokens of k: give the number of every rank, in group order."
        )
    return None
