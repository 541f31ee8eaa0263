"""Losses of launch/train.py on real text: what benchmarks that compare loss curves share."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import training

from launch import train as launcher

__all__ = ["add_arguments", "train"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loss_steps", type=int, default=1000, help="steps of a loss curve")
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="text, made if none")
    parser.add_argument("--out", type=Path, default=training.RESULTS, help="folder for the results")
    parser.add_argument("--launcher_flags", nargs=argparse.REMAINDER, default=[])


def train(name: str, flags: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The curve of one run: [step, loss] for training and validation.

    Runs that differ only in flags that leave the initial weights alone start from the same weights
    and see the same samples.

    Args:
        name: of the run, for errors.
        flags: of launch/train.py, without dashes.
        arguments: preset, tokens (per step, in two sequences) and those of `add_arguments`.
    """
    preset, tokens = arguments.preset or "385m", arguments.tokens or 2048
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "job.dump_folder": folder,
            "data.folder": arguments.data,
            "model.preset": preset,
            "training.seq_len": tokens // 2,
            "training.local_batch_size": 2,
            "training.steps": arguments.loss_steps,
            "validation.freq": max(1, arguments.loss_steps // 5),
            "validation.steps": 32,
            "metrics.log_freq": max(1, arguments.loss_steps // 100),
            **flags,
        }
        line = ["--checkpoint.no-enable", "--sample.no-enable", *arguments.launcher_flags]
        for flag, value in values.items():
            line += [f"--{flag}", str(value)]
        code = launcher.main(line)
        if code:
            raise SystemExit(f"launch/train.py ended with code {code} for {name}.")
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    torch._dynamo.reset()
    gc.collect()
    records = [json.loads(each) for each in lines]
    return {
        "model": f"TNL {preset}",
        "tokens_per_step": tokens,
        "train": [[each["step"], each["loss"]] for each in records],
        "validation": [[each["step"], each["val_loss"]] for each in records if "val_loss" in each],
    }
