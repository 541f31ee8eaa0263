"""The numbers of a run that follow from its config: model, batch, accumulation, memory."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lasp.shard import split_lengths
from lasp.tnl import TNLConfig
from launch.config import typed
from launch.errors import ConfigError
from parallel.tnl import SHARDED_SIZES, check_divides

if TYPE_CHECKING:
    from launch.config import Config
    from launch.tokenizer import Tokenizer
    from launch.world import Place
    from parallel.mesh import ParallelDims

__all__ = [
    "Batching",
    "autocast_dtype",
    "batching",
    "check_layout",
    "check_tensor_parallel",
    "cut_over",
    "data_parallel_engine",
    "describe",
    "model_config",
    "without_effect",
]

# The vocabulary is padded to whole tiles of the head's matmul.
_VOCAB_MULTIPLE = 64
# Fields of a TNLConfig that are flags.
_MODEL_FIELDS = (
    "vocab_size",
    "dim",
    "num_layers",
    "num_heads",
    "glu_dim",
    "layer_types",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Batching:
    """Sequences of one step.

    Attributes:
        global_batch_size: sequences of a step over the whole job.
        accumulation: micro-batches that each rank runs per step.
        tokens_per_step: tokens of the whole job, each counted once.
    """

    global_batch_size: int
    accumulation: int
    tokens_per_step: int


def batching(config: Config, place: Place) -> Batching:
    """How a step's sequences are spread. Raises ConfigError, with the equation, if they cannot."""
    local, dp = config.training.local_batch_size, place.dims.dp
    wanted = config.training.global_batch_size
    if wanted == -1:
        wanted = local * dp
    accumulation, rest = divmod(wanted, local * dp)
    if rest or not accumulation:
        raise ConfigError(
            f"training.global_batch_size {wanted} is not a multiple of local_batch_size {local} x "
            f"data-parallel ranks {dp} = {local * dp}: use "
            f"{max(1, round(wanted / (local * dp))) * local * dp}."
        )
    if config.training.varlen and local != 1:
        raise ConfigError(
            f"training.varlen packs documents into one sequence: local_batch_size is {local}, use "
            f"1 (and global_batch_size {wanted} for the same step)."
        )
    return Batching(wanted, accumulation, wanted * config.training.seq_len)


def check_layout(config: Config, place: Place) -> None:
    """Refuse a model or a sequence that the mesh cannot cut. Raises ConfigError with the numbers.

    The vocabulary comes with the data, and is looked at when that is open.
    """
    tp, cp = place.dims.tp, place.dims.cp
    data_parallel_engine(config, place.dims)
    if tp == 1:
        return
    check_tensor_parallel(model_config(config, None), tp, SHARDED_SIZES[:-1])
    length, layout = config.training.seq_len, config.parallelism.context_parallel_layout
    # Every rank's part, of which zigzag makes some two tokens longer than others.
    parts = split_lengths(length, cp, layout)
    if config.parallelism.tensor_parallel_shard_sequence and any(part % tp for part in parts):
        twice = layout == "zigzag" and tp % 2
        step = cp * tp * (2 if twice else 1)
        raise ConfigError(
            f"training.seq_len {length} is not a multiple of cp {cp} x tp {tp}"
            f"{' x 2 (zigzag)' if twice else ''} = {step}, as "
            "parallelism.tensor_parallel_shard_sequence needs: use "
            f"{-(-length // step) * step}, or switch it off."
        )


def check_tensor_parallel(
    model: TNLConfig, tp: int, sizes: tuple[str, ...] = SHARDED_SIZES
) -> None:
    """Raise ConfigError, with the numbers, where tp ranks cannot cut the model."""
    try:
        check_divides(model, tp, sizes)
    except ValueError as error:
        raise ConfigError(f"parallelism.tensor_parallel_degree is {tp}: {error}") from None


def model_config(config: Config, tokenizer: Tokenizer | None) -> TNLConfig:
    """The preset, overridden by model.config, by the tokenizer's vocabulary, by model.*.

    Raises:
        ConfigError: an unknown preset or field, or a vocabulary that the tokenizer does not fit.
    """
    wanted = config.model
    overrides = {}
    if tokenizer is not None:
        overrides["vocab_size"] = -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if wanted.config is not None:
        overrides |= _model_file(Path(wanted.config))
    for name in _MODEL_FIELDS:
        value = getattr(wanted, name)
        if value is not None:
            overrides[name] = value
    try:
        resolved = TNLConfig.preset(wanted.preset, **overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None
    if tokenizer is not None and resolved.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {resolved.vocab_size}, the tokenizer has {tokenizer.vocab_size} "
            "tokens: leave model.vocab_size out, or make it at least that."
        )
    return resolved


