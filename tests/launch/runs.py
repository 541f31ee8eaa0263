"""What the launcher's tests share: a small text, a micro model, and runs in their own processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.prepare_data import prepare

ROOT = Path(__file__).parents[2]

MICRO = {
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.glu_dim": 48,
    "training.seq_len": 101,
    "training.global_batch_size": 4,
    "lr_scheduler.warmup_steps": 2,
    "optimizer.lr": 0.01,
    "validation.steps": 2,
    "validation.freq": 1000,
    "sample.max_new_tokens": 20,
}


def flags(**changes) -> list[str]:
    """Command-line flags of the micro run; `__` stands for the dot."""
    values = MICRO | {name.replace("__", "."): value for name, value in changes.items()}
    return [item for name, value in values.items() for item in (f"--{name}", str(value))]


def make_data(folder: Path, documents: int = 40) -> Path:
    """A prepared folder with documents of simple, learnable text."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(documents):
        words = [f"line {line} of document {number}: {line * number}" for line in range(30)]
        (text / f"{number}.txt").write_text("\n".join(words), encoding="utf-8")
    prepare(folder / "tokens", [text], val_fraction=0.2)
    return folder / "tokens"


def start(arguments: list[str], nproc: int) -> subprocess.Popen:
    """torchrun launch/train.py in a session of its own, output on one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(nproc), "launch/train.py", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def watch(process: subprocess.Popen, on_line: Callable[[str], None] | None = None) -> str:
    """All output of a process, which is gone afterwards whatever happens."""
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if on_line is not None:
                on_line(line)
        process.wait(timeout=60)
    finally:
        # Only this run's own session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "".join(lines)


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process id of a rank: the child of torchrun whose environment says so."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == process.pid and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no child of {process.pid} is rank {rank}")


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; fails if a step is there twice."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records]
    assert len(set(steps)) == len(steps), f"a step is recorded twice: {steps}"
    return {record["step"]: record["loss"] for record in records}
