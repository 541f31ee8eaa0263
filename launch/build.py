"""From a config to the model of a rank: cut over tp, recomputing, compiled, over data ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lasp.tnl import TNL, TNLConfig
from launch.plan import autocast_dtype, data_parallel_engine
from launch.step import LossModel
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.compile import compile_blocks
from parallel.data import replicate, shard
from parallel.mesh import sharding_mesh
from parallel.tnl import float32_blocks, tensor_parallel

if TYPE_CHECKING:
    from launch.config import Config
    from launch.world import World

__all__ = ["build_model", "over_ranks"]


def build_model(config: Config, world: World, shape: TNLConfig) -> LossModel:
    """The model with its loss, whole but for tensor parallelism.

    Every rank draws all weights and then keeps its own, so that they are the same on any mesh.
    """
    with world.device:
        model = TNL(shape)
    if world.dims.tp > 1:
        by_tokens = config.parallelism.tensor_parallel_shard_sequence
        tensor_parallel(model, world.mesh["tp"], shard_sequence=by_tokens)
    checkpoint_blocks(model.blocks, config.activation_checkpoint.mode)
    compiled = config.compile.enable
    if compiled is None:
        compiled = world.device.type == "cuda"
    if compiled:
        compile_blocks(model.blocks)
    dtype = autocast_dtype(config, world.device)
    return LossModel(model, config.training.loss_chunk_size, dtype, compiled)


def over_ranks(loss_model: LossModel, config: Config, world: World) -> nn.Module:
    """The model as data parallelism runs it: cut (changed in place), wrapped, or itself."""
    reduce_dtype = getattr(torch, config.training.mixed_precision_reduce)
    engine = data_parallel_engine(config, world.dims)
    if engine == "fsdp":
        return shard(
            loss_model,
            sharding_mesh(world.mesh),
            blocks=loss_model.model.blocks,
            exact=float32_blocks(loss_model.model),
            param_dtype=autocast_dtype(config, world.device),
            reduce_dtype=reduce_dtype,
            reshard_after_forward=config.parallelism.fsdp_reshard_after_forward == "always",
        )
    if engine == "ddp":
        return replicate(loss_model, world.gradient_group, reduce_dtype=reduce_dtype)
    return loss_model
