"""The configuration: dataclasses, a TOML file, and command-line overrides, in rising precedence.

Every field is a flag: `training.seq_len` is `--training.seq_len` (or `--training.seq-len`). Names
follow torchtitan and flame.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from launch.errors import ConfigError

__all__ = [
    "STANDARD_LIBRARY_FOLDER",
    "Config",
    "check_sampling",
    "check_text",
    "load_config",
    "read_toml",
    "to_toml",
    "typed",
]

# Shared by all runs started from one folder.
STANDARD_LIBRARY_FOLDER = "data/stdlib"


@dataclass(kw_only=True)
class Job:
    config_file: Annotated[str | None, tyro.conf.arg(aliases=["--config"])] = None
    """TOML file; flags on the command line override what it says."""
    dump_folder: str = "outputs"
    """Everything the run writes goes below this folder."""
    dry_run: bool = False
    """Print the resolved config, the mesh, tokens per step, shards and memory; take no step."""
    dry_run_gpus: int = 0
    """Plan for a job of so many GPUs, on any machine. 0: for this job as it was started."""
    dry_run_gpu_memory: float = 80.0
    """GiB of each of them."""


@dataclass(kw_only=True)
class Model:
    preset: str = "tiny"
    """tiny, 385m, 1b or 7b."""
    config: str | None = None
    """JSON file with TNLConfig fields that override the preset."""
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


@dataclass(kw_only=True)
class Data:
    source: Literal["stdlib", "folder", "random"] = "stdlib"
    """stdlib: sources of this Python's standard library. folder: what launch/prepare_data.py wrote.
    random: random tokens, to measure speed."""
    folder: str | None = None
    """train.bin/.idx, val.bin/.idx, meta.json. None with stdlib: data/stdlib, made if missing."""


@dataclass(kw_only=True)
class Training:
    seq_len: int = 2048
    """Tokens of one GLOBAL sequence, before it is cut over context_parallel_degree ranks."""
    varlen: bool = False
    """Keep documents apart: the state resets at each document's start."""
    local_batch_size: Annotated[int, tyro.conf.arg(aliases=["--micro-batch-size"])] = 1
    """Sequences that one data-parallel rank holds at a time."""
    global_batch_size: int = -1
    """Sequences per step over all ranks; gradient accumulation follows from it. -1: none."""
    steps: int = 1000
    max_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""
    seed: int = 0
    """Of the initial weights and the sample order."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of matmuls and activations; weights stay float32. auto: bfloat16 on a GPU, float32 on
    a CPU."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype of gradients on the wire."""
    loss_chunk_size: int = 8192
    """Tokens whose logits exist at the same time."""
    max_nonfinite_steps: int = 3
    """Stop when this many tries of a step in a row give NaN or infinite loss or gradients."""


@dataclass(kw_only=True)
class Parallelism:
    data_parallel_replicate_degree: int = -1
    """Replicas of the model. -1: what the other degrees leave."""
    data_parallel_shard_degree: int = -1
    """Ranks that share one copy of the weights, cut over them. -1: what is left."""
    data_parallel_method: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every rank holds all weights. fsdp: weights, gradients and moments are cut over
    data_parallel_shard_degree x context_parallel_degree ranks, and ranks that -1 leaves go there.
    auto: fsdp where data_parallel_shard_degree or tensor_parallel_degree is above 1."""
    fsdp_reshard_after_forward: Literal["always", "never"] = "always"
    """always (ZeRO-3): a block's weights are gathered for its forward and again for its backward.
    never (ZeRO-1, -2): once for both, and kept in between."""
    fsdp_reduce_every_micro_batch: bool = False
    """Keep the sum of gradients cut during accumulation too: less memory, more traffic."""
    context_parallel_degree: Annotated[int, tyro.conf.arg(aliases=["--sp-size", "--cp-size"])] = 1
    """Ranks over which one sequence is cut. -1: all that the other degrees leave."""
    context_parallel_method: Literal["ring", "all_gather", "doubling", "auto"] = "ring"
    """How the d x d states cross ranks."""
    context_parallel_layout: Literal["contiguous", "zigzag"] = "contiguous"
    """zigzag: each rank holds a part of the sequence and its mirror image, so that all have equal
    work in softmax layers."""
    tensor_parallel_degree: int = 1
    """Ranks over which each layer is cut, by heads and channels."""
    tensor_parallel_shard_sequence: bool = False
    """Between the mixers, a tensor-parallel rank keeps its part of the tokens and not all (what
    Megatron calls sequence parallelism): less memory for the same bytes on the wire."""


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
    """Part of the steps over which the rate decays, at the end. None: all after the warm-up."""
    decay_type: Literal["cosine", "linear", "sqrt"] = "cosine"
    min_lr_factor: float = 0.1
    """The last step's rate as a part of the peak rate."""


