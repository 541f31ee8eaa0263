"""Causal softmax attention over the same shards, for the softmax layers of a hybrid (LASP-2H).

Where linear attention sends a state, softmax attention needs every earlier key and value: each rank
gathers them in one collective (arXiv 2502.07563) while it attends to its own tokens; then it
attends to the earlier ones and merges the two results by log-sum-exp. Nothing that grows with the
global sequence is kept for the backward: it gathers keys and values again, during the work on its
own tokens, and sends each rank the gradients of that rank's keys and values.

The forward is one operator (`lasp::softmax_fwd`), opaque to torch.compile and to activation
checkpointing: a recomputation that keeps its outputs (see `parallel.activation_checkpoint`) repeats
neither the collective nor the quadratic work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from lasp import functional, library
from lasp.context import CPContext
from lasp.exchange import consistency
from lasp.ops.host_values import with_unit_stride
from lasp.validation import resolve_group, softmax_problem

__all__ = ["gather_past", "softmax_attention"]


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Causal softmax attention, over one device or many.

        o_t = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts,   w_ts = exp(scale * q_t . k_s)

    With `group` each rank passes its shard of the sequence; lengths may differ, and be zero. One
    all-gather brings the keys and values of all ranks, in their dtype (LASP-2H, arXiv 2502.07563);
    their gradients go back the same way, each in that dtype, and are summed in float32. No T x T
    matrix is stored; during the call each rank holds the keys and values of the global sequence
    (H / G times fewer with grouped heads), in the backward also their gradients.

    Args:
        q: [B, T, H, D], bfloat16, float16 or float32 (on the CPU also float64); D in 1..256.
        k, v: [B, S, G, D], dtype of q. H is a multiple of G: key head g serves the H / G query
            heads from g * H / G on. S > T: the first S - T tokens are a past without queries
            here; the queries are those of the last T tokens.
        scale: factor on the scores; None: 1 / sqrt(D).
        cu_seqlens: int32 [N + 1], boundaries of packed documents in the global sequence (B must be
            1); tokens see their own document only. The same on all ranks. Best on the CPU.
        group: the ranks that hold the sequence; None: this device holds all of it.
        layout: "contiguous": chunks in group-rank order. "zigzag": of 2P chunks rank r holds
            chunks r and 2P - 1 - r, one after the other and of equal length, so that all ranks have
            the same work.
        shard_lengths: S of every rank, in group order. None: the ranks gather them, from host to
            host, in every call.

    Returns:
        o [B, T, H, D] in the dtype of q.

    Raises:
        ValueError: on bad input, and on every rank of `group` if the ranks disagree.
    """
    context = CPContext(resolve_group(group), layout=layout, shard_lengths=shard_lengths)
    problem = softmax_problem(q, k, v, scale=scale, cu_seqlens=cu_seqlens, context=context)
    if problem is not None:
        if context.group is not None:
            consistency.PendingCheck(context.group, {}, problem=problem).wait()
        raise ValueError(problem)
    if shard_lengths is not None:
        lengths = None if context.group is None else tuple(shard_lengths)
        context = context._replace(shard_lengths=lengths)
    o, _, _ = _SoftmaxAttention.apply(
        with_unit_stride(q),
        with_unit_stride(k),
        with_unit_stride(v),
        cu_seqlens,
        1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        context,
    )
    return o


@torch.no_grad()
def gather_past(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Keys and values [2, B, S', G, D] of all tokens up to this rank's last: the past of later
    tokens. Arguments as of `softmax_attention`; no gradient flows through it."""
    lengths = None if shard_lengths is None else tuple(shard_lengths)
    context = CPContext(resolve_group(group), layout=layout, shard_lengths=lengths)
    return functional.gather_past(k, v, context)


class _SoftmaxAttention(torch.autograd.Function):
    """One node, so that every rank runs the collectives of both directions in the same order."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, scale, needs_grad, context):
        o, lse, lengths, call_number = library.softmax_fwd(
            q, k, v, cu_seqlens, scale=scale, needs_grad=needs_grad, context=context
        )
        call_number = library.present(call_number)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, lengths, call_number)
        ctx.scale, ctx.context = scale, context
        ctx.mark_non_differentiable(lse, lengths)
        return o, lse, lengths

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, *_):
        *tensors, cu_seqlens, lengths, call_number = ctx.saved_tensors
        grads = library.softmax_bwd(
            do,
            *tensors,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            call_number=call_number,
            scale=ctx.scale,
            context=ctx.context,
        )
        return *grads, None, None, None, None
