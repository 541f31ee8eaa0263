"""Training speed of the launcher's own step: tokens/s, MFU and peak memory by layout and length.

    python benchmarks/training.py --suite lengths recompute          # one GPU
    torchrun --nproc_per_node 2 benchmarks/training.py               # what fits two GPUs too
    torchrun --nproc_per_node 2 benchmarks/training.py --preset tiny --tokens 2048   # a try on CPUs

Each row is one config. The launcher's own functions build model and optimizer and take the steps,
on random tokens. A time is the median over the steps after warm-up; the device is synchronized
before and after each. MFU counts the model's FLOPs (linear attention in its recurrent form, the
causal half of softmax attention, no recomputation) against the dense bfloat16 peak. Memory is what
the allocator reserved at its peak, on the rank with the most.

Suites:
    lengths    the same number of tokens per step at every length, and a softmax model beside it
    recompute  none, selective and full
    layouts    one GPU, then all: the sequence cut with FSDP and DDP, tensor parallelism
    scaling    the sequence cut over all GPUs at three lengths, and two mixed layouts
    segments   one sequence of growing length, in segments (--segment_len)

A row in segments warms up on three segments, and above 2,097,152 tokens takes one measured step.
FP8: --launcher_flags --quantize.linear.float8.recipe_name tensorwise (last on the command line).

Writes a JSON file, a Markdown table and a chart after every row.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import training_report
import versions
from torch.distributed import DeviceMesh

from launch.config import Config, load_config
from launch.distributed import DistContext, RankInfo, get_rank_info
from launch.metrics import peak_flops, peak_memory
from launch.resolve import batching
from launch.train import set_up
from launch.trainer import train_step
from parallel.mesh import ParallelDims, build_mesh

RESULTS = Path(__file__).parent / "results"
SUITES = ("layouts", "recompute", "lengths", "scaling", "segments")
# Of one sequence. Lengths above the tokens of a step are left out.
LENGTHS = (2048, 8192, 32768, 131072, 524288)
SEGMENTED_LENGTHS = (262144, 1048576, 4194304, 16777216)
# Above this, a row in segments takes one measured step.
SEVERAL_STEPS = 1 << 21
RECOMPUTE = "activation_checkpoint.mode"


@dataclass(frozen=True)
class Case:
    """One row: `sequences` of `seq_len` tokens per step on `processes` ranks.

    Attributes:
        suite, name: together with the model and the length they identify the row.
        model: "TNL", or "softmax" for the same model with softmax attention in every layer.
        flags: launcher flags, as (name, value).
    """

    suite: str
    name: str
    processes: int
    seq_len: int
    sequences: int = 1
    model: str = "TNL"
    flags: tuple[tuple[str, Any], ...] = ()


def cases(
    suites: list[str], world_size: int, tokens: int | None, segment_len: int
) -> Iterator[Case]:
    """The rows of the suites. `tokens` per GPU and step; None: the default of each suite."""
    full = (RECOMPUTE, "full")
    for suite in suites:
        if suite == "recompute":
            base = dict(suite=suite, processes=1, seq_len=tokens or 32768)
            yield Case(name="none", **base)
            yield Case(name="selective", **base, flags=((RECOMPUTE, "selective"),))
            yield Case(name="full", **base, flags=(full,))
        elif suite == "lengths":
            most = tokens or 524288
            for model in ("TNL", "softmax"):
                for length in LENGTHS:
                    if length <= most:
                        base = dict(model=model, flags=(full,))
                        yield Case(suite, "full", 1, length, most // length, **base)
        elif suite == "layouts":
            yield from layouts(suite, world_size, tokens or 131072)
        elif suite == "scaling" and world_size > 1:
            yield from scaling(suite, world_size, tokens or 131072)
        elif suite == "segments":
            yield from in_segments(suite, world_size, tokens, segment_len)


def in_segments(suite: str, ranks: int, tokens: int | None, length: int) -> Iterator[Case]:
    """Growing sequences in segments of `length` tokens per GPU; no block is recomputed."""
    flags = [("training.segment_len", ranks * length)]
    name = f"segments of {length:,}"
    if ranks > 1:
        flags.append(("parallelism.context_parallel_degree", ranks))
        name = f"cp {ranks}, DDP, {name} per GPU"
    for each in SEGMENTED_LENGTHS if tokens is None else (tokens,):
        yield Case(suite, name, ranks, ranks * each, flags=tuple(flags))


def layouts(suite: str, ranks: int, tokens: int) -> Iterator[Case]:
    """One GPU, then as many tokens on each of all GPUs, then sequences that one cannot hold."""
    full, fsdp = (RECOMPUTE, "full"), ("parallelism.data_parallel_method", "fsdp")
    cut = ("parallelism.context_parallel_degree", ranks)
    yield Case(suite, "one GPU, full", 1, tokens, flags=(full,))
    if ranks == 1:
        return
    yield Case(suite, f"cp {ranks}, FSDP, full", ranks, ranks * tokens, flags=(full, fsdp, cut))
    longer = 2 * ranks * tokens
    yield Case(suite, f"cp {ranks}, FSDP, full", ranks, longer, flags=(full, fsdp, cut))
    tensor = ("parallelism.tensor_parallel_degree", ranks)
    yield Case(suite, f"tp {ranks}, none", ranks, tokens // 4, flags=(tensor,))
    yield Case(suite, "one GPU, none", 1, tokens // 4)
    by_tokens = ("parallelism.tensor_parallel_shard_sequence", True)
    norms = f"tp {ranks}, norms cut by tokens, none"
    yield Case(suite, norms, ranks, tokens // 4, flags=(tensor, by_tokens))
    yield Case(suite, f"cp {ranks}, DDP, full", ranks, ranks * tokens, flags=(full, cut))
    never = ("parallelism.fsdp_reshard_after_forward", "never")
    zero2 = f"cp {ranks}, FSDP (weights kept), full"
    yield Case(suite, zero2, ranks, ranks * tokens, flags=(full, fsdp, never, cut))


def scaling(suite: str, ranks: int, tokens: int) -> Iterator[Case]:
    """The sequence cut over all GPUs, a quarter of `tokens` on each, `tokens`, and four times as
    many; then two mixed layouts."""
    common = ((RECOMPUTE, "full"), ("parallelism.data_parallel_method", "fsdp"))
    cut = ("parallelism.context_parallel_degree", ranks)
    for each in (tokens // 4, tokens, 4 * tokens):
        yield Case(suite, f"cp {ranks}, FSDP, full", ranks, ranks * each, flags=(*common, cut))
    if ranks < 4 or ranks % 2:
        return
    half = ("parallelism.context_parallel_degree", ranks // 2)
    tensor = ("parallelism.tensor_parallel_degree", 2)
    name = f"tp 2, cp {ranks // 2}, FSDP, full"
    yield Case(suite, name, ranks, ranks * tokens, flags=(*common, half, tensor))
    shard = ("parallelism.data_parallel_shard_degree", 2)
    name = f"dp_shard 2, cp {ranks // 2}, FSDP, full"
    yield Case(suite, name, ranks, ranks // 2 * tokens, flags=(*common, half, shard))


def run_case(case: Case, arguments: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure one case on its ranks. Returns the row, or None on ranks that the case leaves out."""
    if (dist.get_rank() if dist.is_initialized() else 0) >= case.processes:
        return None
    torch._dynamo.reset()
    config = load_config(command_line(case, arguments, folder))
    info = rank_info_among(config, case.processes)
    if info.device.type == "cuda":
        torch.cuda.set_device(info.device)
        torch.cuda.reset_peak_memory_stats()
    mesh = mesh_of(info.dims, info.device.type) if case.processes > 1 else None
    batch = batching(config, info)
    context = DistContext(info, mesh)
    state = set_up(config, context, batch)
    began, seconds = time.perf_counter(), []
    steps, segments = arguments.steps, state.segments
    if segments is not None and case.seq_len > SEVERAL_STEPS:
        steps = 1
    for number in range(arguments.warmup + steps):
        if segments is not None:
            is_warmup = number < arguments.warmup
            state.segments = segments.first(3) if is_warmup else segments
        synchronize(info.device)
        start = time.perf_counter()
        train_step(state)
        synchronize(info.device)
        seconds.append(time.perf_counter() - start)
    measured = statistics.median(seconds[arguments.warmup :])
    shape = state.model.config
    flops = shape.flops_per_token(training=True, seq_len=case.seq_len)
    rate, peak = batch.tokens_per_step / measured, peak_flops(info.device)
    memory = max(context.gather(peak_memory(info.device)))
    return {
        "suite": case.suite,
        "name": f"FP8, {case.name}" if config.float8.recipe_name else case.name,
        "model": f"{case.model} {arguments.preset}",
        "parameters": shape.num_parameters(),
        "gpus": case.processes,
        "mesh": info.dims.degrees,
        "seq_len": case.seq_len,
        "tokens_per_step": batch.tokens_per_step,
        "step_seconds": measured,
        "steps": seconds,
        "first_step_seconds": seconds[0],
        "seconds_in_all": time.perf_counter() - began,
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / case.processes,
        "mfu": rate * flops / (peak * case.processes) if peak else None,
        "memory_gib": memory,
    }


