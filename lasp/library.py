"""The functions of `lasp.functional` as operators of torch, for torch.compile and checkpointing.

torch's dispatcher costs the host microseconds per call, so a call goes through it only if it must
(`needs_dispatcher`). Both ways have the same signatures and results. An operator returns no None:
an empty tensor stands for a state that is not there.
"""

from __future__ import annotations

import torch

from lasp import functional, ops
from lasp.context import CPContext
from lasp.partition import BatchPartition
from lasp.validation import state_dtype

__all__ = [
    "attn_bwd",
    "attn_fwd",
    "needs_dispatcher",
    "softmax_bwd",
    "softmax_fwd",
    "state_fwd",
]

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def needs_dispatcher(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """True if the call must go through the dispatcher: under torch.compile, a dispatch mode
    (selective checkpointing is one) or a profiler, for tensor subclasses and on device "meta"."""
    return (
        first.is_meta
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
        or not _PLAIN.issuperset(map(type, (first, *others)))
    )


_CONTEXT = "str? group_name, str exchange, str layout, int[]? shard_lengths"
_SOFTMAX_CONTEXT = _CONTEXT.replace("int[]?", "SymInt[]?")
_SCHEMAS = {
    "state_fwd": "(Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, bool output_final_state, bool needs_grad, "
    f"{_CONTEXT}) -> (Tensor, Tensor, Tensor)",
    "attn_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, "
    f"Tensor? cu_seqlens, Tensor? state_in, Tensor? segment_states, float scale, {_CONTEXT}) "
    "-> Tensor",
    "attn_bwd": "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor? dfinal_state, Tensor? state_in, "
    f"Tensor? segment_states, float scale, bool needs_dkdv, bool needs_dinitial, {_CONTEXT}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "softmax_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, "
    f"bool needs_grad, {_SOFTMAX_CONTEXT}) -> (Tensor, Tensor, Tensor)",
    "softmax_bwd": "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"Tensor? cu_seqlens, Tensor lengths, float scale, {_CONTEXT}) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"lasp::{_name}", _schema)


def state_fwd(
    k, v, log_decay, initial_state, cu_seqlens, *, scale, output_final_state, needs_grad, context
):
    flags = scale, output_final_state, needs_grad
    states = torch.ops.lasp.state_fwd(
        k, v, log_decay, initial_state, cu_seqlens, *flags, *context.flatten()
    )
    return tuple(_present(x) for x in states)


def attn_fwd(
    q, k, v, log_decay, initial_state, cu_seqlens, *, state_in, segment_states, scale, context
):
    states = state_in, segment_states
    return torch.ops.lasp.attn_fwd(
        q, k, v, log_decay, initial_state, cu_seqlens, *states, scale, *context.flatten()
    )


def attn_bwd(
    do,
    q,
    k,
    v,
    log_decay,
    initial_state,
    *,
    cu_seqlens,
    dfinal_state,
    state_in,
    segment_states,
    scale,
    needs_dkdv,
    needs_dinitial,
    context,
):
    dq, dk, dv, dinitial = torch.ops.lasp.attn_bwd(
        do,
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        dfinal_state,
        state_in,
        segment_states,
        scale,
        needs_dkdv,
        needs_dinitial,
        *context.flatten(),
    )
    dk, dv = (dk, dv) if needs_dkdv else (None, None)
    return dq, dk, dv, dinitial if needs_dinitial else None


def softmax_fwd(q, k, v, cu_seqlens, *, scale, needs_grad, context):
    return torch.ops.lasp.softmax_fwd(q, k, v, cu_seqlens, scale, needs_grad, *context.flatten())


def softmax_bwd(do, q, k, v, o, lse, *, cu_seqlens, lengths, scale, context):
    return torch.ops.lasp.softmax_bwd(
        do, q, k, v, o, lse, cu_seqlens, lengths, scale, *context.flatten()
    )


def _implement(name):
    return torch.library.impl(f"lasp::{name}", "CompositeExplicitAutograd")


@_implement("state_fwd")
def _state_fwd(
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    scale,
    output_final_state,
    needs_grad,
    *context,
):
    states = functional.state_fwd(
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        scale=scale,
        output_final_state=output_final_state,
        needs_grad=needs_grad,
        context=CPContext.unflatten(*context),
    )
    return tuple(_no_state(k) if x is None else x for x in states)


