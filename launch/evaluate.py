"""Evaluate a checkpoint: its loss, by position in the sequence, or how far back it recalls.

    torchrun --nproc_per_node 2 launch/evaluate.py --checkpoint outputs/quickstart/checkpoint \\
        --data data/stdlib --context-parallel-degree 2 --output results.json
    python launch/evaluate.py --checkpoint outputs/quickstart/checkpoint --task recall

Exit codes: 0 done; 70 a damaged checkpoint, or none; 72 a loss that is NaN or infinite; 73 options
or data that do not fit the checkpoint; 74 the results could not be written; 1 anything else, with
a traceback.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lasp import SequenceShard
from launch.build import autocast_dtype
from launch.checkpoint.saved_run import SavedRun
from launch.checkpoint.store import Checkpoint, open_checkpoint
from launch.command_line import parse as parse_arguments
from launch.config import Config, check_path
from launch.data import DataFolder, IndexedSource, Segments
from launch.data_digests import describe_tokenizer
from launch.distributed import (
    DistContext,
    get_rank_info,
    open_dist_context,
    refuse_start,
    report_error,
)
from launch.evaluation.loss import LossTask, check_samples, loss_by_position
from launch.evaluation.recall import RecallCounts, RecallTask, gaps_up_to, recall_by_gap
from launch.evaluation.report import Progress, Report, check_output
from launch.evaluation.setup import Evaluated, load
from launch.exit_codes import (
    DISK_FAILED,
    ConfigError,
    DataError,
    NonFiniteError,
    UserError,
)
from launch.files import is_folder
from launch.metrics import loss_metrics
from launch.rendezvous import settings

# Without --batch-size, forwards have about this many tokens, and at most this many sequences.
_TOKENS, _SEQUENCES = 65536, 16


@dataclass(kw_only=True)
class Recall:
    max_gap: int = 65536
    """Recall at gaps of 0, 1, 2, 4, ... up to this many tokens between the pairs and the query."""
    pairs: int = 8
    """Keys and values per sequence; every key is queried at every gap."""
    samples: int = 32
    """Sequences."""
    seed: int = 0
    """Determines the sequences."""


@dataclass(kw_only=True)
class Arguments:
    """Evaluate a checkpoint."""

    checkpoint: Path
    """A step folder, or the folder of a run's checkpoints (its newest valid one is taken)."""
    task: Literal["loss", "recall"] = "loss"
    """loss: on a data folder, by position in the sequence. recall: of key-value pairs of random
    tokens, by the number of tokens in between."""
    data: Path | None = None
    """Output of launch/prepare_data.py, for task loss."""
    split: Literal["val", "train", "test"] = "val"
    """test: of data that has one (launch/prepare_wikitext.py)."""
    seq_len: int | None = None
    """Tokens of one GLOBAL sequence. None: as the run was trained, as for the next three."""
    segment_len: int | None = None
    """Process each sequence in segments of this many tokens, so that memory does not grow with
    seq_len. 0: whole sequences."""
    varlen: bool | None = None
    """Keep documents apart: the state resets, and positions restart, at each document."""
    dtype: Literal["auto", "bfloat16", "float32"] | None = None
    """Of matmuls and activations. auto: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: int | None = None
    """Sequences of one forward. None: as many as make 65,536 tokens, at most 16; 1 with varlen."""
    max_samples: int = 0
    """Evaluate the first samples of the data only; 0: all."""
    recall: Recall = field(default_factory=Recall)
    context_parallel_degree: int = 1
    """Ranks over which each sequence is sharded; the other ranks take other sequences. -1: all."""
    context_parallel_method: Literal["ring", "all_gather", "doubling", "auto"] = "ring"
    """How the d x d states cross ranks."""
    context_parallel_layout: Literal["contiguous", "zigzag"] = "contiguous"
    """zigzag: equal work for all ranks in softmax layers."""
    tensor_parallel_degree: int = 1
    """Ranks over which each layer is sharded, by heads and channels."""
    output: Path | None = None
    """Write the results to this .json file, and a chart beside it."""


def parse(argv: list[str]) -> Arguments:
    """The arguments of a command line. Raises ConfigError for what no checkpoint could be evaluated
    with."""
    arguments: Arguments = parse_arguments(Arguments, argv, "launch/evaluate.py")
    recall = arguments.recall
    for name, value, minimum in (
        ("seq-len", arguments.seq_len, 1),
        ("segment-len", arguments.segment_len, 0),
        ("batch-size", arguments.batch_size, 1),
        ("max-samples", arguments.max_samples, 0),
        ("recall.max-gap", recall.max_gap, 0),
        ("recall.pairs", recall.pairs, 1),
        ("recall.samples", recall.samples, 1),
        ("recall.seed", recall.seed, 0),
    ):
        if value is not None and not minimum <= value < 1 << 63:
            raise ConfigError(f"--{name} is {value}: it must be at least {minimum}, below 2^63.")
    for name in ("checkpoint", "data", "output"):
        check_path(f"--{name}", getattr(arguments, name))
    if arguments.task == "loss" and arguments.data is None:
        raise ConfigError("--task loss needs --data, a folder that launch/prepare_data.py wrote.")
    if arguments.task == "recall":
        if arguments.data is not None:
            raise ConfigError("--task recall makes its own sequences: leave --data out.")
        if (arguments.context_parallel_degree, arguments.tensor_parallel_degree) != (1, 1):
            raise ConfigError(
                "--task recall shards neither sequences nor layers: leave "
                "--context-parallel-degree and --tensor-parallel-degree out, and each rank takes "
                "sequences of its own."
            )
    return arguments


def parallel_config(arguments: Arguments) -> Config:
    """The launcher's config with the arguments that do not depend on the checkpoint."""
    config = Config()
    parallelism = config.parallelism
    parallelism.data_parallel_method = "ddp"
    parallelism.context_parallel_degree = arguments.context_parallel_degree
    parallelism.context_parallel_method = arguments.context_parallel_method
    parallelism.context_parallel_layout = arguments.context_parallel_layout
    parallelism.tensor_parallel_degree = arguments.tensor_parallel_degree
    # Lengths vary: compiling would take longer than it saves.
    config.compile.enable = False
    # A rank may wait for another's hashing of a large checkpoint, or for its last long sample.
    config.comm.init_timeout_seconds = 3600
    return config


