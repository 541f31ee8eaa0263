"""The functions of `lasp.functional` and `lasp.halo` as operators of torch, for torch.compile and
checkpointing.

torch's dispatcher costs the host microseconds per call, so a call goes through it only if it must
(`needs_dispatcher`). Both ways have the same signatures and results, except that an operator
returns no None: an empty tensor stands for an absent state (`present`).
"""

from __future__ import annotations

import inspect

import torch

from lasp import functional, halo, ops
from lasp.context import CPContext
from lasp.partition import BatchPartition
from lasp.validation import state_dtype

__all__ = [
    "attn_bwd",
    "attn_fwd",
    "halo_bwd",
    "halo_fwd",
    "needs_dispatcher",
    "present",
    "softmax_bwd",
    "softmax_fwd",
    "state_fwd",
]

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def needs_dispatcher(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """True if the call must go through the dispatcher: under torch.compile, a dispatch mode
    (selective checkpointing is one) or a profiler, for tensor subclasses and on device "meta"."""
    return (
        not _PLAIN.issuperset(map(type, (first, *others)))
        or first.is_meta
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
    )


def present(x):
    """x, or None for the empty tensor that stands for an absent state.

    Only what is saved or returned is converted, not what one operator passes to the next: a graph
    in which `attn_fwd` did not use the results of `state_fwd` would lose the exchange.
    """
    return None if isinstance(x, torch.Tensor) and x.dim() == 1 and x.numel() == 0 else x


class _Operator:
    """A function of `functional` or `halo`, called with the same arguments, as
    `torch.ops.lasp.<name>`.

    The operator's arguments are the positional ones of the function, its keywords in their order,
    and the flattened context.

    Args:
        function: takes positional tensors, keywords, and `context`.
        arguments, results: of the operator's schema, without the context.
    """

    def __init__(self, function, arguments: str, results: str) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._keywords = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY][:-1]
        name = f"lasp::{function.__name__}"
        context = "str? group_name, str exchange, str layout, SymInt[]? shard_lengths"
        torch.library.define(name, f"({arguments}, {context}) -> {results}")
        torch.library.impl(name, "CompositeExplicitAutograd", self._run)
        self._op = getattr(torch.ops.lasp, function.__name__)

    def __call__(self, *tensors, context, **options):
        flat = [options[name] for name in self._keywords]
        return self._op(*tensors, *flat, *context.flatten())

    def _run(self, *arguments):
        """What the operator does."""
        arguments, context = arguments[:-4], CPContext.unflatten(*arguments[-4:])
        arguments = [present(x) for x in arguments]
        num_tensors = len(arguments) - len(self._keywords)
        options = dict(zip(self._keywords, arguments[num_tensors:], strict=True))
        results = self._function(*arguments[:num_tensors], **options, context=context)
        if isinstance(results, torch.Tensor):
            return results
        return tuple(_no_state(arguments[0]) if x is None else x for x in results)


state_fwd = _Operator(
    functional.state_fwd,
    "Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool output_final_state, bool needs_grad",
    "(Tensor, Tensor, Tensor, Tensor)",
)
attn_fwd = _Operator(
    functional.attn_fwd,
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor? state_in, Tensor? segment_states, float scale",
    "Tensor",
)
attn_bwd = _Operator(
    functional.attn_bwd,
    "Tensor do, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? dfinal_state, Tensor? state_in, Tensor? segment_states, "
    "Tensor? call_number, float scale, bool needs_dkdv, bool needs_ddecay, bool needs_dinitial",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
softmax_fwd = _Operator(
    functional.softmax_fwd,
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool needs_grad",
    "(Tensor, Tensor, Tensor, Tensor)",
)
softmax_bwd = _Operator(
    functional.softmax_bwd,
    "Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cu_seqlens, "
    "Tensor lengths, Tensor? call_number, float scale",
    "(Tensor, Tensor, Tensor)",
)
halo_fwd = _Operator(
    halo.halo_fwd,
    "Tensor x, Tensor? cu_seqlens, SymInt count, bool needs_grad",
    "(Tensor, Tensor)",
)
halo_bwd = _Operator(
    halo.halo_bwd,
    "Tensor dhalo, Tensor? cu_seqlens, Tensor? call_number, SymInt seq_len, SymInt count",
    "Tensor",
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
    shape = ops.segment_states_shape(k, v, log_decay, cu_seqlens)
    return state_in, state_in.new_empty(shape), final_state, _fake_call_number(k, group)


@torch.library.register_fake("lasp::attn_fwd")
def _attn_fwd_fake(q, k, v, *arguments):
    return v.new_empty(v.shape)


@torch.library.register_fake("lasp::attn_bwd")
def _attn_bwd_fake(do, q, k, v, log_decay, initial_state, *arguments):
    needs_dkdv, needs_ddecay, needs_dinitial = arguments[-7:-4]
    dinitial = _no_state(q).new_empty(initial_state.shape) if needs_dinitial else _no_state(q)
    ddecay = log_decay.new_empty(log_decay.shape) if needs_ddecay else _no_state(q)
    dk, dv = (x.new_empty(x.shape) if needs_dkdv else _no_state(q) for x in (k, v))
    return q.new_empty(q.shape), dk, dv, ddecay, dinitial


@torch.library.register_fake("lasp::softmax_fwd")
def _softmax_fwd_fake(q, k, v, cu_seqlens, scale, needs_grad, *context):
    B, T, H, _ = q.shape
    lse = q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    group = CPContext.unflatten(*context).group
    num_ranks = 1 if group is None else group.size()
    lengths = torch.empty(num_ranks, dtype=torch.int64, device="cpu")
    return q.new_empty(q.shape), lse, lengths, _fake_call_number(q, group)


@torch.library.register_fake("lasp::softmax_bwd")
def _softmax_bwd_fake(do, q, k, v, *arguments):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("lasp::halo_fwd")
def _halo_fwd_fake(x, cu_seqlens, count, needs_grad, *context):
    group, _, layout, _ = CPContext.unflatten(*context)
    halo = x.new_empty(x.shape[0], (2 if layout == "zigzag" else 1) * count, *x.shape[2:])
    return halo, _fake_call_number(x, group)


@torch.library.register_fake("lasp::halo_bwd")
def _halo_bwd_fake(dhalo, cu_seqlens, call_number, seq_len, *arguments):
    return dhalo.new_empty(dhalo.shape[0], seq_len, *dhalo.shape[2:])


def _fake_call_number(x: torch.Tensor, group) -> torch.Tensor:
    return _no_state(x) if group is None else torch.empty(1, dtype=torch.int64, device="cpu")


def _no_state(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0, dtype=state_dtype(x.dtype))