@_implement("attn_fwd")
def _attn_fwd(
    q,
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    state_in,
    segment_states,
    scale,
    *context,
):
    return functional.attn_fwd(
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        state_in=_present(state_in),
        segment_states=_present(segment_states),
        scale=scale,
        context=CPContext.unflatten(*context),
    )


@_implement("attn_bwd")
def _attn_bwd(
    do,
    q,
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    dfinal_state,
    state_in,
    segment_states,
    scale,
    needs_dkdv,
    needs_dinitial,
    *context,
):
    dq, dk, dv, dinitial = functional.attn_bwd(
        do,
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens=cu_seqlens,
        dfinal_state=dfinal_state,
        state_in=_present(state_in),
        segment_states=_present(segment_states),
        scale=scale,
        needs_dkdv=needs_dkdv,
        needs_dinitial=needs_dinitial,
        context=CPContext.unflatten(*context),
    )
    dk, dv = (dq.new_empty(0) if x is None else x for x in (dk, dv))
    return dq, dk, dv, _no_state(dq) if dinitial is None else dinitial


@_implement("softmax_fwd")
def _softmax_fwd(q, k, v, cu_seqlens, scale, needs_grad, *context):
    o, lse, lengths = functional.softmax_fwd(
        q,
        k,
        v,
        cu_seqlens,
        scale=scale,
        needs_grad=needs_grad,
        context=CPContext.unflatten(*context),
    )
    return o, lse, torch.tensor(lengths, dtype=torch.int64)


@_implement("softmax_bwd")
def _softmax_bwd(do, q, k, v, o, lse, cu_seqlens, lengths, scale, *context):
    return functional.softmax_bwd(
        do,
        q,
        k,
        v,
        o,
        lse,
        cu_seqlens=cu_seqlens,
        lengths=tuple(lengths.tolist()),
        scale=scale,
        context=CPContext.unflatten(*context),
    )


@torch.library.register_fake("lasp::state_fwd")
def _state_fwd_fake(
    k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, needs_grad, *context
):
    group, _, layout, _ = CPContext.unflatten(*context)
    sizes = (k.shape[2], k.shape[3], v.shape[3])
    num_chunks = 2 if group is not None and layout == "zigzag" else 1
    state_in, final_state = _no_state(k), _no_state(k)
    is_first = group is not None and group.rank() == 0 and layout == "contiguous"
    if group is not None and not (is_first and cu_seqlens is None):
        rows = num_chunks * (1 if cu_seqlens is not None else k.shape[0])
        state_in = state_in.new_empty(rows, *sizes)
    if output_final_state:
        num_states = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final_state = state_in.new_empty(num_states, *sizes)
    if num_chunks == 2 and cu_seqlens is None:
        partition = BatchPartition((k.shape[1] // 2,) * 2)
        k, v = partition.fold(k), partition.fold(v)
    shape = ops.segment_states_shape(k, v, cu_seqlens)
    return state_in, state_in.new_empty(shape), final_state


@torch.library.register_fake("lasp::attn_fwd")
def _attn_fwd_fake(q, k, v, *arguments):
    return v.new_empty(v.shape)


@torch.library.register_fake("lasp::attn_bwd")
def _attn_bwd_fake(
    do,
    q,
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    dfinal_state,
    state_in,
    segment_states,
    scale,
    needs_dkdv,
    needs_dinitial,
    *context,
):
    dinitial = _no_state(q)
    if needs_dinitial:
        dinitial = dinitial.new_empty(initial_state.shape)
    dk, dv = (x.new_empty(x.shape if needs_dkdv else (0,)) for x in (k, v))
    return q.new_empty(q.shape), dk, dv, dinitial


@torch.library.register_fake("lasp::softmax_fwd")
def _softmax_fwd_fake(q, k, v, cu_seqlens, scale, needs_grad, *context):
    B, T, H, _ = q.shape
    lse = q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    group = CPContext.unflatten(*context).group
    num_ranks = 1 if group is None else group.size()
    return q.new_empty(q.shape), lse, torch.empty(num_ranks, dtype=torch.int64, device="cpu")


@torch.library.register_fake("lasp::softmax_bwd")
def _softmax_bwd_fake(do, q, k, v, *arguments):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _no_state(x) -> torch.Tensor:
    return x.new_empty(0, dtype=state_dtype(x.dtype))


def _present(states: torch.Tensor | None) -> torch.Tensor | None:
    return states if states is not None and states.numel() else None
