"""Continue prompts with a trained model.

    python launch/generate.py --checkpoint outputs/quickstart/checkpoint --prompt "def "
    python launch/generate.py --checkpoint ... --prompts questions.jsonl --stats
    torchrun --nproc_per_node 2 launch/generate.py --checkpoint ... --prompts book.txt

A checkpoint has all that is needed: weights, model config and tokenizer. The text of one prompt is
printed as it grows; those of a .jsonl file are printed as lines of JSON, batch by batch. Several
processes read a long prompt together, each a part of it, or share each layer
(--tensor_parallel_degree).
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from launch.build import ModelFamily
from launch.checkpoint.saved_run import SavedRun
from launch.checkpoint.store import open_checkpoint
from launch.command_line import parse
from launch.config import Config, check_path, check_sampling, check_text
from launch.distributed import (
    DistContext,
    from_environment,
    get_rank_info,
    open_dist_context,
    refuse_start,
    report_error,
)
from launch.documents import LINES
from launch.exit_codes import CheckpointError, ConfigError, DataError, UserError
from launch.files import parse_json, read_text
from launch.tokenizer import Tokenizer
from parallel.compile import compile_blocks

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Arguments:
    """Continue prompts with a trained model."""

    checkpoint: Path
    """A step folder, or the folder of a run's checkpoints (its newest valid one is taken)."""
    prompt: str = "def "
    prompts: Path | None = None
    """A file instead: of .jsonl, the "prompt" of each line; else its text is one prompt."""
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0: always the most likely token."""
    top_k: int = 40
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens whose probabilities sum to this; 1: all."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, cuda:N. auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. auto: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: int = 16
    """Prompts that are continued together."""
    prefill_chunk: int = 0
    """Tokens of a prompt read at a time (by each rank). 0: 32,768 on a GPU, 2,048 on a CPU."""
    compile: bool = False
    """Compile the reading of prompts: worth its seconds from some million tokens on."""
    tensor_parallel_degree: int = 1
    """Processes that share each layer. The others read a prompt together."""
    stats: bool = False
    """Print times, tokens per second and memory to stderr at the end."""


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, ModelFamily, Tokenizer]:
    """The model of a checkpoint, its family, and its tokenizer. Raises CheckpointError."""
    saved = SavedRun.read(open_checkpoint(path))
    if saved.tokenizer is None:
        raise CheckpointError(
            f"{saved.checkpoint.path} was trained on random tokens, without a tokenizer: there is "
            "no text to continue."
        )
    saved.weights()
    with device:
        model = saved.family.build(saved.shape)
    saved.load_weights(model)
    return model.eval(), saved.family, saved.tokenizer


class TextStream:
    """The text of tokens that come one by one, without characters that are not complete."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        # Decoded again with every token, because a character may lie across tokens.
        self._start = max(0, len(tokens) - 8)
        self._done = self._tokenizer.decode(tokens[self._start :])

    def add(self, token: int) -> str:
        """The text that `token` completes."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens[self._start :])
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._done) :]
        self._start = max(0, len(self._tokens) - 8)
        self._done = self._tokenizer.decode(self._tokens[self._start :])
        return new

    def finish(self) -> str:
        """What is left, complete or not."""
        return self._tokenizer.decode(self._tokens[self._start :])[len(self._done) :]


def continuations(
    model: nn.Module,
    family: ModelFamily,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float = 1.0,
    seed: int,
    **options: Any,
) -> Iterator[list[int | None]]:
    """The next token of every prompt, again and again; None after an end of document.

    Raises:
        ConfigError: an option that the family's `stream` refuses.
    """
    device = model.head_weight.device
    finished = [False] * len(prompts)
    try:
        steps = family.stream(
            model,
            [torch.tensor(each, device=device) for each in prompts],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k or None,
            top_p=None if top_p == 1 else top_p,
            eos_token_id=tokenizer.eod_id,
            generator=torch.Generator(device).manual_seed(seed),
            **options,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for step in steps:
        tokens = step.tolist()
        finished = [
            old or token == tokenizer.eod_id for old, token in zip(finished, tokens, strict=True)
        ]
        yield [None if end else token for end, token in zip(finished, tokens, strict=True)]


def sample_text(
    model: nn.Module, family: ModelFamily, tokenizer: Tokenizer, prompt: str, **options: Any
) -> str:
    """The prompt and its continuation, up to an end of document; options as of `continuations`.

    Raises:
        ConfigError: an option that the family's `stream` refuses.
    """
    tokens = encode(tokenizer, prompt)
    new = continuations(model, family, tokenizer, [tokens], **options)
    # Decoded together: a character may lie across the end of the prompt.
    return tokenizer.decode(tokens + [token for (token,) in new if token is not None])


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    # An empty prompt is the start of a document, which follows the end of another.
    return tokenizer.encode(prompt).tolist() or [tokenizer.eod_id]


def find_device(name: str) -> torch.device:
    """The device called `name`. Raises ConfigError if there is none."""
    gpus = _gpus()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}: give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"device is {name}, but this machine has {gpus} GPUs: give cpu or auto.")
    return device


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    try:
        arguments = parse(Arguments, argv, "launch/generate.py")
        _check(arguments)
        config = _parallel_config(arguments)
        info = get_rank_info(config)
        # One process may choose its GPU.
        device = info.device if info.dims.world_size > 1 else find_device(arguments.device)
    except UserError as error:
        return report_error(refuse_start(error))
    # A host may mount files elsewhere.
    given = {
        f"--{name}": value
        for name, value in dataclasses.asdict(arguments).items()
        if name not in ("checkpoint", "prompts")
    }
    try:
        with open_dist_context(info, config, given) as ctx:
            _run(arguments, device, ctx)
    except UserError as error:
        return report_error(error)
    return 0


def _check(arguments: Arguments) -> None:
    check_text("prompt", arguments.prompt)
    check_path("checkpoint", arguments.checkpoint)
    check_path("prompts", arguments.prompts)
    check_sampling("", arguments.max_new_tokens, arguments.temperature, arguments.top_k)
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"top_p is {arguments.top_p}: it must be in 0 < top_p <= 1.")
    if not 0 <= arguments.seed < 1 << 63:
        raise ConfigError(f"seed is {arguments.seed}: it must be at least 0 and below 2^63.")
    for name, least in (("batch_size", 1), ("prefill_chunk", 0), ("tensor_parallel_degree", 1)):
        value = getattr(arguments, name)
        if value < least:
            raise ConfigError(f"{name} is {value}: it must be at least {least}.")
    ranks = from_environment("WORLD_SIZE", 1, minimum=1)
    if ranks % arguments.tensor_parallel_degree:
        raise ConfigError(
            f"tensor_parallel_degree is {arguments.tensor_parallel_degree}, which does not divide "
            f"{ranks} processes: start a multiple of it with torchrun --nproc_per_node."
        )


def _parallel_config(arguments: Arguments) -> Config:
    """The launcher's config for the processes that torchrun has started."""
    config = Config()
    config.parallelism.context_parallel_degree = -1
    config.parallelism.tensor_parallel_degree = arguments.tensor_parallel_degree
    if arguments.device == "cpu":
        config.comm.backend = "gloo"
    return config


