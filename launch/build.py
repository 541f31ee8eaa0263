"""From a config to the model of a rank: one registry row per model family, and what is applied to
any of them: FP8, tensor parallelism, activation checkpointing, compilation, data parallelism."""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.convert import hf_files, hf_layout
from lasp.tnl.generation import stream
from launch.config import Config, Float8, Model
from launch.data import IGNORE
from launch.distributed import DistContext
from launch.exit_codes import ConfigError
from launch.files import read_json
from launch.tokenizer import Tokenizer
from launch.toml_config import typed
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.compile import compile_blocks
from parallel.data import replicate, shard
from parallel.float8 import check_available, check_sizes, convert_blocks
from parallel.loss import chunked_cross_entropy
from parallel.mesh import ParallelDims, sharding_mesh
from parallel.tnl import check_divides, float32_blocks, tensor_parallel

# The vocabulary is padded to whole tiles of the head's matmul.
_VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class ModelFamily:
    """All that launch/ and parallel/ need to know of one kind of model.

    A model has `config`, `blocks` in the order of the forward, `head_weight` [V, D], and
    `forward(tokens, *, shard, cu_seqlens, return_hidden)`. Its config is a frozen dataclass with
    `vocab_size`, `num_layers`, `dropout` and the class method `preset(name, **overrides)`.

    With `dropout` above 0 in its config its forward takes `dropout_seeds`, as `lasp.tnl.TNL` does.
    For training in segments a model also has `initial_states(batch_size)`, whose result has
    `layers` (tensors) and `position`, and its forward takes `states`, `return_states`,
    `states_only` and `cut_documents`, as `lasp.tnl.TNL` does. Recall (launch/evaluation/recall.py)
    needs `states` and `return_states` of it, lm-evaluation-harness also `padding_mask`.

    Attributes:
        config_class: of the model's config.
        build: config -> model, with random weights on the current device.
        describe: config -> its shape in a few words.
        num_parameters: config -> parameters of the whole model.
        flops_per_token: (config, training=, seq_len=) -> FLOPs of one token.
        state_bytes: config -> bytes of the recurrent states of one sequence, over all layers.
        streaming_problem: config -> why it cannot train in segments; None if it can.
        supports_padding: config -> whether texts of a batch may be padded to one length.
        sequence_problem: (config, tokens, packed=) -> why it cannot read a sequence of so many
            tokens, or one of packed documents; None if it can.
        tensor_parallel: (model, mesh, shard_sequence=) shards the model in place.
        check_divides: (config, ranks) raises ValueError where tensor parallelism cannot shard it.
        float32_blocks: model -> the blocks whose weights must stay float32 under bfloat16.
        stream: (model, prompts, max_new_tokens, ...) -> the next tokens of all prompts, in steps.
        hf_files: (config, dtype) -> {name: text} of the files that describe the model in a Hugging
            Face folder, config.json among them.
        hf_layout: values of a config.json -> where such a folder has the weights (`config`,
            `names`, `shapes`, `copies`, `problem` and `to_ours`, as `lasp.tnl.convert.WeightLayout`
            has); None for a folder of another family. Raises ValueError for one it cannot read.
    """

    config_class: type
    build: Callable[[Any], nn.Module]
    describe: Callable[[Any], str]
    num_parameters: Callable[[Any], int]
    flops_per_token: Callable[..., int]
    state_bytes: Callable[[Any], int]
    streaming_problem: Callable[[Any], str | None]
    supports_padding: Callable[[Any], bool]
    sequence_problem: Callable[..., str | None]
    tensor_parallel: Callable[..., nn.Module]
    check_divides: Callable[[Any, int], None]
    float32_blocks: Callable[[nn.Module], list[nn.Module]]
    stream: Callable[..., Iterator[Tensor]]
    hf_files: Callable[[Any, str], dict[str, str]]
    hf_layout: Callable[[Mapping[str, Any]], Any]


def _describe_tnl(config: TNLConfig) -> str:
    names = ("vocab_size", "dim", "num_layers", "num_heads", "glu_dim")
    text = ", ".join(f"{name} {getattr(config, name)}" for name in names)
    softmax = config.num_softmax_layers
    text += f", {softmax} of the layers softmax" if softmax else ""
    changed = config.variants() | ({} if config.decay == "fixed" else {"decay": config.decay})
    return text + "".join(f", {name} {value}" for name, value in changed.items())


def _tnl_state_bytes(config: TNLConfig) -> int:
    linear = [layer for layer in range(config.num_layers) if not config.is_softmax(layer)]
    return 4 * config.num_heads * sum(map(config.key_dim, linear)) * config.value_dim


