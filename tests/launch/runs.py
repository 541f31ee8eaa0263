"""What the launcher's tests share: a small text, a micro model, and runs in their own processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import train
from launch.checkpoint.manifest import seal_file, tensor_file
from launch.checkpoint.shards import shard_of, write_shards
from launch.checkpoint.store import CheckpointStore
from launch.indexed_dataset import IndexedWriter
from launch.prepare_data import prepare
from launch.tokenizer import ByteTokenizer

# Of a run in this process.
STEPS = 8
# For a subprocess on a loaded machine; a test that passes needs a tenth of it.
PATIENCE = 600

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


@contextlib.contextmanager
def as_one_process() -> Iterator[None]:
    """This process as a job of its own, without GPUs; its signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in train.STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(**changes) -> list[str]:
    """Command-line flags of the micro run; `__` stands for the dot. None: a switch that is on."""
    values = MICRO | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        item
        for name, value in values.items()
        for item in ((f"--{name}",) if value is None else (f"--{name}", str(value)))
    ]


def make_data(folder: Path, documents: int = 40) -> Path:
    """A prepared folder with documents of simple, learnable text."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(documents):
        words = [f"line {line} of document {number}: {line * number}" for line in range(30)]
        (text / f"{number}.txt").write_text("\n".join(words), encoding="utf-8")
    prepare(folder / "tokens", [text], val_fraction=0.2)
    return folder / "tokens"


def write_tokens(folder: Path, documents: list) -> Path:
    """A data folder by hand: train and val alike, with the byte tokenizer's meta.json."""
    folder.mkdir()
    for split in ("train", "val"):
        writer = IndexedWriter(folder / split, np.dtype(np.uint16))
        for document in documents:
            writer.add(np.asarray(document))
        writer.close()
    (folder / "meta.json").write_text(json.dumps({"tokenizer": ByteTokenizer().spec()}))
    return folder


def arguments_here(folder: Path, data: Path, *more: str, **changes) -> list[str]:
    """The command line of a run of STEPS steps in this process."""
    wanted = dict(
        job__dump_folder=folder, data__source="folder", data__folder=data, training__steps=STEPS
    )
    return [*flags(**(wanted | changes)), *more]


def run_here(folder: Path, data: Path, *more: str, **changes) -> int:
    """Exit code of a run of STEPS steps in this process."""
    return train.main(arguments_here(folder, data, *more, **changes))


def at_step(monkeypatch, number: int, action: Callable) -> list:
    """Run `action(state)` once, when `number` steps are done."""
    done, step = [], train.train_step

    def wrapped(state):
        if state.step == number and not done:
            done.append(1)
            action(state)
        return step(state)

    monkeypatch.setattr(train, "train_step", wrapped)
    return done


def records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def start(
    arguments: list[str],
    nproc: int,
    script: str | Path = "launch/train.py",
    torchrun: Sequence[str] = (),
) -> subprocess.Popen:
    """Start torchrun, with more options of its own, in a session of its own, with all output on
    one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun]
    command += ["--nproc_per_node", str(nproc), str(script), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output_of(process: subprocess.Popen, patience: float = PATIENCE) -> str:
    """All output of a process started by `start`, which is gone afterwards whatever happens."""
    try:
        return process.communicate(timeout=patience)[0]
    finally:
        # Only this run's own session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def save_tensors(store: CheckpointStore, step: int, tensors: dict, state: dict) -> Path:
    """Save a checkpoint as a single rank does: {"model": {name: tensor}, "optimizer": ...}."""
    staging = store.begin(step)
    try:
        shards = {
            staging / tensor_file(group): {
                name: shard_of(value, is_rank0=True) for name, value in each.items()
            }
            for group, each in tensors.items()
        }
        files = write_shards(shards)
        (staging / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files.append(seal_file(staging / "state.json"))
    except BaseException:
        store.discard(staging)
        raise
    return store.commit(step, staging, files)


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; fails if a step is recorded twice."""
    series = records(folder)
    steps = [record["step"] for record in series]
    assert len(set(steps)) == len(steps), f"a step is recorded twice: {steps}"
    return {record["step"]: record["loss"] for record in series}