def _run(arguments: Arguments, device: torch.device, ctx: DistContext) -> None:
    began = time.perf_counter()
    texts = ctx.all_or_raise(lambda: _prompts(arguments))
    model, family, tokenizer = ctx.all_or_raise(lambda: load_model(arguments.checkpoint, device))
    name = arguments.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    model = model.to(_DTYPES[name])
    if ctx.dims.tp > 1:
        try:
            family.tensor_parallel(model, ctx.mesh["tp"])
        except ValueError as error:
            ctx.fail(ConfigError(str(error)))
    if arguments.compile:
        compile_blocks(model.blocks)
    stats = Stats(device, time.perf_counter() - began)
    prompts = [encode(tokenizer, text) for text in texts]
    size = arguments.batch_size if ctx.cp_group is None else 1
    seeds = torch.Generator().manual_seed(arguments.seed)
    for first in range(0, len(prompts), size):
        seed = arguments.seed
        if first > 0:
            # Another for each batch: equal prompts would have equal samples.
            seed = int(torch.randint(1 << 62, (), generator=seeds))
        batch = slice(first, first + size)
        steps = continuations(
            model,
            family,
            tokenizer,
            prompts[batch],
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=seed,
            prefill_chunk=arguments.prefill_chunk or None,
            group=ctx.cp_group,
        )
        steps = stats.watch(steps, sum(map(len, prompts[batch])))
        streams = [TextStream(tokenizer, tokens) for tokens in prompts[batch]]
        if not ctx.is_rank0:
            # All ranks decode, one prints.
            for _ in steps:
                pass
        elif _is_lines(arguments.prompts):
            _print_lines(texts[batch], streams, steps)
        else:
            _print_growing(texts[0], streams[0], steps)
    if arguments.stats and ctx.is_rank0:
        print(stats.summary(), file=sys.stderr)


