"""What follows from a config and the number of ranks: the batch, what cannot run, the summary."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from lasp.shard import split_lengths
from launch.build import (
    autocast_dtype,
    data_parallel_engine,
    get_family,
    model_config,
    num_weight_shards,
)
from launch.config import Config
from launch.distributed import RankInfo
from launch.exit_codes import ConfigError
from parallel.float8 import MULTIPLE
from parallel.mesh import ParallelDims


@dataclass(frozen=True)
class Batching:
    """Sequences of one step.

    Attributes:
        global_batch_size: sequences per step over the whole job.
        accumulation: micro-batches that each rank runs per step.
        tokens_per_step: tokens of the whole job, each counted once.
    """

    global_batch_size: int
    accumulation: int
    tokens_per_step: int


def batching(config: Config, info: RankInfo) -> Batching:
    """Divide a step's sequences over ranks and micro-batches.

    Raises:
        ConfigError: they do not divide; the message has the equation.
    """
    local, dp = config.training.local_batch_size, info.dims.dp
    size = config.training.global_batch_size
    if size == -1:
        size = local * dp
    accumulation, rest = divmod(size, local * dp)
    if rest or not accumulation:
        raise ConfigError(
            f"training.global_batch_size {size} is not a multiple of local_batch_size {local} x "
            f"data-parallel ranks {dp} = {local * dp}: use "
            f"{max(1, round(size / (local * dp))) * local * dp}."
        )
    if config.training.varlen and local != 1:
        raise ConfigError(
            f"training.varlen packs documents into one sequence: local_batch_size is {local}, use "
            f"1 (and global_batch_size {size} for the same step)."
        )
    return Batching(size, accumulation, size * config.training.seq_len)


def check_parallelism(config: Config, info: RankInfo) -> None:
    """Raise ConfigError, with the numbers, if the mesh cannot shard the model or the sequence.

    The vocabulary is known only once the data is open, and is checked then.
    """
    tp, cp = info.dims.tp, info.dims.cp
    data_parallel_engine(config, info.dims)
    if config.float8.recipe_name is not None:
        check_float8_tokens(config, cp)
    shape = model_config(config, None)
    check_shape(config, dataclasses.replace(shape, vocab_size=tp * shape.vocab_size), tp)
    if tp > 1 and config.parallelism.tensor_parallel_shard_sequence:
        check_sequence_shards(config, tp, cp)


def check_sequence_shards(config: Config, tp: int, cp: int) -> None:
    """Raise ConfigError if a rank's tokens do not divide over tp ranks."""
    layout = config.parallelism.context_parallel_layout
    for name, length in forward_lengths(config).items():
        # In zigzag some ranks have two tokens more than others.
        if any(each % tp for each in split_lengths(length, cp, layout)):
            twice = layout == "zigzag" and tp % 2
            step = cp * tp * (2 if twice else 1)
            raise ConfigError(
                f"{name} {length} is not a multiple of cp {cp} x tp {tp}"
                f"{' x 2 (zigzag)' if twice else ''} = {step}, as "
                "parallelism.tensor_parallel_shard_sequence needs: use "
                f"{-(-length // step) * step}, or switch it off."
            )


def forward_lengths(config: Config) -> dict[str, int]:
    """The tokens of a forward over all ranks, by what determines them: a sequence, or a segment and
    the last one if it is shorter."""
    training = config.training
    if training.num_segments == 1:
        return {"training.seq_len": training.seq_len}
    lengths = {"training.segment_len": training.segment_len}
    if rest := training.seq_len % training.segment_len:
        lengths["the last segment (training.seq_len % training.segment_len)"] = rest
    return lengths


def check_float8_tokens(config: Config, cp: int) -> None:
    """Raise ConfigError if a rank's tokens are not a multiple of what FP8 products need."""
    local, layout = config.training.local_batch_size, config.parallelism.context_parallel_layout
    for name, length in forward_lengths(config).items():
        # In zigzag some ranks have two tokens more than others.
        lengths = [local * each for each in split_lengths(length, cp, layout)]
        if any(each % MULTIPLE for each in lengths):
            step = cp * MULTIPLE
            raise ConfigError(
                f"quantize.linear.float8: a rank has {max(lengths)} tokens (local_batch_size "
                f"{local} x {name} {length} / cp {cp}), FP8 needs a multiple of {MULTIPLE}: use "
                f"{-(-length // step) * step}."
            )


def check_shape(config: Config, shape: Any, tp: int) -> None:
    """Raise ConfigError if the run cannot train a model of config `shape`: tp ranks cannot shard
    it, its sequences are too long for it, or it has no states that could leave a segment."""
    family = get_family(config.model.family)
    try:
        family.check_divides(shape, tp)
    except ValueError as error:
        raise ConfigError(f"parallelism.tensor_parallel_degree is {tp}: {error}") from None
    training = config.training
    if tp > 1 and config.parallelism.tensor_parallel_shard_sequence and shape.dropout:
        raise ConfigError(
            f"model.dropout is {shape.dropout} with parallelism.tensor_parallel_shard_sequence: "
            "switch that off, or use no dropout."
        )
    problem = family.sequence_problem(shape, training.seq_len, packed=training.varlen)
    if problem is not None:
        raise ConfigError(f"training.seq_len is {training.seq_len}: {problem}")
    problem = family.streaming_problem(shape) if training.segment_len else None
    if problem is not None:
        raise ConfigError(f"training.segment_len is {config.training.segment_len}: {problem}")