@dataclass(kw_only=True)
class Checkpoint:
    enable: bool = True
    """False: nothing is saved, and a SIGTERM ends the run with code 143. Running again starts from
    scratch (an earlier metrics.jsonl is moved aside)."""
    folder: str = "checkpoint"
    """Below dump_folder."""
    interval: int = 500
    """Steps between checkpoints; the last step always makes one."""
    keep_latest_k: int = 3
    """Valid checkpoints to keep; 0: all."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: copy to host memory, and write the files while training goes on."""
    resume: str = "auto"
    """auto: the newest valid checkpoint, else from scratch. never. must: fail if there is none.
    PATH: that step folder."""


@dataclass(kw_only=True)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full"] = "none"
    """full: recompute each block in the backward (its state exchange is never repeated).
    selective: keep the results of its products and of its attention, recompute the rest."""
    offload: bool = False
    """Keep the blocks' inputs in host memory between forward and backward."""


@dataclass(kw_only=True)
class Compile:
    enable: bool | None = None
    """Compile blocks and loss with torch.compile, which takes 10 to 60 seconds at the first step.
    None: on a GPU."""


@dataclass(kw_only=True)
class Metrics:
    log_freq: int = 1
    """Steps between lines."""
    enable_tensorboard: bool = False
    enable_wandb: bool = False


@dataclass(kw_only=True)
class Validation:
    enable: bool = True
    freq: int = 500
    """Steps between validations; the last step always makes one."""
    steps: int = 10
    """Batches of global_batch_size sequences."""


@dataclass(kw_only=True)
class Sample:
    enable: bool = True
    """Print a sample of generated text at the end (needs a tokenizer)."""
    prompt: str = "def "
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0: the likeliest token every time."""
    top_k: int = 40
    """Sample among so many of the likeliest tokens; 0: all."""


@dataclass(kw_only=True)
class Profiling:
    enable_profiling: bool = False
    """Trace steps 5 to 7 into <dump_folder>/profiling."""
    enable_memory_snapshot: bool = False
    """Write the allocator's history of steps 5 to 7 there (GPU only)."""


@dataclass(kw_only=True)
class Comm:
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl where every local rank has a GPU, else gloo on CPUs."""
    init_timeout_seconds: int = 300
    """For start-up, the first step, checkpoints."""
    train_timeout_seconds: int = 100
    """For every later step. Long, as one step of a very long sequence may be; ranks meet a SIGTERM
    between steps, so lower it (or ask for more grace) where SIGKILL follows sooner than a step."""


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
        return Path(self.data.folder or STANDARD_LIBRARY_FOLDER)


def load_config(argv: list[str]) -> Config:
    """The config of a command line: defaults, then its --job.config_file, then its flags.

    Raises:
        ConfigError: a key, section, flag or value that does not exist or has the wrong type, and
            values that contradict each other.
    """
    config = Config()
    path = _config_file(argv)
    if path is not None:
        read_toml(config, Path(path))
    _refuse_unknown_flags(argv)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config = tyro.cli(Config, default=config, args=argv, prog="launch/train.py")
    except SystemExit as stop:
        # --help ends here too, with code 0 and its text on stdout.
        if not stop.code:
            raise
        raise ConfigError(_one_line(captured.getvalue())) from None
    _check(config)
    return config


def read_toml(config: Config, path: Path) -> None:
    """Write the values of a TOML file into `config`. Raises ConfigError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"job.config_file {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"job.config_file {path} is not TOML: {error}.") from None
    sections = [each.name for each in dataclasses.fields(Config)]
    for name, values in table.items():
        if name not in sections:
            raise ConfigError(f"{path}: unknown section [{name}]{_hint(name, sections, '[{}]')}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name} is a section: write [{name}] on a line of its own.")
        section = getattr(config, name)
        hints = typing.get_type_hints(type(section))
        for key, value in values.items():
            if key not in hints:
                keys = [f"{name}.{each}" for each in hints]
                raise ConfigError(
                    f"{path}: unknown key {name}.{key}{_hint(f'{name}.{key}', keys, '{}')}"
                )
            setattr(section, key, typed(value, hints[key], f"{path}: {name}.{key}"))


