"""Results of an evaluation: progress while it runs, a table, a JSON file and a chart."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lasp
from launch.config import Config
from launch.distributed import DistContext
from launch.evaluation.setup import SavedRun
from launch.exit_codes import ConfigError
from launch.metrics import clock
from launch.progress import LineTimer


class Progress:
    """Prints a line every half minute.

    Args:
        total: tokens that will be read.
        enabled: False prints nothing, as on all ranks but the first.
    """

    def __init__(self, name: str, total: int, *, enabled: bool) -> None:
        self._name, self._total, self._enabled = name, total, enabled
        self._done, self._timer = 0, LineTimer()

    def advance(self, tokens: int) -> None:
        """`tokens` more were read."""
        self._done += tokens
        if not self._enabled or not self._timer.is_due():
            return
        seconds = time.monotonic() - self._timer.began
        left = seconds * (self._total / self._done - 1)
        print(
            f"{self._name}: {self._done:,}/{self._total:,} tokens of rank 0  "
            f"tok/s: {self._done / max(seconds, 1e-9):,.0f}  [{clock(seconds)}<{clock(left)}]",
            flush=True,
        )


def check_output(path: Path | None) -> None:
    """Raise ConfigError, before a long evaluation, if the results could not be written."""
    if path is None:
        return
    if path.suffix != ".json":
        raise ConfigError(f"--output is {path}: give a .json file; the chart is a .png beside it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ConfigError(f"--output {path} cannot be written: it must be a file.")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}.") from None


@dataclass(frozen=True)
class Report:
    """What an evaluation found, and with what.

    Attributes:
        results: of a task, as JSON.
        seconds: of the evaluation itself, without loading.
        arguments: the command line, section by section.
    """

    task: str
    results: dict[str, Any]
    saved: SavedRun
    config: Config
    ctx: DistContext
    seconds: float
    arguments: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """The content of the results file."""
        training, device = self.config.training, self.ctx.device
        is_loss = self.task == "loss"
        return {
            "task": self.task,
            **self.results,
            "checkpoint": str(self.saved.checkpoint.path),
            "step": self.saved.checkpoint.step,
            "seconds": round(self.seconds, 3),
            "processes": self.ctx.dims.equation,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "seq_len": training.seq_len if is_loss else None,
            "segment_len": training.segment_len if is_loss else None,
            "varlen": training.varlen if is_loss else None,
            "arguments": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in self.arguments.items()
            },
            "model": {"family": self.saved.family_name, **vars(self.saved.shape)},
            "versions": {"lasp": lasp.__version__, "torch": torch.__version__},
        }

    def text(self) -> str:
        """The table that is printed."""
        saved = self.saved
        title = f"{saved.checkpoint.path}, {saved.family.describe(saved.shape)}"
        lines = self._loss_lines() if self.task == "loss" else self._recall_lines()
        return "\n".join([title, *lines, f"{self.seconds:.1f} s ({self.ctx.dims.equation})"])

    def _loss_lines(self) -> list[str]:
        results, training = self.results, self.config.training
        names = {
            "loss": "loss (nats per token)",
            "ppl": "perplexity",
            "bpb": "bits per byte",
            "word_ppl": "perplexity per word",
        }
        measured = [f"{text}: {results[key]:.6f}" for key, text in names.items() if key in results]
        samples = f"{results['samples']:,} of {results['samples_in_data']:,} samples"
        table = [f"{'positions':>21} {'tokens':>12} {'loss':>9}"]
        for row in results["loss_by_position"]:
            where = f"{row['from']:,}..{row['to'] - 1:,}"
            table.append(f"{where:>21} {row['tokens']:>12,} {row['loss']:>9.4f}")
        return [
            f"{results['tokens']:,} tokens, {samples} of {training.seq_len:,}",
            *measured,
            *table,
        ]

    def _recall_lines(self) -> list[str]:
        results = self.results
        table = [f"{'gap':>12} {'accuracy':>9} {'among pairs':>12} {'rank':>9} {'loss':>9}"]
        for row in results["recall_by_gap"]:
            table.append(
                f"{row['gap']:>12,} {row['accuracy']:>9.3f} {row['accuracy_among_pairs']:>12.3f} "
                f"{row['rank']:>9.1f} {row['loss']:>9.4f}"
            )
        return [
            f"{results['samples']:,} sequences of {results['pairs']} pairs; chance among pairs: "
            f"{results['chance_among_pairs']:.3f}",
            *table,
        ]

    def write(self, path: Path) -> Path:
        """Write results and chart; the chart's path. Raises OSError."""
        staging = path.with_name(f".{path.name}-{os.getpid()}")
        staging.write_text(json.dumps(self.json(), indent=1) + "\n", encoding="utf-8")
        os.replace(staging, path)
        chart = path.with_suffix(".png")
        self._draw(chart)
        return chart

    def _draw(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5))
        if self.task == "loss":
            rows = self.results["loss_by_position"]
            # A bucket is drawn at its last position, counted from 1: the buckets' ends are powers
            # of two.
            axes.plot([row["to"] for row in rows], [row["loss"] for row in rows], "o-")
            axes.axhline(self.results["loss"], color="gray", linestyle=":", label="all positions")
            axes.set(xlabel="tokens of context, up to", ylabel="loss (nats per token)")
            axes.set_xscale("log", base=2)
        else:
            rows = self.results["recall_by_gap"]
            gaps = [row["gap"] for row in rows]
            for key, label in (
                ("accuracy", "most likely of the vocabulary"),
                ("accuracy_among_pairs", "most likely of the values in the sequence"),
            ):
                axes.plot(gaps, [row[key] for row in rows], "o-", label=label)
            chance = self.results["chance_among_pairs"]
            axes.axhline(chance, color="gray", linestyle=":", label="chance among these")
            axes.set(xlabel="tokens between pairs and query", ylabel="accuracy", ylim=(-0.02, 1.02))
            # Linear from 0 to 1: the first gap is 0.
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_xlim(-0.2, 1.2 * max(gaps[-1], 1))
        axes.set_title(f"{self.saved.checkpoint.path.name}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            figure.savefig(path, dpi=120, bbox_inches="tight")
        finally:
            pyplot.close(figure)
