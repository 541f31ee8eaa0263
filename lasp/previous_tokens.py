"""The tokens before a rank's own, for layers that look a few tokens back: the public function.

A causal convolution (Mamba, gated delta nets, Hyena's short filters) and a token shift (RWKV) need
a few tokens of the previous rank. The algorithm is in `lasp.halo`. It is one operator
(`lasp::halo_fwd`), opaque to torch.compile, and its result is small: a recomputation that keeps it
(`parallel.activation_checkpoint`) sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from lasp import library
from lasp.context import CPContext
from lasp.exchange import consistency
from lasp.validation import previous_tokens_problem, resolve_group

__all__ = ["exchange_previous_tokens"]


def exchange_previous_tokens(
    x: torch.Tensor,
    count: int,
    *,
    cu_seqlens: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """The last `count` tokens before this rank's first token, zeros before the sequence's start.

    A causal convolution over ranks is that of one device over

        torch.cat([lasp.exchange_previous_tokens(x, kernel_size - 1, group=group), x], dim=1)

    With `group` each rank passes its shard of the sequence; lengths may differ, be zero, and be
    shorter than `count`: the tokens may come from several ranks. One message of `count` tokens in
    the dtype of x goes to the next rank, its gradient comes back and is added to that of x.

    All ranks of `group` make the call, and use its result if they need gradients: the backward of a
    rank receives from the next one.

    Args:
        x: [B, T, ...], floating point; no other size than T is 0.
        count: number of tokens, >= 0.
        cu_seqlens: int32 [N + 1], boundaries of packed documents (B must be 1): the tokens before
            the start of a document are zeros. With `group` those of the global sequence, the same
            on all ranks. Documents that begin further on among this rank's tokens are up to the
            caller: their first tokens must not see those before them. Best on the CPU.
        group: the ranks that hold the sequence; None: this device holds all of it.
        layout: which tokens a rank holds, see `lasp.shard`: "contiguous", or "zigzag", where T is
            even and each of the two chunks has its own previous tokens, with one rank too.
        shard_lengths: tokens of every rank. Needed only with cu_seqlens if they are not
            `lasp.shard.split_lengths`.

    Returns:
        [B, count, ...] in the dtype of x; in zigzag [B, 2 * count, ...], the previous tokens of the
        rank's first chunk and then those of its second one.

    Raises:
        ValueError: on bad input, and on every rank of `group` if the ranks disagree.
    """
    context = CPContext(resolve_group(group), layout=layout, shard_lengths=shard_lengths)
    problem = previous_tokens_problem(x, count, cu_seqlens, context)
    if problem is not None:
        if context.group is not None:
            consistency.PendingCheck(context.group, {}, problem=problem).wait()
        raise ValueError(problem)
    if shard_lengths is not None:
        context = context._replace(shard_lengths=tuple(shard_lengths))
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return _PreviousTokens.apply(x, cu_seqlens, count, needs_grad, context)


class _PreviousTokens(torch.autograd.Function):
    """All ranks run the messages of the backward or none does: the forward has checked that."""

    @staticmethod
    def forward(ctx, x, cu_seqlens, count, needs_grad, context):
        ctx.options = dict(seq_len=x.shape[1], count=count, context=context)
        halo, call_number = library.halo_fwd(
            x, cu_seqlens, count=count, needs_grad=needs_grad, context=context
        )
        ctx.save_for_backward(cu_seqlens, library.present(call_number))
        return halo

    @staticmethod
    @once_differentiable
    def backward(ctx, dhalo):
        dx = library.halo_bwd(dhalo, *ctx.saved_tensors, **ctx.options)
        return dx, None, None, None, None
