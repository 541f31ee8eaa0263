"""Tensor parallelism, the parts that any model can use; `parallel.tnl` applies them to a TNL.

In the manner of Megatron-LM (arXiv 1909.08053): projections into a mixer are sharded by output
features and projections out of it by input features, so each mixer costs one sum over the ranks.
torch has those (ColwiseParallel, RowwiseParallel); this module adds an embedding sharded by
vocabulary and a norm over sharded features.

Shapes: B batch, T tokens, d features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from parallel.compile import fused

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["ShardedSRMSNorm", "VocabParallel"]


class VocabParallel(ParallelStyle):
    """Shards an embedding by vocabulary: each rank looks up its own rows, then ranks are summed.

    (RowwiseParallel does that too, but its backward builds and sends the gradient of the full
    vocabulary on every rank.)

    Args:
        output_layouts: placement of the output [B, T, d].
    """

    def __init__(self, output_layouts: Placement) -> None:
        super().__init__()
        self.output_layouts = output_layouts

    def _apply(self, module: nn.Embedding, mesh: DeviceMesh) -> nn.Embedding:
        weight = distribute_tensor(
            module.weight.detach(), mesh, [Shard(0)], src_data_rank=self.src_data_rank
        )
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        module.forward = functools.partial(_embed, module, mesh, self.output_layouts)
        return module


def _embed(module: nn.Embedding, mesh: DeviceMesh, output: Placement, tokens: Tensor) -> Tensor:
    # Read in each forward: FSDP replaces the parameter.
    weight = module.weight.to_local()
    rows, padding = weight.shape[0], module.padding_idx
    first = mesh.get_local_rank() * rows
    if padding is not None:
        padding = padding - first if first <= padding < first + rows else None
    index = tokens - first
    elsewhere = (index < 0) | (index >= rows)
    embedded = F.embedding(index.masked_fill(elsewhere, 0), weight, padding)
    embedded = embedded.masked_fill(elsewhere.unsqueeze(-1), 0)
    partial = DTensor.from_local(embedded, mesh, [Partial()], run_check=False)
    return partial.redistribute(placements=[output]).to_local()


class ShardedSRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps), with the mean over features sharded over ranks.

    x [..., dim / ranks] -> the same shape and dtype; sums and statistics are float32 (float64 for
    float64). One float per token crosses the ranks in the forward, and one in the backward.

    Args:
        dim: features of all ranks together.
        eps: added to the mean square.
        group: the ranks that hold the features.
        compiles: compile its parts on a GPU, for layers that are not compiled as a whole.
    """

    def __init__(
        self, dim: int, eps: float, group: ProcessGroup, *, compiles: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.group = group
        self._parts = _FUSED if compiles else _PLAIN

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """gate, of as many features in any shape: multiplied to y; None: 1."""
        return _ShardedSRMSNorm.apply(x, gate, self.dim, self.eps, self.group, self._parts)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, ranks={self.group.size()}"


class _ShardedSRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        dim: int,
        eps: float,
        group: ProcessGroup,
        parts: _Parts,
    ) -> Tensor:
        squares = parts.squares(x)
        dist.all_reduce(squares, group=group)
        ctx.save_for_backward(x, gate, squares)
        ctx.dim, ctx.eps, ctx.group, ctx.parts = dim, eps, group, parts
        return parts.scaled(x, gate, squares, dim, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # y = g x s with s = (|x|^2 / dim + eps)^(-1/2), so dx = s (g dy - x s^2 (x . g dy) / dim),
        # where |x|^2 and x . g dy are over the features of all ranks.
        x, gate, squares = ctx.saved_tensors
        product = ctx.parts.inner_product(x, gate, dy)
        dist.all_reduce(product, group=ctx.group)
        gradients = ctx.parts.gradients(x, gate, dy, squares, product, ctx.dim, ctx.eps)
        return *gradients, None, None, None, None


def _squares(x: Tensor) -> Tensor:
    return _widened(x).square().sum(-1, keepdim=True)


def _scaled(x: Tensor, gate: Tensor | None, squares: Tensor, dim: int, eps: float) -> Tensor:
    y = x * torch.rsqrt(squares / dim + eps)
    return (y if gate is None else y * gate.reshape(x.shape)).to(x.dtype)


def _inner_product(x: Tensor, gate: Tensor | None, dy: Tensor) -> Tensor:
    dy = _widened(dy)
    return ((dy if gate is None else dy * gate.reshape(x.shape)) * x).sum(-1, keepdim=True)


def _gradients(
    x: Tensor,
    gate: Tensor | None,
    dy: Tensor,
    squares: Tensor,
    product: Tensor,
    dim: int,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    dy, scale = _widened(dy), torch.rsqrt(squares / dim + eps)
    inner = dy if gate is None else dy * gate.reshape(x.shape)
    dx = (scale * (inner - x * (scale.square() * (product / dim)))).to(x.dtype)
    if gate is None:
        return dx, None
    return dx, (dy * x * scale).to(gate.dtype).reshape(gate.shape)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Parts(NamedTuple):
    """What happens between the sums over ranks."""

    squares: Callable[..., Tensor]
    scaled: Callable[..., Tensor]
    inner_product: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, Tensor | None]]


_PLAIN = _Parts(_squares, _scaled, _inner_product, _gradients)
_FUSED = _Parts(*map(fused, _PLAIN))
