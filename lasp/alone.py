"""Lightning attention of whole sequences on one device, without torch's dispatcher.

The same arithmetic as the operators' (`lasp.operators`), which cost the host some 30 us more per
call: at short sequences that is as long as the GPU takes. They are needed only where somebody looks
at operators, tokens are packed or spread over ranks, or a state has a gradient or is returned.
"""

from __future__ import annotations

import torch

from lasp import ops
from lasp.arguments import state_dtype
from lasp.ops.documents import decay_rates
from lasp.ops.strides import with_unit_stride

__all__ = ["attend", "attend_backward", "is_watched"]

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def is_watched(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether somebody looks at operators: torch.compile, a dispatch mode (selective checkpointing
    is one), a profiler, or a tensor's own class; or only shapes are wanted (device "meta")."""
    return (
        first.is_meta
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
        or not _PLAIN.issuperset(map(type, (first, *others)))
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, segment states for the backward, may be empty) of `lasp.lightning_attention`."""
    decay_rates(log_decay)
    segment_states = None
    if ops.needs_segment_states(k, v):
        segment_states, _ = ops.chunk_states(k, v, log_decay, with_total=False)
    states = dict(initial_state=initial_state, segment_states=segment_states)
    o = ops.scan(q, k, v, log_decay, scale=scale, **states)
    if segment_states is None:
        segment_states = k.new_empty(0, dtype=state_dtype(k.dtype))
    return o, segment_states


def attend_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    segment_states: torch.Tensor,
    scale: float,
    with_dkv: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dq, dk, dv); dk and dv None unless with_dkv."""
    do = with_unit_stride(do)
    dq = ops.scan(
        do,
        v,
        k,
        log_decay,
        scale=scale,
        initial_state=None if initial_state is None else initial_state.mT,
        segment_states=segment_states.mT if segment_states.numel() else None,
    )
    if not with_dkv:
        return dq, None, None
    segment_grads = None
    if ops.needs_segment_states(q, do):
        segment_grads, _ = ops.chunk_states(
            q, do, log_decay, reverse=True, scale=scale, with_total=False
        )
    dk, dv = ops.scan_dkdv(q, k, v, do, log_decay, scale=scale, segment_states=segment_grads)
    return dq, dk, dv