def to_toml(config: Config) -> str:
    """The resolved config as a TOML file that `--job.config_file` reads back."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        for key, value in dataclasses.asdict(getattr(config, section.name)).items():
            # TOML has no None: a missing key is the default, which None always is.
            if value is not None:
                lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    # JSON's spelling but for two things: TOML has no surrogate pairs, and DEL must be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _config_file(argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.replace("-", "_") in ("__job.config_file", "__config"):
            if equals:
                return value
            return argv[index + 1] if index + 1 < len(argv) else None
    return None


def _refuse_unknown_flags(argv: list[str]) -> None:
    """One sentence for a misspelt flag, where tyro would print the help of all that resemble it."""
    known = ["--help"]
    for section in dataclasses.fields(Config):
        hints = typing.get_type_hints(section.default_factory, include_extras=True)
        for key, annotation in hints.items():
            known.append(f"--{section.name}.{key}")
            if annotation is bool:
                known.append(f"--{section.name}.no_{key}")
            for extra in getattr(annotation, "__metadata__", ()):
                known += extra.aliases or ()
    spelt = {flag.replace("-", "_") for flag in known}
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag.replace("-", "_") not in spelt:
            raise ConfigError(f"unknown flag {flag}{_hint(flag, known, '{}', 'see --help.')}")


def _hint(name: str, known: list[str], form: str, otherwise: str | None = None) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {form.format(close[0])}?"
    return f"; {otherwise or 'known: ' + ', '.join(map(form.format, known)) + '.'}"


def typed(value: Any, annotation: Any, where: str) -> Any:
    """`value` if it fits `annotation` (an int fits a float), else ConfigError."""
    options = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    for option in options:
        if typing.get_origin(option) is Annotated:
            option = typing.get_args(option)[0]
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and type(value) in (int, float):
            return float(value)
        elif option is not types.NoneType and type(value) is option:
            return value
    raise ConfigError(f"{where} is {value!r}, must be {_describe(options)}.")


def _describe(options: tuple[Any, ...]) -> str:
    words = []
    for option in options:
        if typing.get_origin(option) is Literal:
            words.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        elif option is not types.NoneType:
            words.append(
                {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[
                    option
                ]
            )
    return " or ".join(words)


# What tyro says of values, in the words of `typed`.
_CLEARER = {
    r"^Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)$": (
        r"\1 is \2, must be a whole number."
    ),
    r"^Error parsing (\S+): could not convert string to float: (.*)$": (
        r"\1 is \2, must be a number."
    ),
    r"^Error parsing (\S+): no type matching .* from \[(.*?)\]\. .*invalid literal for int.*$": (
        r"\1 is \2, must be a whole number."
    ),
    r"^Error parsing (\S+): no type matching .* from \[(.*?)\]\. .*string to float.*$": (
        r"\1 is \2, must be a number."
    ),
    r"^Unrecognized options: (.*)$": r"unknown argument \1: flags begin with --, see --help.",
}


def _one_line(box: str) -> str:
    """The sentence in tyro's framed message: between the title and the help of the flag."""
    rows = [line.strip(" \u2502\u256d\u256e\u2570\u256f\u2500") for line in box.splitlines()]
    text = " ".join(row for row in rows[1:] if row)
    text = text.split(" Argument helptext:")[0].split(" For full helptext")[0]
    for theirs, ours in _CLEARER.items():
        text = re.sub(theirs, ours, text)
    return text


