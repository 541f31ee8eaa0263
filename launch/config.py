"""The configuration: defaults, a TOML file, and command-line flags, each overriding the one before.

Every field is a flag: `training.seq_len` is `--training.seq_len` (or `--training.seq-len`). Names
follow torchtitan and flame.
"""

import dataclasses
import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from launch.command_line import parse
from launch.exit_codes import ConfigError
from launch.toml_config import flat, read_toml

# Shared by all runs started from one folder.
STANDARD_LIBRARY_FOLDER = "data/stdlib"
# Settings of earlier versions: rejected with an explanation unless disabled.
_REMOVED = {
    "activation_checkpoint.offload": (
        "block inputs are no longer kept in host memory; use activation_checkpoint.mode full, or "
        "more ranks (parallelism.context_parallel_degree)"
    )
}


@dataclass(kw_only=True)
class Job:
    config_file: Annotated[str | None, tyro.conf.arg(aliases=["--config"])] = None
    """TOML file; flags on the command line override it."""
    dump_folder: str = "outputs"
    """All output of the run goes to this folder."""
    dry_run: bool = False
    """Print the resolved config, the mesh, tokens per step, shards and memory; take no step."""
    dry_run_gpus: int = 0
    """Simulate a job of this many GPUs, on any machine. 0: this job as it was started."""
    dry_run_gpus_per_host: int = 0
    """GPUs of each simulated host, to see which degrees cross hosts. 0: all are in one host."""
    dry_run_gpu_memory: float = 80.0
    """GiB of each simulated GPU."""


@dataclass(kw_only=True)
class Model:
    family: str = "tnl"
    """A row of the registry in launch/build.py."""
    preset: str = "tiny"
    """tiny, 385m, 1b or 7b."""
    config: str | None = None
    """JSON file with fields of the model's config that override the preset."""
    vocab_size: int | None = None
    """None: the tokenizer's vocabulary, rounded up to a multiple of 64."""
    dim: int | None = None
    """Width. None: the preset's, as for the fields below."""
    num_layers: int | None = None
    num_heads: int | None = None
    glu_dim: int | None = None
    layer_types: str | None = None
    """L: linear attention, S: softmax attention, from the first layer on; repeated until there are
    num_layers. LLLLLLLS is a hybrid, S a transformer of the same shape."""
    num_key_value_heads: int | None = None
    """Heads of keys and values in softmax layers."""
    decay: Literal["fixed", "learned", "per_head", "none"] | None = None
    """Of linear layers. fixed: a constant per head and layer. learned: one per token and head,
    computed from the layer's input; it starts at the fixed one. per_head: a constant per head."""
    position_embeddings: int | None = None
    """Rows of a learned table of absolute positions: the longest sequence. 0: no table."""
    activation: Literal["silu", "none", "1+elu"] | None = None
    """Of queries and keys in linear layers."""
    glu_activation: Literal["none", "silu", "1+elu"] | None = None
    """Of the channel mixer."""
    norm: Literal["srms", "rms", "layer"] | None = None
    """Every norm: srms has no weights, rms a weight, layer a weight and a bias."""
    output_gate: bool | None = None
    """Linear layers multiply the output of attention by a projection of their input."""
    denominator: bool | None = None
    """Linear layers divide the output of attention by the sum of its weights, instead of norming
    it. Requires activation 1+elu."""
    dropout: float | None = None
    """Probability of dropout on the embeddings and on each mixer's output."""


@dataclass(kw_only=True)
class Data:
    source: Literal["stdlib", "folder", "random"] = "stdlib"
    """stdlib: sources of this Python's standard library. folder: output of launch/prepare_data.py.
    random: random tokens, to measure speed."""
    folder: str | None = None
    """Holds train.bin/.idx, val.bin/.idx and meta.json. None with stdlib: data/stdlib, created if
    missing."""
    folders: tuple[tuple[str, float], ...] = ()
    """Several folders, each with its share of the samples: a weight of any scale. On the command
    line: --data.folders data/code 0.7 data/books 0.3."""
    verify: bool = False
    """Check the digests of all files before the first step. False: files of more than 2^28 tokens
    are checked block by block, when first read."""