def _model_file(path: Path) -> dict[str, Any]:
    """The fields of a model.config file, of the right types; their values are not looked at."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model.config {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"model.config {path} is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"model.config {path} is not a JSON object of TNLConfig's fields.")
    hints = typing.get_type_hints(TNLConfig)
    for name, value in fields.items():
        where = f"model.config {path}: {name}"
        may_be_null = type(None) in typing.get_args(hints.get(name))
        if name == "lrpe_layers":
            if not isinstance(value, list) or not all(type(each) is int for each in value):
                raise ConfigError(f"{where} is {value!r}, must be a list of whole numbers.")
        elif name in hints and not (value is None and may_be_null):
            typed(value, hints[name], where)
    return fields


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """What the matmuls run in, None for the weights' own float32."""
    wanted = config.training.mixed_precision_param
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return None if wanted == "float32" else torch.bfloat16


def data_parallel_engine(config: Config, dims: ParallelDims) -> Literal["none", "ddp", "fsdp"]:
    """What sums gradients over ranks: nothing, where no other rank has the same weights; DDP, where
    each holds its weights whole; else FSDP, which alone can hold weights that tp has cut."""
    method = config.parallelism.data_parallel_method
    if dims.dp * dims.cp == 1:
        return "none"
    if method == "ddp" and dims.tp > 1:
        raise ConfigError(
            f"parallelism.data_parallel_method is ddp with tensor_parallel_degree {dims.tp}: DDP "
            "cannot hold weights that are cut; use auto or fsdp."
        )
    if dims.tp > 1 or (method == "auto" and dims.dp_shard > 1):
        return "fsdp"
    return "fsdp" if method == "fsdp" and dims.dp_shard * dims.cp > 1 else "ddp"


def cut_over(config: Config, dims: ParallelDims) -> int:
    """Ranks over which data parallelism cuts the weights; 1: each holds them whole."""
    return dims.dp_shard * dims.cp if data_parallel_engine(config, dims) == "fsdp" else 1


def without_effect(config: Config, dims: ParallelDims) -> list[str]:
    """Settings that were changed and that do nothing on this mesh, with the reason. They are no
    mistake: the same config may be meant for other meshes."""
    layout, found = config.parallelism, []
    if data_parallel_engine(config, dims) != "fsdp":
        changed = {
            "data_parallel_method": layout.data_parallel_method == "fsdp",
            "fsdp_reshard_after_forward": layout.fsdp_reshard_after_forward != "always",
            "fsdp_reduce_every_micro_batch": layout.fsdp_reduce_every_micro_batch,
        }
        names = ", ".join(
            f"parallelism.{name}" for name, is_changed in changed.items() if is_changed
        )
        if names:
            found.append(f"{names} (data parallelism cuts no weights)")
    if layout.tensor_parallel_shard_sequence and dims.tp == 1:
        found.append("parallelism.tensor_parallel_shard_sequence (tp is 1)")
    return found


def describe(config: Config, place: Place, model: TNLConfig, batch: Batching) -> str:
    """What a user should know before the first step. (Of memory a dry run tells more, and finer:
    see launch/estimate.py.)"""
    training, dims = config.training, place.dims
    parameters = model.num_parameters()
    pieces = cut_over(config, dims) * dims.tp
    layout = config.parallelism
    shards = "on one rank"
    if dims.cp > 1:
        how = f"{layout.context_parallel_method}, {layout.context_parallel_layout}"
        shards = f"over {dims.cp} ranks ({how})"
    dtype = autocast_dtype(config, place.device) or torch.float32
    shape = ", ".join(
        f"{field.name} {getattr(model, field.name)}" for field in dataclasses.fields(model)[:5]
    )
    sequences = f"{batch.global_batch_size} sequence" + "s" * (batch.global_batch_size > 1)
    if model.num_softmax_layers:
        shape += f", {model.num_softmax_layers} of the layers softmax"
    lines = {
        "model": f"{config.model.preset}: {parameters:,} parameters ({shape})",
        "mesh": f"{dims.equation} ({place.backend}, {place.device.type}, {dtype})",
        "sequence": f"{training.seq_len:,} tokens {shards}",
        "batch": (
            f"{batch.tokens_per_step:,} tokens per step = {sequences} = "
            f"accumulation {batch.accumulation} x local batch {training.local_batch_size} x "
            f"data-parallel {dims.dp}"
        ),
        # float32 weights, gradients and two moments.
        "memory": (
            f"{16 * parameters / pieces / 2**30:.2f} GiB per rank for weights, gradients and "
            f"moments{f' cut over {pieces} ranks' if pieces > 1 else ''}; "
            "activations come on top (see --job.dry_run)"
        ),
        "data": "random tokens" if config.data.source == "random" else str(config.data_folder),
        "checkpoints": str(config.checkpoint_folder) if config.checkpoint.enable else "none",
    }
    if config.job.dry_run:
        del lines["memory"]
    if idle := without_effect(config, dims):
        lines["no effect"] = "; ".join(idle)
    return "\n".join(f"{name + ':':<13}{text}" for name, text in lines.items())