FAMILIES = {
    "tnl": ModelFamily(
        config_class=TNLConfig,
        build=TNL,
        describe=_describe_tnl,
        num_parameters=TNLConfig.num_parameters,
        flops_per_token=TNLConfig.flops_per_token,
        state_bytes=_tnl_state_bytes,
        streaming_problem=TNLConfig.streaming_problem,
        supports_padding=lambda c: not (c.num_softmax_layers or c.position_embeddings),
        sequence_problem=TNLConfig.sequence_problem,
        tensor_parallel=tensor_parallel,
        check_divides=check_divides,
        float32_blocks=float32_blocks,
        stream=stream,
        hf_files=hf_files,
        hf_layout=hf_layout,
    )
}


def get_family(name: str) -> ModelFamily:
    """A row of the registry. Raises ConfigError if there is none of that name."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family is {name!r}: it must be one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def model_config(config: Config, tokenizer: Tokenizer | None) -> Any:
    """The family's preset, overridden by the tokenizer's vocabulary, by the file model.config, and
    by model.*, in rising precedence.

    Raises:
        ConfigError: an unknown family, preset or field, or a vocabulary that is too small for the
            tokenizer.
    """
    config_class = get_family(config.model.family).config_class
    overrides = {}
    if tokenizer is not None:
        overrides["vocab_size"] = -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if config.model.config is not None:
        overrides |= _read_model_file(Path(config.model.config), config_class)
    for field in dataclasses.fields(Model):
        value = getattr(config.model, field.name)
        if field.name not in ("family", "preset", "config") and value is not None:
            overrides[field.name] = value
    try:
        resolved = config_class.preset(config.model.preset, **overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None
    if tokenizer is not None and resolved.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {resolved.vocab_size}, the tokenizer has {tokenizer.vocab_size} "
            "tokens: leave model.vocab_size out, or make it at least that."
        )
    return resolved


def _read_model_file(path: Path, config_class: type) -> dict[str, Any]:
    """The fields of a model.config file, their types checked but not their values."""
    try:
        fields = read_json(path)
    except OSError as error:
        raise ConfigError(f"model.config {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"model.config {path} is not JSON: {error}.") from None
    check_field_types(fields, config_class, f"model.config {path}")
    return fields


def check_field_types(fields: Any, config_class: type, where: str) -> None:
    """Raise ConfigError, with `where`, if `fields` is no JSON object, or one of them has another
    type than in a model's config."""
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is not a JSON object of model fields.")
    hints = typing.get_type_hints(config_class)
    for name, value in fields.items():
        is_null = value is None and type(None) in typing.get_args(hints.get(name))
        if name in hints and not is_null:
            typed(value, hints[name], f"{where}: {name}")


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of the matmuls; None for the weights' own float32."""
    name = config.training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return None if name == "float32" else torch.bfloat16


def data_parallel_engine(config: Config, dims: ParallelDims) -> Literal["none", "ddp", "fsdp"]:
    """What sums gradients over ranks. None if no other rank has the same weights; DDP if each rank
    has full weights; else FSDP, the only one that can hold weights sharded by tp."""
    method = config.parallelism.data_parallel_method
    if dims.dp * dims.cp == 1:
        return "none"
    if method == "ddp" and dims.tp > 1:
        raise ConfigError(
            f"parallelism.data_parallel_method is ddp with tensor_parallel_degree {dims.tp}: DDP "
            "cannot hold sharded weights; use auto or fsdp."
        )
    if dims.tp > 1 or (method == "auto" and dims.dp_shard > 1):
        return "fsdp"
    return "fsdp" if method == "fsdp" and dims.dp_shard * dims.cp > 1 else "ddp"


def num_weight_shards(config: Config, dims: ParallelDims) -> int:
    """Ranks over which data parallelism shards the weights; 1 if each rank has them in full."""
    return dims.dp_shard * dims.cp if data_parallel_engine(config, dims) == "fsdp" else 1