def _is_lines(path: Path | None) -> bool:
    """Whether the file of prompts has one per line."""
    return path is not None and path.suffix.lower() in LINES


def _print_growing(text: str, stream: TextStream, steps: Iterator[list[int | None]]) -> None:
    """Print a text as it grows."""
    print(text, end="", flush=True)
    for (token,) in steps:
        print("" if token is None else stream.add(token), end="", flush=True)
    print(stream.finish(), flush=True)


def _print_lines(
    texts: list[str], streams: list[TextStream], steps: Iterator[list[int | None]]
) -> None:
    """Print each text as a line of JSON once all are complete."""
    new = [""] * len(texts)
    for step in steps:
        for row, token in enumerate(step):
            new[row] += "" if token is None else streams[row].add(token)
    for text, more, stream in zip(texts, new, streams, strict=True):
        line = {"prompt": text, "text": text + more + stream.finish()}
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _prompts(arguments: Arguments) -> list[str]:
    """The texts to continue. Raises DataError for a file that holds none."""
    path = arguments.prompts
    if path is None:
        return [arguments.prompt]
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts {path} cannot be read as UTF-8 text: {error}.") from None
    if path.suffix.lower() == ".json":
        raise DataError(
            f"prompts {path} is .json: give .jsonl with an object per line, or a .txt whose text "
            "is the prompt."
        )
    if not _is_lines(path):
        return [text]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = parse_json(line, allow_nan=True)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise DataError(f'{path}, line {number}: not a JSON object with a string "prompt".')
        check_text(f"{path}, line {number}: prompt", prompt)
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"prompts {path} has no line.")
    return prompts


class Stats:
    """Times and counts of all batches, of this process."""

    def __init__(self, device: torch.device, loading: float) -> None:
        self._device = device
        self._loading = loading
        self._firsts: list[float] = []
        self._read = self._new = self._steps = 0
        self._seconds = 0.0

    def watch(self, steps: Iterator[list[int | None]], read: int) -> Iterator[list[int | None]]:
        """The steps of a batch, whose prompts have `read` tokens together."""
        self._read += read
        began, first = time.perf_counter(), None
        for step in steps:
            if first is None:
                first = time.perf_counter()
                self._firsts.append(first - began)
            else:
                self._steps += 1
                self._new += sum(token is not None for token in step)
            yield step
        if first is not None:
            self._seconds += time.perf_counter() - first

    def summary(self) -> str:
        """One line. The first token of a batch counts for reading its prompts, with all set-up."""
        parts = [f"model loaded in {self._loading:.1f} s"]
        if self._firsts:
            parts.append(
                f"{self._read:,} tokens of prompts, first token after {self._firsts[0]:.2f} s"
            )
        if self._steps:
            parts.append(
                f"then {self._new:,} tokens at {self._new / self._seconds:,.0f} tokens/s "
                f"({1000 * self._seconds / self._steps:.2f} ms per step)"
            )
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            parts.append(f"{peak / 2**30:.1f} GiB of GPU memory")
        return "; ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