@dataclass(kw_only=True)
class Training:
    seq_len: int = 2048
    """Tokens of one GLOBAL sequence, before it is sharded over context_parallel_degree ranks."""
    segment_len: int = 0
    """Process each sequence in segments of this many tokens, so that memory does not grow with
    seq_len. 0: whole sequences."""
    segment_gradient: Literal["exact", "truncated"] = "exact"
    """exact: gradients are those of the whole sequence, at the cost of a second forward. truncated:
    no gradient crosses from a segment to the one before."""
    segment_states: Literal["host", "device"] = "host"
    """Where the states between segments are kept until the backward."""
    carry_state: bool = False
    """Start each step from the states at the end of the step before, and read on where it stopped;
    for segment_gradient truncated."""
    varlen: bool = False
    """Keep documents apart: the state resets at the start of each document."""
    local_batch_size: Annotated[int, tyro.conf.arg(aliases=["--micro-batch-size"])] = 1
    """Sequences that a data-parallel rank processes at a time."""
    global_batch_size: int = -1
    """Sequences per step over all ranks; determines gradient accumulation. -1: no accumulation."""
    steps: int = 1000
    max_norm: float = 1.0
    """Clip gradients to this norm; 0: do not clip."""
    seed: int = 0
    """Determines the initial weights and the sample order."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of matmuls and activations; weights stay float32. auto: bfloat16 on a GPU, float32 on
    a CPU."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are reduced over ranks."""
    loss_chunk_size: int = 8192
    """Tokens whose logits are in memory at the same time."""
    max_nonfinite_steps: int = 3
    """Stop after this many tries in a row with NaN or infinite loss or gradients."""

    @property
    def forward_len(self) -> int:
        """Tokens of a forward over all ranks that share a sequence: a segment, or the sequence."""
        return min(self.segment_len or self.seq_len, self.seq_len)

    @property
    def num_segments(self) -> int:
        """Segments of a sequence, of which the last may be shorter; 1 without segments."""
        return -(-self.seq_len // self.forward_len)


@dataclass(kw_only=True)
class Parallelism:
    data_parallel_replicate_degree: int = -1
    """Replicas of the model. -1: all ranks that the other degrees leave."""
    data_parallel_shard_degree: int = -1
    """Ranks over which the weights are sharded. -1: the remaining ranks."""
    data_parallel_method: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every rank holds full weights. fsdp: weights, gradients and moments are sharded over
    data_parallel_shard_degree x context_parallel_degree ranks, and a degree of -1 goes there first.
    auto: fsdp if data_parallel_shard_degree or tensor_parallel_degree is above 1."""
    fsdp_reshard_after_forward: Literal["always", "never"] = "always"
    """always (ZeRO-3): a block's weights are gathered for its forward and again for its backward.
    never (ZeRO-1, -2): once for both, and kept in between."""
    fsdp_reduce_every_micro_batch: bool = False
    """Shard gradients during accumulation too: less memory, more traffic."""
    context_parallel_degree: Annotated[int, tyro.conf.arg(aliases=["--sp-size", "--cp-size"])] = 1
    """Ranks over which each sequence is sharded. -1: all that the other degrees leave."""
    context_parallel_method: Literal["ring", "all_gather", "doubling", "auto"] = "ring"
    """How the d x d states cross ranks."""
    context_parallel_layout: Literal["contiguous", "zigzag"] = "contiguous"
    """zigzag: each rank holds two chunks, one from each end of the sequence, so that all ranks have
    equal work in softmax layers."""
    tensor_parallel_degree: int = 1
    """Ranks over which each layer is sharded, by heads and channels."""
    tensor_parallel_shard_sequence: bool = False
    """Between the mixers, a tensor-parallel rank keeps its share of the tokens instead of all (what
    Megatron calls sequence parallelism): less memory, the same traffic."""


@dataclass(kw_only=True)
class Optimizer:
    name: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only."""


@dataclass(kw_only=True)
class LRScheduler:
    warmup_steps: int = 100
    decay_ratio: float | None = None
    """Fraction of the steps, at the end, over which the rate decays. None: all after warm-up."""
    decay_type: Literal["cosine", "linear", "sqrt", "inverse_sqrt"] = "cosine"
    """inverse_sqrt: the peak times sqrt(warmup_steps / step), whatever the number of steps."""
    min_lr_factor: float = 0.1
    """The last step's rate as a fraction of the peak rate; with inverse_sqrt the lowest rate."""


@dataclass(kw_only=True)
class Checkpoint:
    enable: bool = True
    """False: nothing is saved, and SIGTERM, SIGINT or SIGHUP end the run with code 143. The next
    run starts from scratch (an earlier metrics.jsonl is moved aside)."""
    folder: str = "checkpoint"
    """Relative to dump_folder."""
    interval: int = 500
    """Steps between checkpoints; the last step always saves one."""
    keep_latest_k: int = 3
    """Valid checkpoints to keep; 0: all."""
    max_failed_saves: int = 3
    """Stop after so many checkpoints in a row that could not be written; 0: never."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: copy to host memory, and write the files while training goes on."""
    resume: str = "auto"
    """auto: the newest valid checkpoint, else from scratch. never. must: fail if there is none.
    PATH: that step folder."""
    allow_changes: bool = False
    """Resume even if model, data, tokenizer or another fixed setting is not that of the checkpoint
    (docs/training.md lists them). False: such a checkpoint is refused."""


@dataclass(kw_only=True)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full"] = "none"
    """full: recompute each block in the backward (its state exchange is never repeated).
    selective: keep the results of matrix products and attention, recompute the rest."""


@dataclass(kw_only=True)
class Compile:
    enable: bool | None = None
    """Compile blocks and loss with torch.compile; adds 10 to 60 seconds to the first step. None:
    only on a GPU."""


@dataclass(kw_only=True)
class Float8:
    recipe_name: Literal["tensorwise", "rowwise"] | None = None
    """Products of the blocks' linear layers in FP8 (needs torchao and sm_89 or newer); weights stay
    float32. tensorwise: one scale per tensor; rowwise: per row, slower. None: no FP8."""
    enable_fsdp_float8_all_gather: bool = False
    """FSDP gathers the weights of these layers in FP8. tensorwise only."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """With the above: the scales of all weights by one reduction per step."""
    filter_fqns: tuple[str, ...] = ()
    """Layers whose name contains one of these stay as they are, such as out_proj or blocks.0."""
    emulate: bool = False
    """Round operands to FP8 and multiply in float32, on any device: slow, for tests."""


@dataclass(kw_only=True)
class QuantizeLinear:
    float8: Float8 = field(default_factory=Float8)


@dataclass(kw_only=True)
class Quantize:
    linear: QuantizeLinear = field(default_factory=QuantizeLinear)


@dataclass(kw_only=True)
class Metrics:
    log_freq: int = 1
    """Steps between printed lines."""
    enable_tensorboard: bool = False
    enable_wandb: bool = False


@dataclass(kw_only=True)
class Validation:
    enable: bool = True
    freq: int = 500
    """Steps between validations; the last step always validates."""
    steps: int = 10
    """Batches of global_batch_size sequences."""


@dataclass(kw_only=True)
class Sample:
    enable: bool = True
    """Print generated text at the end (needs a tokenizer)."""
    prompt: str = "def "
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0: always the most likely token."""
    top_k: int = 40
    """Sample among this many most likely tokens; 0: all."""


@dataclass(kw_only=True)
class Profiling:
    enable_profiling: bool = False
    """Trace steps 5 to 7 into <dump_folder>/profiling."""
    enable_memory_snapshot: bool = False
    """Write the allocator's history of steps 5 to 7 there (GPU only)."""


@dataclass(kw_only=True)
class Comm:
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl if every local rank has a GPU, else gloo on CPUs."""
    init_timeout_seconds: int = 300
    """For start-up, the first step, validation, checkpoints and the final sample."""
    train_timeout_seconds: int = 100
    """For every later step. A step of a very long sequence takes long. Ranks agree to stop between
    steps, so lower this (or allow more time) where SIGKILL follows SIGTERM sooner than a step."""


@dataclass(kw_only=True)
class Config:
    """The configuration of a training run, section by section."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    metrics: Metrics = field(default_factory=Metrics)
    validation: Validation = field(default_factory=Validation)
    sample: Sample = field(default_factory=Sample)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.job.dump_folder, self.checkpoint.folder)

    @property
    def data_folder(self) -> Path:
        """The only folder of the data; not with data.folders."""
        return Path(self.data.folder or STANDARD_LIBRARY_FOLDER)

    @property
    def data_folders(self) -> list[tuple[Path, float]]:
        """All folders of the data, with their weights."""
        if self.data.folders:
            return [(Path(folder), weight) for folder, weight in self.data.folders]
        return [(self.data_folder, 1.0)]

    @property
    def float8(self) -> Float8:
        return self.quantize.linear.float8