class LossModel(nn.Module):
    """The model with its loss, so that data parallelism sees one forward."""

    def __init__(
        self, model: nn.Module, chunk_size: int, dtype: torch.dtype | None, compiled: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.compiled = compiled
        self._chunk_size = chunk_size
        self._dtype = dtype

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None,
        shard: SequenceShard,
        cu_seqlens: tuple[int, ...] | None,
        states: Any = None,
        per_token: bool = False,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        """Sum of the loss over this rank's tokens, a float32 scalar.

        Args:
            inputs, labels: [B, T] int64, T tokens of this rank's shard.
            cu_seqlens: document boundaries in the full sequence, (0, ..., tokens); None without.
            states: the sequence is a segment, and these are the model's states before it. Then the
                result is (loss, tensors of the states after it); with labels None, the loss is
                None, and what no state needs is not computed.
            per_token: the loss is that of each token, float32 [B, T], 0 where a label is ignored;
                under torch.no_grad.
            dropout_seeds: of a model with dropout, int64 [B]; None: as it does without.
        """
        options: dict[str, Any] = {}
        if cu_seqlens is not None:
            # Passed as a tuple because FSDP moves tensor arguments to the GPU, and the operator
            # reads these on the host.
            options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        if dropout_seeds is not None:
            options["dropout_seeds"] = dropout_seeds
        if states is not None:
            options |= dict(states=states, cut_documents=cu_seqlens is not None)
        with torch.autocast(inputs.device.type, self._dtype, enabled=self._dtype is not None):
            if labels is None:
                after = self.model(inputs, shard=shard, states_only=True, **options)
                return None, after.layers
            if states is None:
                hidden = self.model(inputs, shard=shard, return_hidden=True, **options)
                return self._loss(hidden, labels, per_token)
            hidden, after = self.model(
                inputs, shard=shard, return_hidden=True, return_states=True, **options
            )
            return self._loss(hidden, labels, per_token), after.layers

    def _loss(self, hidden: Tensor, labels: Tensor, per_token: bool) -> Tensor:
        return chunked_cross_entropy(
            hidden,
            self.model.head_weight,
            labels,
            ignore_index=IGNORE,
            chunk_size=self._chunk_size,
            compiled=self.compiled,
            per_token=per_token,
        )


def build_model(config: Config, ctx: DistContext, shape: Any) -> LossModel:
    """The model with its loss, as it is before data parallelism.

    Every rank draws all weights and then keeps its own, so that they are the same on any mesh.

    Args:
        shape: the model's config, of `model_config`.

    Raises:
        ConfigError: FP8 that this machine or this model cannot run, on every rank.
    """
    family = get_family(config.model.family)
    with ctx.device:
        model = family.build(shape)
    if config.float8.recipe_name is not None:
        convert_to_float8(model, config, ctx)
    if ctx.dims.tp > 1:
        shard_sequence = config.parallelism.tensor_parallel_shard_sequence
        family.tensor_parallel(model, ctx.mesh["tp"], shard_sequence=shard_sequence)
    check_float8_sizes(model, config.float8)
    checkpoint_blocks(model.blocks, config.activation_checkpoint.mode)
    compiled = config.compile.enable
    if compiled is None:
        compiled = ctx.device.type == "cuda"
    if compiled:
        # With rowwise scales, norms that a kernel keeps in float32 have led to NaN
        # (https://github.com/pytorch/pytorch/issues/150859).
        compile_blocks(model.blocks, precision_casts=config.float8.recipe_name == "rowwise")
    dtype = autocast_dtype(config, ctx.device)
    return LossModel(model, config.training.loss_chunk_size, dtype, compiled)


def convert_to_float8(model: nn.Module, config: Config, ctx: DistContext) -> None:
    """Let the blocks' linear layers compute in FP8, in place. Raises ConfigError."""
    float8, engine = config.float8, data_parallel_engine(config, ctx.dims)
    try:
        check_available(ctx.device, emulate=float8.emulate)
        convert_blocks(
            model.blocks,
            float8.recipe_name,
            skip=float8.filter_fqns,
            fsdp_all_gather=float8.enable_fsdp_float8_all_gather and engine == "fsdp",
            emulate=float8.emulate,
        )
    except ValueError as error:
        raise ConfigError(f"quantize.linear.float8: {error}") from None


def check_float8_sizes(model: nn.Module, float8: Float8) -> None:
    """Raise ConfigError if FP8 cannot multiply the weights that a rank holds."""
    if float8.recipe_name is None:
        return
    try:
        check_sizes(model.blocks, float8.filter_fqns)
    except ValueError as error:
        raise ConfigError(
            f"quantize.linear.float8: {error} (quantize.linear.float8.filter_fqns names those.)"
        ) from None


def apply_data_parallel(loss_model: LossModel, config: Config, ctx: DistContext) -> nn.Module:
    """The module that training calls: sharded in place (FSDP), wrapped (DDP), or `loss_model`."""
    reduce_dtype = getattr(torch, config.training.mixed_precision_reduce)
    engine = data_parallel_engine(config, ctx.dims)
    if engine == "fsdp":
        return shard(
            loss_model,
            sharding_mesh(ctx.mesh),
            blocks=loss_model.model.blocks,
            exact=get_family(config.model.family).float32_blocks(loss_model.model),
            param_dtype=autocast_dtype(config, ctx.device),
            reduce_dtype=reduce_dtype,
            reshard_after_forward=config.parallelism.fsdp_reshard_after_forward == "always",
        )
    if engine == "ddp":
        return replicate(loss_model, ctx.gradient_group, reduce_dtype=reduce_dtype)
    return loss_model