def without_effect(config: Config, dims: ParallelDims) -> list[str]:
    """Settings that were changed but do nothing on this mesh, with the reason. They are not errors:
    the same config may be meant for other meshes."""
    parallelism, found = config.parallelism, []
    if data_parallel_engine(config, dims) != "fsdp":
        changed = {
            "data_parallel_method": parallelism.data_parallel_method == "fsdp",
            "fsdp_reshard_after_forward": parallelism.fsdp_reshard_after_forward != "always",
            "fsdp_reduce_every_micro_batch": parallelism.fsdp_reduce_every_micro_batch,
        }
        names = [f"parallelism.{name}" for name, is_changed in changed.items() if is_changed]
        if names:
            found.append(f"{', '.join(names)} (data parallelism shards no weights)")
    float8 = config.float8
    if float8.enable_fsdp_float8_all_gather and data_parallel_engine(config, dims) != "fsdp":
        name = "quantize.linear.float8.enable_fsdp_float8_all_gather"
        found.append(f"{name} (data parallelism shards no weights)")
    if float8.precompute_float8_dynamic_scale_for_fsdp and not float8.enable_fsdp_float8_all_gather:
        name = "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
        found.append(f"{name} (enable_fsdp_float8_all_gather is off)")
    if parallelism.tensor_parallel_shard_sequence and dims.tp == 1:
        found.append("parallelism.tensor_parallel_shard_sequence (tp is 1)")
    training = config.training
    if not training.segment_len:
        changed = {
            "segment_gradient": training.segment_gradient != "exact",
            "segment_states": training.segment_states != "host",
        }
        found += [
            f"training.{name} (training.segment_len is 0)"
            for name, is_changed in changed.items()
            if is_changed
        ]
    return found


def describe_hosts(info: RankInfo) -> str:
    """The hosts of a job, which axes of the mesh cross them, and what is slow about it."""
    per_host, dims = info.ranks_per_host, info.dims
    assert per_host is not None
    crossed = dims.hosts_of_groups(per_host)
    axes = (
        f"{axis} {dims.degrees[axis]} " + (f"crosses {n} hosts" if n > 1 else "stays in one")
        for axis, n in crossed.items()
    )
    text = f"{-(-dims.world_size // per_host)} of {per_host} ranks each; {', '.join(axes)}"
    sequence = dims.cp * dims.tp
    if crossed.get("tp", 1) > 1:
        text += (
            ". Tensor parallelism sends the activations of all tokens several times per layer, "
            "which is slow between hosts: use a parallelism.tensor_parallel_degree that divides "
            f"{per_host}, such as {math.gcd(per_host, dims.tp)}"
        )
    elif crossed.get("cp", 1) > 1 and sequence % per_host and per_host % sequence:
        text += (
            f". Sequences, of cp {dims.cp} x tp {dims.tp} = {sequence} ranks each, do not start or "
            f"end with hosts: use a product that divides {per_host} or is a multiple of it"
        )
    return text


def _in_segments(config: Config) -> str:
    training = config.training
    if not training.segment_len:
        return ""
    segments = f"{training.num_segments:,} segments of {training.forward_len:,}"
    return f", in {segments} (gradient {training.segment_gradient})"


def describe(config: Config, info: RankInfo, shape: Any, batch: Batching) -> str:
    """The summary printed before the first step. (A dry run adds finer numbers on memory, see
    launch/memory_estimate.py.)"""
    training, parallelism, dims = config.training, config.parallelism, info.dims
    family = get_family(config.model.family)
    parameters = family.num_parameters(shape)
    shards = num_weight_shards(config, dims) * dims.tp
    ranks = "on one rank"
    if dims.cp > 1:
        how = f"{parallelism.context_parallel_method}, {parallelism.context_parallel_layout}"
        ranks = f"over {dims.cp} ranks ({how})"
    dtype = str(autocast_dtype(config, info.device) or torch.float32)
    if config.float8.recipe_name is not None:
        dtype += f", blocks' linear layers FP8 {config.float8.recipe_name}"
    sequences = f"{batch.global_batch_size} sequence" + "s" * (batch.global_batch_size > 1)
    lines = {
        "model": f"{config.model.preset}: {parameters:,} parameters ({family.describe(shape)})",
        "mesh": f"{dims.equation} ({info.backend}, {info.device.type}, {dtype})",
        "hosts": describe_hosts(info) if info.ranks_per_host is not None else "",
        "sequence": f"{training.seq_len:,} tokens {ranks}{_in_segments(config)}",
        "batch": (
            f"{batch.tokens_per_step:,} tokens per step = {sequences} = "
            f"accumulation {batch.accumulation} x local batch {training.local_batch_size} x "
            f"data-parallel {dims.dp}"
        ),
        # float32 weights, gradients and two moments.
        "memory": (
            f"{16 * parameters / shards / 2**30:.2f} GiB per rank for weights, gradients and "
            f"moments{f' sharded over {shards} ranks' if shards > 1 else ''}; "
            "activations come on top (see --job.dry_run)"
        ),
        "data": _data(config),
        "checkpoints": str(config.checkpoint_folder) if config.checkpoint.enable else "none",
    }
    if config.job.dry_run:
        del lines["memory"]
    if info.ranks_per_host is None:
        del lines["hosts"]
    if idle := without_effect(config, dims):
        lines["no effect"] = "; ".join(idle)
    return "\n".join(f"{name + ':':<13}{text}" for name, text in lines.items())


def _data(config: Config) -> str:
    if config.data.source == "random":
        return "random tokens"
    if not config.data.folders:
        return str(config.data_folder)
    total = sum(weight for _, weight in config.data.folders)
    shares = (f"{folder} {weight / total:.1%}" for folder, weight in config.data.folders)
    return ", ".join(shares)