def load_config(argv: list[str]) -> Config:
    """The config of a command line: defaults, then its --job.config_file, then its flags.

    Raises:
        ConfigError: a key, section, flag or value that does not exist or has the wrong type, and
            values that contradict each other.
    """
    config = Config()
    path = _config_file(argv)
    if path is not None:
        read_toml(config, Path(path), _REMOVED)
    for name, reason in _REMOVED.items():
        section, _, option = name.rpartition(".")
        flags = (f"__{name}", f"__{section}.no_{option}")
        if any(each.replace("-", "_").startswith(flags) for each in argv):
            raise ConfigError(f"--{name} was removed: {reason}.")
    config = parse(Config, argv, "launch/train.py", default=config)
    _check(config)
    return config


def _config_file(argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.replace("-", "_") in ("__job.config_file", "__config"):
            if equals:
                return value
            return argv[index + 1] if index + 1 < len(argv) else None
    return None


_AT_LEAST = {
    1: (
        "training.seq_len training.local_batch_size training.steps training.loss_chunk_size "
        "training.max_nonfinite_steps parallelism.tensor_parallel_degree checkpoint.interval "
        "metrics.log_freq validation.freq validation.steps comm.init_timeout_seconds "
        "comm.train_timeout_seconds"
    ),
    0: (
        "job.dry_run_gpus job.dry_run_gpus_per_host job.dry_run_gpu_memory training.segment_len "
        "training.max_norm training.seed optimizer.lr optimizer.weight_decay optimizer.eps "
        "lr_scheduler.warmup_steps lr_scheduler.min_lr_factor checkpoint.keep_latest_k "
        "checkpoint.max_failed_saves"
    ),
}

_PATHS = (
    "job.config_file",
    "job.dump_folder",
    "model.config",
    "data.folder",
    "data.folders",
    "checkpoint.folder",
    "checkpoint.resume",
)


def _check(config: Config) -> None:
    """Raise ConfigError for values that are wrong for any number of processes."""

    def require(condition: bool, name: str, rule: str) -> None:
        section, _, key = name.partition(".")
        if not condition:
            raise ConfigError(f"{name} is {getattr(getattr(config, section), key)}: {rule}.")

    training, sample, ratio = config.training, config.sample, config.lr_scheduler.decay_ratio
    for bound, names in _AT_LEAST.items():
        for name in names.split():
            section, key = name.split(".")
            value = getattr(getattr(config, section), key)
            # False for NaN too.
            require(value >= bound, name, f"it must be at least {bound}")
            require(value < math.inf, name, "it must be a finite number")
    require(config.job.dry_run_gpus <= 1 << 16, "job.dry_run_gpus", "it must be at most 65536")
    gpus, per_host = config.job.dry_run_gpus, config.job.dry_run_gpus_per_host
    require(
        not per_host or (gpus > 0 and gpus % per_host == 0),
        "job.dry_run_gpus_per_host",
        f"job.dry_run_gpus, which is {gpus}, must be a multiple of it",
    )
    require(training.seed < 1 << 63, "training.seed", "it must be below 2^63")
    check_sampling("sample.", sample.max_new_tokens, sample.temperature, sample.top_k)
    batch = training.global_batch_size
    require(
        batch == -1 or batch >= 1,
        "training.global_batch_size",
        "it must be at least 1 sequence, or -1",
    )
    require(0 <= config.optimizer.beta1 < 1, "optimizer.beta1", "it must be in 0 <= beta1 < 1")
    require(0 <= config.optimizer.beta2 < 1, "optimizer.beta2", "it must be in 0 <= beta2 < 1")
    require(ratio is None or 0 <= ratio <= 1, "lr_scheduler.decay_ratio", "it must be in 0..1")
    require(
        ratio is None or config.lr_scheduler.decay_type != "inverse_sqrt",
        "lr_scheduler.decay_ratio",
        "leave it out for decay_type inverse_sqrt, which decays from the warm-up on",
    )
    for name, length in (("seq_len", training.seq_len), ("segment_len", training.segment_len)):
        require(
            config.parallelism.context_parallel_layout != "zigzag" or length % 2 == 0,
            f"training.{name}",
            "it must be even for parallelism.context_parallel_layout zigzag, where a rank holds "
            "two chunks of equal length",
        )
    require(
        not training.carry_state
        or (training.segment_len > 0 and training.segment_gradient == "truncated"),
        "training.carry_state",
        "it needs training.segment_gradient truncated and a training.segment_len (that of a whole "
        "sequence is training.seq_len)",
    )
    for name, values in flat(dataclasses.asdict(config)).items():
        for value in _items(values):
            if isinstance(value, str):
                check = check_path if name in _PATHS else check_text
                check(name, value)
            if type(value) is int and not -(1 << 63) <= value < 1 << 63:
                raise ConfigError(f"{name} is {value}: it must be below 2^63.")
    _check_float8(config.float8)
    _check_data(config)


def _check_data(config: Config) -> None:
    data = config.data
    if data.source == "folder" and data.folder is None and not data.folders:
        raise ConfigError("data.source is folder: say which one with --data.folder.")
    if not data.folders:
        return
    if data.source != "folder" or data.folder is not None:
        given = "data.source is " + data.source if data.folder is None else "data.folder is given"
        raise ConfigError(
            f"data.folders is given and {given}: it needs data.source folder, and stands for "
            "data.folder."
        )
    if config.training.carry_state:
        raise ConfigError(
            "training.carry_state reads one folder from its beginning to its end, and data.folders "
            "mixes several: give data.folder, prepared from all inputs together."
        )
    named = set()
    for folder, weight in data.folders:
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"data.folders gives {folder} the weight {weight}: it must be a number above 0 "
                "(to leave a folder out, do not name it)."
            )
        if Path(folder) in named:
            raise ConfigError(
                f"data.folders names {folder} twice: name it once, with the sum of the weights."
            )
        named.add(Path(folder))


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from _items(each)
    else:
        yield value


