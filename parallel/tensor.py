"""Tensor parallelism: each layer of a TNL cut over the ranks of the mesh's tp axis.

Applied from outside to a model that knows nothing of it, in the manner of Megatron-LM (arXiv
1909.08053): the inputs of a mixer are cut by columns (whole heads of q, k, v, u; parts of the
SGLU's width), its output by rows, so that each mixer costs one sum over the ranks. Embedding and
head are cut by vocabulary, and `parallel.loss` never joins their logits.

What is particular to TransNormerLLM: the norm of the token mixer runs over all heads, so its mean
square is taken over all ranks; decays and LRPE rates belong to global heads.

Shapes: B batch, T tokens, d width of all heads together, D of a head.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from lasp.tnl.layers import GatedLinearAttention

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup
    from torch.distributed.tensor.placement_types import Placement

    from lasp.tnl import TNL, TNLConfig

__all__ = ["CUT_SIZES", "NormOverRanks", "check_divides", "tensor_parallel"]

# What of a TNLConfig is cut.
CUT_SIZES = ("num_heads", "num_key_value_heads", "glu_dim", "vocab_size")
_BY_COLUMNS = ("qkvu_proj", "q_proj", "kv_proj", "w1", "w2")
_BY_ROWS = ("out_proj", "w3")


def tensor_parallel(model: TNL, mesh: DeviceMesh, *, shard_sequence: bool = False) -> TNL:
    """Cut `model` over `mesh`, in place; its forward takes and gives what it did before.

    All ranks must hold equal weights; each keeps its part. Every parameter becomes a DTensor on
    `mesh`: cut by rows (Shard(0)) the embedding, the projections into the mixers, w1, w2 and theta,
    by columns (Shard(1)) out_proj and w3. States that the model takes or gives hold this rank's
    heads. (`generate` wants a model that is whole again.)

    Apply it before recomputation, compilation and data parallelism.

    Args:
        model: on its device.
        mesh: one axis, the ranks that share each layer.
        shard_sequence: between the mixers each rank keeps 1/tp of its tokens and not a copy of all
            (sequence parallelism in Megatron's sense, arXiv 2205.05198): the residual stream and
            its norms take 1/tp of the memory, for the same bytes on the wire. The tokens of a
            rank must then divide by tp.

    Raises:
        ValueError: heads, channels or words that do not divide by the ranks.
    """
    ranks = mesh.size()
    check_divides(model.config, ranks)
    between = Shard(1) if shard_sequence else Replicate()
    # The norms give DTensors: one gather for all products that read them, and one sum of their
    # gradients; and `hidden @ head_weight.T` works on a head that is cut.
    norm = PrepareModuleOutput(
        output_layouts=between, desired_output_layouts=Replicate(), use_local_output=False
    )
    styles = {name: ColwiseParallel() for name in _BY_COLUMNS}
    styles |= {name: RowwiseParallel(output_layouts=between) for name in _BY_ROWS}
    plan: dict[str, Any] = {"embedding": _ByWords(between), "final_norm": norm}
    for number, block in enumerate(model.blocks):
        plan |= {f"blocks.{number}.{name}": norm for name in ("token_norm", "channel_norm")}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                plan[f"blocks.{number}.{name}"] = styles[name.rpartition(".")[2]]
    # src_data_rank=None: every rank has the weights, nothing need be sent.
    parallelize_module(model, mesh, plan, src_data_rank=None)
    for block in model.blocks:
        if isinstance(block.token_mixer, GatedLinearAttention):
            _cut_heads(block.token_mixer, mesh)
    if shard_sequence:
        model.register_forward_pre_hook(_check_tokens(ranks))
    model.register_forward_hook(_to_whole)
    return model


class _ByWords(ParallelStyle):
    """An embedding cut by words: every rank looks up its own, and the sum over ranks has all.

    (RowwiseParallel does that too, but its backward makes the gradient of all words on every rank,
    and sends it.)
    """

    def __init__(self, output: Placement) -> None:
        super().__init__()
        self._output = output

    def _apply(self, module: nn.Embedding, mesh: DeviceMesh) -> nn.Embedding:
        weight = distribute_tensor(
            module.weight.detach(), mesh, [Shard(0)], src_data_rank=self.src_data_rank
        )
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        module.forward = functools.partial(_look_up, module, mesh, self._output)
        return module


def _look_up(module: nn.Embedding, mesh: DeviceMesh, output: Placement, tokens: Tensor) -> Tensor:
    # Now and not before: FSDP puts another tensor in its place for each forward.
    weight = module.weight.to_local()
    rows, padding = weight.shape[0], module.padding_idx
    first = mesh.get_local_rank() * rows
    if padding is not None:
        padding = padding - first if first <= padding < first + rows else None
    place = tokens - first
    elsewhere = (place < 0) | (place >= rows)
    found = F.embedding(place.masked_fill(elsewhere, 0), weight, padding)
    found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
    return (
        DTensor.from_local(found, mesh, [Partial()], run_check=False)
        .redistribute(placements=[output])
        .to_local()
    )


def check_divides(config: TNLConfig, ranks: int, sizes: tuple[str, ...] = CUT_SIZES) -> None:
    """Raise ValueError, with the numbers, where one of `sizes` cannot be cut over `ranks`."""
    for name in sizes:
        size = getattr(config, name)
        # None: as many as num_heads. (In softmax layers; without any it plays no part.)
        if size is not None and size % ranks:
            divisors = [n for n in range(1, ranks) if not size % n]
            raise ValueError(
                f"{name} {size} does not divide by {ranks} tensor-parallel ranks "
                f"({size} = {size // ranks} x {ranks} + {size % ranks}): use "
                f"{' or '.join(map(str, divisors))} of them, or change {name}."
            )


class NormOverRanks(nn.Module):
    """SRMSNorm of a vector that is cut over ranks: the mean square is that of the whole vector.

    x [..., dim / ranks] -> the same shape and dtype; sums and statistics are float32 (float64 for
    float64). One float per token crosses the ranks in the forward, and one in the backward.

    Args:
        dim: of the whole vector.
        eps: added to the mean square.
        group: the ranks that hold the vector.
    """

    def __init__(self, dim: int, eps: float, group: ProcessGroup) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return _NormOverRanks.apply(x, self.dim, self.eps, self.group)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, ranks={self.group.size()}"


class _NormOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, eps: float, group: ProcessGroup) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        dist.all_reduce(squares, group=group)
        scale = torch.rsqrt(squares / dim + eps)
        ctx.save_for_backward(x, scale)
        ctx.dim, ctx.group = dim, group
        return (wide * scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # y = x s with s = (|x|^2 / dim + eps)^(-1/2): dx = s (dy - x s^2 (x . dy) / dim), where the
        # product x . dy is over the whole vector as |x|^2 is.
        x, scale = ctx.saved_tensors
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        product = (wide * grad).sum(-1, keepdim=True)
        dist.all_reduce(product, group=ctx.group)
        grad_x = scale * (grad - wide * (scale.square() * product / ctx.dim))
        return grad_x.to(x.dtype), None, None, None


def _cut_heads(mixer: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this rank's heads of what the token mixer has besides its projections."""
    heads = mixer.config.num_heads // mesh.size()
    first = mesh.get_local_rank() * heads
    mixer.keep_heads(slice(first, first + heads))
    mixer.norm = NormOverRanks(mixer.norm.dim, mixer.norm.eps, mesh.get_group())
    if mixer.lrpe is not None:
        theta = DTensor.from_local(mixer.lrpe.theta.detach(), mesh, [Shard(0)], run_check=False)
        mixer.lrpe.theta = nn.Parameter(theta, requires_grad=mixer.lrpe.theta.requires_grad)


def _check_tokens(ranks: int):
    def check(model: nn.Module, args: tuple[Any, ...]) -> None:
        length = args[0].shape[1]
        if length % ranks:
            raise ValueError(
                f"{length} tokens of this rank do not divide by {ranks} tensor-parallel ranks, as "
                f"shard_sequence needs: use a multiple of {ranks}, or shard_sequence=False."
            )

    return check


def _to_whole(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Logits or hidden states as plain tensors, whole on every rank."""
    if isinstance(output, tuple):
        return (_to_whole(model, args, output[0]), *output[1:])
    return output.full_tensor()
