"""The TNL-specific part of parallelism: what tensor parallelism shards, and what needs float32.

The model itself has no code for it. The projections into a mixer are sharded by output features
(heads of q, k, v, u; the inner width of SGLU), the projection out of it by input features,
embedding and head by vocabulary (`parallel.loss` never gathers their logits). Particular to TNL:
the norm of the token mixer runs over the heads of all ranks, and decays and LRPE rates belong to
heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from lasp.tnl.layers import GatedLinearAttention
from lasp.tnl.positions import LRPE
from parallel.tensor import ShardedSRMSNorm, VocabParallel

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

    from lasp.tnl import TNL, TNLConfig

__all__ = ["SHARDED_SIZES", "check_divides", "float32_blocks", "tensor_parallel"]

# The fields of a TNLConfig that tensor parallelism shards.
SHARDED_SIZES = ("num_heads", "num_key_value_heads", "glu_dim", "vocab_size")
_COLUMNWISE = ("qkvu_proj", "decay_proj", "q_proj", "kv_proj", "w1", "w2")
_ROWWISE = ("out_proj", "w3")


def tensor_parallel(model: TNL, mesh: DeviceMesh, *, shard_sequence: bool = False) -> TNL:
    """Shard `model` over `mesh`, in place; inputs and outputs of its forward stay as they were.

    All ranks must hold equal weights; each keeps its shard. Every parameter becomes a DTensor on
    `mesh`: embedding, projections into the mixers, w1, w2 and theta with Shard(0), out_proj and w3
    with Shard(1). States that the model takes or returns are those of this rank's heads.
    `generate` gives every rank the tokens of one device.

    Apply it before activation checkpointing, compilation and data parallelism.

    Args:
        model: on its device.
        mesh: one axis, the ranks that share each layer.
        shard_sequence: between the mixers each rank holds 1/tp of its tokens instead of a copy of
            all (sequence parallelism in Megatron's sense, arXiv 2205.05198): the residual stream
            and its norms take 1/tp of the memory, for the same bytes on the wire. A rank's tokens
            must then be divisible by tp.

    Raises:
        ValueError: heads, widths or a vocabulary that the ranks do not divide, or dropout with
            shard_sequence.
    """
    ranks = mesh.size()
    check_divides(model.config, ranks)
    if shard_sequence and model.config.dropout:
        raise ValueError(
            f"dropout is {model.config.dropout} and shard_sequence is set: dropout goes by the "
            "positions of all tokens, of which a rank then holds a part. Use one of them."
        )
    between = Shard(1) if shard_sequence else Replicate()
    # The norms return DTensors: one gather serves all products that read them, their gradients are
    # summed once, and `hidden @ head_weight.T` works with a sharded head.
    norm = PrepareModuleOutput(
        output_layouts=between, desired_output_layouts=Replicate(), use_local_output=False
    )
    styles = {name: ColwiseParallel() for name in _COLUMNWISE}
    styles |= {name: RowwiseParallel(output_layouts=between) for name in _ROWWISE}
    plan: dict[str, Any] = {"embedding": VocabParallel(between), "final_norm": norm}
    for number, block in enumerate(model.blocks):
        plan |= {f"blocks.{number}.{name}": norm for name in ("token_norm", "channel_norm")}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                plan[f"blocks.{number}.{name}"] = styles[name.rpartition(".")[2]]
    # src_data_rank=None: every rank has the weights, so nothing needs to be sent.
    parallelize_module(model, mesh, plan, src_data_rank=None)
    for block in model.blocks:
        if isinstance(block.token_mixer, GatedLinearAttention):
            _shard_heads(block.token_mixer, mesh)
    if shard_sequence:
        model.register_forward_pre_hook(_check_tokens(ranks))
    model.register_forward_hook(_full_output)
    return model


def check_divides(config: TNLConfig, ranks: int, sizes: tuple[str, ...] = SHARDED_SIZES) -> None:
    """Raise ValueError, with the numbers, if `ranks` do not divide one of the config's `sizes`, or
    the config has parts that cannot be sharded."""
    if ranks > 1 and (config.norm != "srms" or config.position_embeddings):
        raise ValueError(
            f'norm is "{config.norm}" and position_embeddings {config.position_embeddings}: '
            'tensor parallelism shards only models with norm "srms" and without position '
            "embeddings. Use data or context parallelism."
        )
    for name in sizes:
        size = getattr(config, name)
        # num_key_value_heads may be None: as many as num_heads.
        if size is not None and size % ranks:
            divisors = [n for n in range(1, ranks) if not size % n]
            raise ValueError(
                f"{name} {size} does not divide by {ranks} tensor-parallel ranks "
                f"({size} = {size // ranks} x {ranks} + {size % ranks}): use "
                f"{' or '.join(map(str, divisors))} of them, or change {name}."
            )


def float32_blocks(model: TNL) -> list[nn.Module]:
    """The blocks whose weights must be gathered in float32: those with LRPE rates, which need it
    even when the forward runs in bfloat16."""
    return [b for b in model.blocks if any(isinstance(module, LRPE) for module in b.modules())]


def _shard_heads(mixer: GatedLinearAttention, mesh: DeviceMesh) -> None:
    """Keep this rank's heads of everything but the projections."""
    heads = mixer.config.num_heads // mesh.size()
    first = mesh.get_local_rank() * heads
    mixer.keep_heads(slice(first, first + heads))
    # A denominator belongs to its head.
    if mixer.norm is not None:
        mixer.norm = ShardedSRMSNorm(mixer.norm.dim, mixer.norm.eps, mesh.get_group())
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


def _full_output(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Logits or hidden states as plain tensors, complete on every rank."""
    if isinstance(output, tuple):
        return (output[0].full_tensor(), *output[1:])
    # States are this rank's own.
    return output.full_tensor() if isinstance(output, DTensor) else output