def _check_float8(float8: Float8) -> None:
    if float8.recipe_name == "rowwise" and float8.enable_fsdp_float8_all_gather:
        raise ConfigError(
            "quantize.linear.float8.enable_fsdp_float8_all_gather is set with recipe_name rowwise: "
            "weights are gathered in FP8 only with recipe_name tensorwise."
        )
    others = dataclasses.replace(float8, recipe_name=None, emulate=False)
    if float8.recipe_name is None and others != Float8():
        raise ConfigError(
            "quantize.linear.float8 is set up but not switched on: give "
            "quantize.linear.float8.recipe_name (tensorwise or rowwise)."
        )


def check_text(name: str, text: str) -> None:
    """Raise ConfigError if `text`, from a command line, holds bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{name} {text!r} is not UTF-8: give text in that encoding.") from None


def check_path(name: str, path: Path | str | None) -> None:
    """Raise ConfigError if `path` cannot be one: it is too long, has a NUL byte, or bytes that are
    not UTF-8."""
    check_text(name, str(path))
    if "\0" in str(path):
        raise ConfigError(f"{name} {str(path)!r} has a NUL byte, which no path can have.")
    try:
        os.lstat(str(path))
    except OSError as error:
        # Others are for those who read or write it.
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{name} {str(path)[:40]}... is too long for a path: {len(str(path))} characters."
            ) from None


def check_sampling(prefix: str, max_new_tokens: int, temperature: float, top_k: int) -> None:
    """Raise ConfigError for invalid sampling options; `prefix` precedes their names."""
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if value < 0:
            raise ConfigError(f"{prefix}{name} is {value}: it must be at least 0.")
    # Logits are divided by it in float32.
    if temperature != 0 and not 1e-6 <= temperature < math.inf:
        raise ConfigError(
            f"{prefix}temperature is {temperature}: it must be 0 (always the most likely token), "
            "or a number of at least 1e-6."
        )