@functools.cache
def mesh_of(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """One mesh per layout, shared by its rows: communicators hold memory."""
    return build_mesh(dims, device_type)


def command_line(case: Case, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The launcher flags of a case."""
    values = {
        "model.preset": arguments.preset,
        "data.source": "random",
        "training.seq_len": case.seq_len,
        "training.local_batch_size": case.sequences,
        "training.steps": 1000,
        "job.dump_folder": folder,
        **dict(case.flags),
    }
    if case.model == "softmax":
        path = folder / "softmax.json"
        path.write_text(json.dumps({"layer_types": "S", "lrpe_layers": []}))
        values["model.config"] = path
    line = ["--checkpoint.no-enable", "--validation.no-enable", *arguments.launcher_flags]
    for name, value in values.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def rank_info_among(config: Config, processes: int) -> RankInfo:
    """`get_rank_info` for a job of the first `processes` ranks."""
    before = dict(os.environ)
    try:
        if processes == 1:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
        return get_rank_info(config)
    finally:
        os.environ.update(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--suite", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--preset", default="1b", help="model preset")
    parser.add_argument("--tokens", type=int, help="per GPU and step; default: set by the suite")
    parser.add_argument(
        "--segment_len", type=int, default=32768, help="tokens per GPU and segment, suite segments"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--only", help='rows whose "model, name, length" match this pattern')
    parser.add_argument("--seconds", type=float, default=3600, help="start no row after this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the other rows of the folder",
    )
    parser.add_argument("--launcher_flags", nargs=argparse.REMAINDER, default=[])
    return parser.parse_args()


def main() -> None:
    arguments, began = parse_arguments(), time.perf_counter()
    if not torch.cuda.is_available() and arguments.preset != "tiny":
        raise SystemExit(
            f"--preset {arguments.preset} needs a CUDA GPU and this machine has none: try "
            "--preset tiny --tokens 2048."
        )
    size, is_first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    waiting = None
    if size > 1:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpus >= size else "gloo")
        # Ranks that a row leaves out wait on this group, on the host.
        waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))
    report = begin(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments.suite, size, arguments.tokens, arguments.segment_len):
            wanted = f"{case.model}, {case.name}, {case.seq_len}"
            if arguments.only and not re.search(arguments.only, wanted):
                continue
            if not all_agree(time.perf_counter() - began < arguments.seconds, waiting):
                break
            try:
                row = run_case(case, arguments, Path(folder))
            except torch.cuda.OutOfMemoryError:
                if case.processes > 1:
                    # Other ranks may be waiting in a collective.
                    raise
                row = skipped(case, arguments, "out of memory")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if is_first:
                report["rows"] = [r for r in report["rows"] if key(r) != key(row)] + [row]
                print(json.dumps(row), flush=True)
                # After every row, so that an interrupted run keeps its rows.
                training_report.write(report, arguments.out)
    if is_first:
        print(training_report.table(report), flush=True)
    if size > 1:
        dist.barrier(waiting)
        dist.destroy_process_group()


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """A report without rows, or with the rows of the last run (--keep)."""
    path, rows = arguments.out / "training.json", []
    if arguments.keep and path.exists():
        rows = json.loads(path.read_text())["rows"]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions.installed("torch", "triton"),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def key(row: dict[str, Any]) -> tuple:
    return row["suite"], row["model"], row["gpus"], row["name"], row["seq_len"]


def skipped(case: Case, arguments: argparse.Namespace, why: str) -> dict[str, Any]:
    """A row without figures."""
    return {
        "suite": case.suite,
        "name": case.name,
        "model": f"{case.model} {arguments.preset}",
        "gpus": case.processes,
        "seq_len": case.seq_len,
        "note": why,
    }


def all_agree(yes: bool, group: dist.ProcessGroup | None) -> bool:
    """True if all ranks pass True."""
    if group is None:
        return yes
    votes = torch.tensor([int(yes)])
    dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
    return bool(votes.item())


if __name__ == "__main__":
    main()
