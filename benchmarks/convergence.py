"""Losses under every kind of parallelism: the same model, samples and steps, layout by layout.

    torchrun --nproc_per_node 4 benchmarks/convergence.py     # CPUs (gloo) or GPUs (NCCL)
    torchrun --nproc_per_node 2 benchmarks/convergence.py --preset 385m --lr 3e-4 --dtype float32

LASP's table (arXiv 2404.02882, table 2) trains with and without sequence parallelism under each
kind of data parallelism. Here every row trains the same model from the same weights on the same
samples with all processes, and is compared with a single process, step by step. Gradients are
accumulated, so that the settings that differ only in that do differ. Products are float32 on CPUs
and bfloat16 on GPUs (--dtype).

Text: the sources of Python's standard library, one byte per token. Writes
convergence_DEVICE_PROCESSES.json and a table after every row; the same command goes on from there,
and starts anew where its settings differ.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import io
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convergence_report
import resume
import torch
import torch.distributed as dist
import versions
from training import RESULTS, mesh_of, rank_info_among

from launch.config import load_config
from launch.distributed import DistContext
from launch.prepare_data import prepare
from launch.resolve import batching
from launch.train import set_up
from launch.trainer import train_step, validate

# Of LASP's table; what each shards is in parallel/data.py.
FSDP = {"parallelism.data_parallel_method": "fsdp"}
NEVER = {"parallelism.fsdp_reshard_after_forward": "never"}
EVERY = {"parallelism.fsdp_reduce_every_micro_batch": "True"}
METHODS: dict[str, dict[str, Any]] = {
    "DDP": {"parallelism.data_parallel_method": "ddp"},
    "FSDP": FSDP,
    "ZeRO-1": FSDP | NEVER,
    "ZeRO-2": FSDP | NEVER | EVERY,
    "ZeRO-3": FSDP | EVERY,
}
# "tiny" below is smaller than the preset of that name.
TINY = {"model.dim": 64, "model.num_layers": 3, "model.num_heads": 4, "model.glu_dim": 176}


@dataclass(frozen=True)
class Case:
    """A row: how `processes` train the model."""

    name: str
    processes: int
    flags: dict[str, Any]
    cp: int = 1
    tp: int = 1


def cases(processes: int) -> Iterator[Case]:
    """The single process, then every layout of `processes` that divides the sequence or the layers
    evenly; of one process alone, the first."""
    yield Case("one process", 1, {})
    degrees = [degree for degree in (1, 2, 4, 8) if processes % degree == 0]
    for name, flags in METHODS.items():
        for cp in degrees:
            if processes > 1:
                yield Case(name, processes, flags, cp=cp)
    for tp in (each for each in degrees if 1 < each <= 4):
        for cp in (each for each in degrees if processes % (tp * each) == 0):
            yield Case("tensor parallel", processes, FSDP, cp=cp, tp=tp)


def run_case(case: Case, arguments: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Train a case. Returns the row, or None on ranks that the case leaves out."""
    if (dist.get_rank() if dist.is_initialized() else 0) >= case.processes:
        return None
    began = time.perf_counter()
    config = load_config(command_line(case, arguments, folder))
    info = rank_info_among(config, case.processes)
    mesh = mesh_of(info.dims, info.device.type) if case.processes > 1 else None
    state = set_up(config, DistContext(info, mesh), batching(config, info))
    losses = []
    while state.step < arguments.steps:
        loss = train_step(state).loss
        if loss is None:
            raise SystemExit(f"{case.name}: the loss of step {state.step + 1} is NaN or infinite.")
        losses.append(loss)
    # Without its progress bar.
    with contextlib.redirect_stderr(io.StringIO()):
        validation = validate(state)
    if state.lock is not None:
        state.lock.close()
    return {
        "name": case.name,
        "processes": case.processes,
        "cp": case.cp,
        "tp": case.tp,
        "mesh": info.dims.degrees,
        "losses": losses,
        "validation": validation,
        "seconds": time.perf_counter() - began,
    }


def command_line(case: Case, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The launcher flags of a case."""
    values = {
        "job.dump_folder": folder / "run",
        "model.preset": arguments.preset,
        **(TINY if arguments.preset == "tiny" else {}),
        "data.source": "folder",
        "data.folder": arguments.data,
        "training.seq_len": arguments.seq_len,
        # For accumulation over at least two micro-batches on every mesh.
        "training.global_batch_size": 2 * max(arguments.processes, 4),
        "training.steps": arguments.steps,
        "training.mixed_precision_param": arguments.dtype,
        "optimizer.lr": arguments.lr,
        "lr_scheduler.warmup_steps": max(1, arguments.steps // 10),
        "validation.steps": 2,
        # Each row would be compiled anew.
        "compile.enable": False,
        "parallelism.context_parallel_degree": case.cp,
        "parallelism.tensor_parallel_degree": case.tp,
        **case.flags,
    }
    line = ["--checkpoint.no-enable", "--sample.no-enable"]
    for name, value in values.items():
        line += [f"--{name}"] if value == "True" else [f"--{name}", str(value)]
    return line


def main() -> None:
    arguments = parse_arguments()
    size, is_first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    arguments.processes = size
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    waiting = None
    if size > 1:
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpus >= size else "gloo")
        # Ranks that a row leaves out, and those without the text, wait on this group.
        waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))
    if is_first and not arguments.data.exists():
        prepare(arguments.data)
    report = begin(arguments, gpus) if is_first else {"rows": []}
    kept = [[case_of(row) for row in report["rows"]]]
    if waiting is not None:
        dist.broadcast_object_list(kept, group=waiting)
    for case in cases(size):
        if (case.name, case.cp, case.tp) in kept[0]:
            continue
        if waiting is not None:
            dist.barrier(waiting)
        with tempfile.TemporaryDirectory() as folder:
            row = run_case(case, arguments, Path(folder))
        gc.collect()
        if is_first:
            report["rows"].append(row)
            convergence_report.write(report, arguments.out)
            print(convergence_report.line(report, row), flush=True)
    if is_first:
        print(convergence_report.table(report), flush=True)
    if size > 1:
        dist.barrier(waiting)
        dist.destroy_process_group()


def begin(arguments: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """The report on disk if it has the same settings, else one without rows."""
    names = ("preset", "steps", "seq_len", "lr", "dtype")
    report = {
        "device": torch.cuda.get_device_name() if gpus else "CPU",
        "processes": arguments.processes,
        "model": f"TNL {arguments.preset}",
        "settings": {name: getattr(arguments, name) for name in names},
        "versions": versions.installed("torch", "triton"),
        "date": datetime.date.today().isoformat(),
        "rows": [],
    }
    if arguments.anew:
        return report
    path = convergence_report.path_of(report, arguments.out)
    names = ("device", "processes", "settings", "versions")
    return resume.earlier_report(path, report, names) or report


def case_of(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["name"], row["cp"], row["tp"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="tiny", help="model preset; tiny: smaller than it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="text, made if none")
    parser.add_argument("--anew", action="store_true", help="forget the rows on disk")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