def _check(config: Config) -> None:
    """Refuse what no run can mean, whatever the number of processes."""
    at_least = {
        1: (
            "training.seq_len training.local_batch_size training.steps training.loss_chunk_size "
            "training.max_nonfinite_steps "
            "parallelism.tensor_parallel_degree checkpoint.interval metrics.log_freq "
            "validation.freq validation.steps comm.init_timeout_seconds comm.train_timeout_seconds"
        ),
        0: (
            "job.dry_run_gpus job.dry_run_gpu_memory training.max_norm training.seed optimizer.lr "
            "optimizer.weight_decay optimizer.eps lr_scheduler.warmup_steps "
            "lr_scheduler.min_lr_factor checkpoint.keep_latest_k"
        ),
    }
    for bound, names in at_least.items():
        for name in names.split():
            section, key = name.split(".")
            value = getattr(getattr(config, section), key)
            # Written so that NaN is refused too.
            if not value >= bound:
                raise ConfigError(f"{name} is {value}: it must be at least {bound}.")
    if config.job.dry_run_gpus > 1 << 16:
        raise ConfigError(
            f"job.dry_run_gpus is {config.job.dry_run_gpus}: a plan is for 65536 at most."
        )
    _check_values(config)
    if config.training.seed >= 1 << 63:
        raise ConfigError(f"training.seed is {config.training.seed}: it must be below 2^63.")
    wanted = config.sample
    check_sampling("sample.", wanted.max_new_tokens, wanted.temperature, wanted.top_k)
    batch = config.training.global_batch_size
    if batch != -1 and batch < 1:
        raise ConfigError(
            f"training.global_batch_size is {batch}: it must be at least 1 sequence, or -1."
        )
    for name in ("beta1", "beta2"):
        value = getattr(config.optimizer, name)
        if not 0 <= value < 1:
            raise ConfigError(f"optimizer.{name} is {value}: it must be in 0 <= {name} < 1.")
    ratio = config.lr_scheduler.decay_ratio
    if ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"lr_scheduler.decay_ratio is {ratio}: it must be in 0..1.")
    if config.parallelism.context_parallel_layout == "zigzag" and config.training.seq_len % 2:
        raise ConfigError(
            f"training.seq_len is {config.training.seq_len}: it must be even for "
            "parallelism.context_parallel_layout zigzag, where a rank holds two equal parts."
        )
    if config.data.source == "folder" and config.data.folder is None:
        raise ConfigError("data.source is folder: say which one with --data.folder.")
    _check_recomputation(config)


def _check_recomputation(config: Config) -> None:
    if config.activation_checkpoint.offload and config.activation_checkpoint.mode == "none":
        raise ConfigError(
            "activation_checkpoint.offload moves the inputs of recomputed blocks, and mode is "
            "none: use --activation_checkpoint.mode full or selective."
        )


def _check_values(config: Config) -> None:
    """Refuse numbers and text that no file could hold: infinities, and broken UTF-8."""
    for section, values in dataclasses.asdict(config).items():
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{section}.{key} is {value}: it must be a finite number.")
            if isinstance(value, str):
                check_text(f"{section}.{key}", value)


def check_text(name: str, text: str) -> None:
    """Raise ConfigError if `text`, from a command line, holds bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{name} {text!r} is not UTF-8: give text in that encoding.") from None


def check_sampling(prefix: str, max_new_tokens: int, temperature: float, top_k: int) -> None:
    """Raise ConfigError for options that text cannot be sampled with.

    Args:
        prefix: stands before an option's name in the message.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if value < 0:
            raise ConfigError(f"{prefix}{name} is {value}: it must be at least 0.")
    # Logits are divided by it, in float32.
    if temperature != 0 and not 1e-6 <= temperature < math.inf:
        raise ConfigError(
            f"{prefix}temperature is {temperature}: it must be 0 (the likeliest token every time), "
            "or a number of at least 1e-6."
        )
