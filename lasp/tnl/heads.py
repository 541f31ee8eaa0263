"""q, k, v and u, taken from one projection; their gradients are written into one tensor again.

Autograd and torch.compile would stack the four gradients by a kernel that branches at every value
(torch 2.11: 2.4 times the time of the memory it moves), or by one kernel for each.

Shapes: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lasp.tnl.variants import ACTIVATIONS

__all__ = ["split_heads"]


def split_heads(
    qkvu: torch.Tensor,
    activation: str,
    function: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """[B, T, H, 4, D] -> q, k, v, u [B, T, H, D] of its dtype; of [B, T, H, 3, D] q, k, v.

    Args:
        activation: of q and k, a key of `ACTIVATIONS`. What is not activated is a view of `qkvu`.
        function: computes the activation; None: that of `ACTIVATIONS`.
    """
    function = function or ACTIVATIONS[activation]
    has_own_backward = qkvu.shape[-2] == 4 and activation in ("silu", "none")
    if torch.is_grad_enabled() and has_own_backward:
        return _SplitHeads.apply(qkvu, activation, function)
    return _split(qkvu, function)


def _split(qkvu, function):
    q, k, *others = qkvu.unbind(dim=-2)
    return function(q), function(k), *others


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkvu, activation, function):
        ctx.save_for_backward(qkvu)
        ctx.activated = activation == "silu"
        return _split(qkvu, function)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv, du):
        (qkvu,) = ctx.saved_tensors
        return torch.ops.lasp.split_heads_backward(dq, dk, dv, du, qkvu, ctx.activated), None, None


torch.library.define(
    "lasp::split_heads_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor du, Tensor qkvu, bool activated) -> Tensor",
)


@torch.library.impl("lasp::split_heads_backward", "CompositeExplicitAutograd")
def _split_heads_backward(dq, dk, dv, du, qkvu, activated):
    if qkvu.is_cuda:
        from lasp.ops.triton.heads import split_heads_backward

        return split_heads_backward(dq, dk, dv, du, qkvu, activated)
    if activated:
        q, k, _, _ = qkvu.unbind(dim=-2)
        dq, dk = torch.ops.aten.silu_backward(dq, q), torch.ops.aten.silu_backward(dk, k)
    return torch.stack((dq, dk, dv, du), dim=-2)


@torch.library.register_fake("lasp::split_heads_backward")
def _split_heads_backward_fake(dq, dk, dv, du, qkvu, activated):
    return qkvu.new_empty(qkvu.shape)