def complete(config: Config, arguments: Arguments, saved: SavedRun) -> None:
    """Set what the arguments leave to the run that was saved, and check that all of it fits.

    Raises:
        ConfigError: options that the model or each other exclude.
    """
    training = config.training
    for name, default, given in (
        ("seq_len", training.seq_len, arguments.seq_len),
        ("segment_len", training.segment_len, arguments.segment_len),
        ("varlen", training.varlen, arguments.varlen),
        ("mixed_precision_param", training.mixed_precision_param, arguments.dtype),
        ("loss_chunk_size", training.loss_chunk_size, None),
    ):
        setattr(training, name, saved.training(name, default) if given is None else given)
    option, length = "--seq-len", training.seq_len
    if arguments.task == "recall":
        # The pairs, the gap and a query.
        length = 2 * arguments.recall.pairs + arguments.recall.max_gap + 1
        option = "--recall.max-gap"
    packed = training.varlen and arguments.task == "loss"
    problem = saved.family.sequence_problem(saved.shape, length, packed=packed)
    if problem is not None:
        raise ConfigError(f"{option}: {problem}")
    problem = saved.family.streaming_problem(saved.shape)
    if training.num_segments > 1 and problem is not None:
        raise ConfigError(
            f"--segment-len is {training.segment_len}: {problem} Use --segment-len 0, and more "
            "ranks for a sequence that does not fit."
        )
    try:
        saved.family.check_divides(saved.shape, arguments.tensor_parallel_degree)
    except ValueError as error:
        degree = arguments.tensor_parallel_degree
        raise ConfigError(f"--tensor-parallel-degree is {degree}: {error}") from None
    if arguments.context_parallel_layout == "zigzag":
        for name, length in (("seq-len", training.seq_len), ("segment-len", training.segment_len)):
            if length % 2:
                raise ConfigError(
                    f"--{name} is {length}: it must be even for --context-parallel-layout zigzag."
                )
    training.local_batch_size = arguments.batch_size or 1
    if training.varlen and training.local_batch_size > 1:
        raise ConfigError(
            f"--batch-size is {arguments.batch_size}: it must be 1 where documents are kept apart; "
            "use --varlen False to pack them without regard to their boundaries."
        )
    if arguments.batch_size is None and not training.varlen:
        training.local_batch_size = max(1, min(_SEQUENCES, _TOKENS // training.forward_len))


def open_source(arguments: Arguments, config: Config, saved: SavedRun) -> IndexedSource:
    """The samples to evaluate. Raises DataError if they are not of the checkpoint's tokenizer."""
    assert arguments.data is not None
    if not is_folder(arguments.data):
        raise DataError(f"--data {arguments.data} is no folder: give one of prepare_data.py.")
    folder = DataFolder(arguments.data)
    if arguments.split == "test" and not (arguments.data / "test.idx").exists():
        raise DataError(
            f"{arguments.data} has no split test: data of launch/prepare_wikitext.py does; use "
            "--split val."
        )
    if folder.tokenizer is not None:
        if saved.tokenizer is None:
            raise DataError(
                f"the checkpoint {saved.checkpoint.path} has no tokenizer, and the tokens of "
                f"{arguments.data} are of one: evaluate on the data that it was trained on."
            )
        if describe_tokenizer(folder.tokenizer) != describe_tokenizer(saved.tokenizer):
            raise DataError(
                f"the tokenizer of {arguments.data} ({folder.tokenizer.vocab_size} tokens) is not "
                f"that of the checkpoint {saved.checkpoint.path} ({saved.tokenizer.vocab_size} "
                "tokens): prepare the text with the checkpoint's tokenizer."
            )
    seq_len = config.training.seq_len
    return folder.source(arguments.split, seq_len, saved.shape.vocab_size, flag="--seq-len")


def evaluate_loss(
    evaluated: Evaluated, config: Config, arguments: Arguments, source: IndexedSource
) -> dict[str, Any]:
    """The results of task loss, on every rank."""
    ctx, training, parallelism = evaluated.ctx, config.training, config.parallelism

    def split(tokens: int) -> SequenceShard:
        method, layout = parallelism.context_parallel_method, parallelism.context_parallel_layout
        return SequenceShard.split(tokens, ctx.cp_group, method, layout)

    task = LossTask(
        source=source,
        segments=Segments(training.seq_len, training.segment_len or training.seq_len, split),
        num_samples=min(arguments.max_samples or source.num_samples, source.num_samples),
        batch_size=training.local_batch_size,
        varlen=training.varlen,
    )
    ctx.all_or_raise(lambda: check_samples(task, ctx))
    own = sum(map(len, task.own_batches(ctx))) * training.seq_len
    progress = Progress("evaluating", own, enabled=ctx.is_rank0)
    losses = loss_by_position(evaluated, task, progress.advance)
    if not losses.num_labels:
        ctx.fail(DataError(f"{arguments.data}: every label is ignored; use other data."))
    return {
        **loss_metrics(losses.mean, source.bytes_per_token, source.words_per_token),
        "tokens": losses.num_labels,
        "samples": task.num_samples,
        "samples_in_data": source.num_samples,
        "loss_by_position": losses.table(),
    }


def recall_task(arguments: Arguments, saved: SavedRun) -> RecallTask:
    """The pairs and fillers, of the tokens that text can have. Raises ConfigError."""
    tokens: Any = range(saved.shape.vocab_size)
    if saved.tokenizer is not None:
        special = {saved.tokenizer.eod_id, saved.tokenizer.pad_id}
        tokens = [each for each in range(saved.tokenizer.vocab_size) if each not in special]
    try:
        return RecallTask.from_tokens(tokens, arguments.recall.pairs, arguments.recall.seed)
    except ValueError as error:
        raise ConfigError(f"--recall.pairs: {error}") from None


def evaluate_recall(
    evaluated: Evaluated, config: Config, arguments: Arguments, task: RecallTask
) -> dict[str, Any]:
    """The results of task recall, on every rank."""
    ctx, recall = evaluated.ctx, arguments.recall
    dtype, gaps = autocast_dtype(config, ctx.device), gaps_up_to(recall.max_gap)
    batch = min(arguments.batch_size or _SEQUENCES, recall.samples)
    batches = range(ctx.info.dp_rank, -(-recall.samples // batch), ctx.dims.dp)
    read = len(batches) * (2 * recall.pairs + gaps[-1])
    progress = Progress("evaluating", read, enabled=ctx.is_rank0)
    totals = [RecallCounts() for _ in gaps]
    for number in batches:
        # Seeded by its number: the same sequences on any number of ranks.
        generator = torch.Generator().manual_seed((recall.seed << 20) + number & (1 << 63) - 1)
        size = min(batch, recall.samples - number * batch)
        with torch.autocast(ctx.device.type, dtype, enabled=dtype is not None):
            counts = recall_by_gap(evaluated.model, task, gaps, size, generator, progress.advance)
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    own = [number for each in totals for number in each.numbers]
    numbers = ctx.sum_numbers(*own, dtype=torch.float64)
    width = len(RecallCounts().numbers)
    rows = [
        {"gap": gap, **RecallCounts(*numbers[n * width : (n + 1) * width]).means()}
        for n, gap in enumerate(gaps)
    ]
    return {
        "pairs": recall.pairs,
        "chance_among_pairs": 1 / recall.pairs,
        "values": len(task.values),
        "samples": recall.samples,
        "recall_by_gap": rows,
    }


def evaluate(arguments: Arguments, config: Config, ctx: DistContext) -> int:
    """Load, evaluate and report; return the exit code."""

    def find() -> list[Any]:
        found = open_checkpoint(arguments.checkpoint)
        check_output(arguments.output)
        return [str(found.path), found.step]

    path, step = ctx.on_rank0(find)
    saved = ctx.all_or_raise(lambda: SavedRun.read(Checkpoint(Path(path), step)))
    ctx.all_or_raise(lambda: complete(config, arguments, saved))
    # What the task reads is checked before the weights are.
    if arguments.task == "loss":
        source = ctx.all_or_raise(lambda: open_source(arguments, config, saved))
        run = partial(evaluate_loss, config=config, arguments=arguments, source=source)
    else:
        task = ctx.all_or_raise(lambda: recall_task(arguments, saved))
        run = partial(evaluate_recall, config=config, arguments=arguments, task=task)
    evaluated = load(saved, config, ctx)
    began = time.perf_counter()
    results = run(evaluated)
    seconds = time.perf_counter() - began
    if arguments.task == "loss" and not torch.tensor(results["loss"]).isfinite():
        ctx.fail(NonFiniteError(f"the loss of {path} is {results['loss']}: its weights are bad."))
    if not ctx.is_rank0:
        return 0
    report = Report(arguments.task, results, saved, config, ctx, seconds, asdict(arguments))
    print(report.text(), flush=True)
    if arguments.output is None:
        return 0
    try:
        print(f"results: {arguments.output}  chart: {report.write(arguments.output)}", flush=True)
    except OSError as error:
        print(f"error: {arguments.output} cannot be written: {error}", file=sys.stderr, flush=True)
        return DISK_FAILED
    return 0


def main(argv: list[str]) -> int:
    """Run a command line; return the exit code."""
    try:
        arguments = parse(argv)
        config = parallel_config(arguments)
        info = get_rank_info(config)
    except UserError as error:
        return report_error(refuse_start(error))
    # A host may mount files elsewhere.
    paths = ("checkpoint", "data", "output")
    given = {f"--{n}": value for n, value in settings(arguments).items() if n not in paths}
    try:
        with open_dist_context(info, config, given) as ctx:
            return evaluate(arguments, config, ctx)
    except UserError as error:
        return report_error(error)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # As in launch/train.py: a gloo thread may abort the interpreter's shutdown.
    os._exit(code)
