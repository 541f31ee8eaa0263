"""The metrics of a run: one line per step, metrics.jsonl, a loss curve.

All numbers are of the whole job, except memory, which is rank 0's. Loss is the mean over all tokens
that have a label, tokens are counted once on any mesh, and mfu counts the FLOPs of the model, with
the quadratic ones of softmax layers if it has any.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.config import Config
from launch.exit_codes import ConfigError
from launch.files import parse_json

# Dense bfloat16, in FLOP/s, by a part of the device's name.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
# Steps that the remaining time is estimated from.
_ETA_STEPS = 20


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 FLOP/s; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> float:
    """Peak GiB: reserved by the allocator on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_packages(config: Config) -> None:
    """Raise ConfigError if a package for metrics is enabled but missing."""
    packages = {
        "tensorboard": ("torch.utils.tensorboard", config.metrics.enable_tensorboard),
        "wandb": ("wandb", config.metrics.enable_wandb),
    }
    for package, (module, enabled) in packages.items():
        if not enabled:
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"metrics.enable_{package} needs the package {package} ({error}): install it, or "
                f"use --metrics.no-enable_{package}."
            ) from None


def loss_metrics(
    loss: float, bytes_per_token: float | None, words_per_token: float | None = None
) -> dict[str, float]:
    """Loss in nats per token, perplexity, bits per byte if the bytes are known, and perplexity per
    word if the words are."""
    # Clamped at e^50: exp overflows above 709.
    metrics = {"loss": loss, "ppl": math.exp(min(loss, 50.0))}
    if bytes_per_token:
        metrics["bpb"] = loss / math.log(2) / bytes_per_token
    if words_per_token:
        metrics["word_ppl"] = math.exp(min(loss / words_per_token, 50.0))
    return metrics


class Speedometer:
    """Tokens per second, mfu and time left.

    Args:
        tokens_per_step: tokens of the whole job, each counted once.
        flops_per_token: model FLOPs, forward and backward.
        world_size: devices.
        peak: FLOP/s of one device; None leaves mfu out.
    """

    def __init__(
        self, tokens_per_step: int, flops_per_token: float, world_size: int, peak: float | None
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._peak = peak
        self._began = time.perf_counter()
        self._seconds, self._steps = 0.0, 0
        self._recent: deque[float] = deque(maxlen=_ETA_STEPS)

    def add_step(self, seconds: float) -> None:
        """One step took `seconds`, without validation and checkpoints."""
        self._seconds += seconds
        self._steps += 1
        self._recent.append(seconds)

    def read(self, steps_left: int) -> dict[str, float]:
        """Rates since the last call, seconds since the start, seconds left."""
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        rate = self._tokens_per_step * steps / seconds if seconds else 0.0
        metrics = {"tok/s": rate, "tok/s/gpu": rate / self._world_size}
        if self._peak:
            metrics["mfu"] = rate * self._flops_per_token / (self._peak * self._world_size)
        metrics["elapsed"] = time.perf_counter() - self._began
        # The median: compilation makes the first step many times longer than the others.
        metrics["eta"] = statistics.median(self._recent or [0.0]) * steps_left
        return metrics


def format_line(metrics: dict[str, Any], steps: int) -> str:
    """The line of one step."""
    parts = [f"step: {metrics['step']}/{steps}", f"loss: {metrics['loss']:.4f}"]
    parts.append(f"ppl: {metrics['ppl']:.2f}")
    if "bpb" in metrics:
        parts.append(f"bpb: {metrics['bpb']:.4f}")
    parts += [f"grad_norm: {metrics['grad_norm']:.4f}", f"lr: {metrics['lr']:.3e}"]
    parts += [f"tok/s: {metrics['tok/s']:,.0f}", f"tok/s/gpu: {metrics['tok/s/gpu']:,.0f}"]
    if "mfu" in metrics:
        parts.append(f"mfu: {metrics['mfu']:.1%}")
    parts.append(f"memory: {metrics['memory']:.2f}GiB")
    parts.append(f"[{clock(metrics['elapsed'])}<{clock(metrics['eta'])}]")
    return "  ".join(parts)


class MetricsLog:
    """metrics.jsonl, and TensorBoard or W&B if enabled.

    A resumed run goes on in the existing file, which then has each step once: what an interrupted
    run wrote after the checkpoint is dropped, and so is a line that it did not complete. A run from
    scratch moves an earlier file aside, to metrics-1.jsonl and so on.

    Args:
        resumed_step: later lines are dropped, because those steps will be taken again.

    Raises:
        OSError: metrics.jsonl cannot be written.
    """

    def __init__(self, config: Config, resumed_step: int) -> None:
        folder = Path(config.job.dump_folder)
        self.path = folder / "metrics.jsonl"
        if resumed_step:
            _drop_after(self.path, resumed_step)
        else:
            _move_aside(self.path)
        with self.path.open("a"):
            pass
        self._failed = False
        self._tensorboard = self._wandb = None
        if config.metrics.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tb", purge_step=resumed_step + 1)
        if config.metrics.enable_wandb:
            import wandb

            self._wandb = wandb.init(dir=str(folder), resume="allow")

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one step."""
        size = None
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                file.write(json.dumps(metrics).encode() + b"\n")
            self._failed = False
        except OSError as error:
            if size is not None:
                # Half a line would spoil the next one.
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            # A full disk must not end the run.
            if not self._failed:
                print(f"warning: {self.path} cannot be written: {error}", flush=True)
            self._failed = True
        step = metrics["step"]
        numbers = {key: value for key, value in metrics.items() if key != "step"}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def plot_loss(metrics_path: Path) -> Path | None:
    """Draw training and validation loss over steps to loss.png beside metrics.jsonl.

    Returns:
        The picture's path; None if there is nothing to draw, or it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = _read(metrics_path)
    if not records:
        return None
    steps = [each["step"] for each in records]
    losses = [each["loss"] for each in records]
    window = max(1, len(records) // 40)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(steps, losses, color="C0", alpha=0.25)
    label = "train" if window == 1 else f"train, mean of {window} records"
    axes.plot(steps, moving_average(losses, window), color="C0", label=label)
    validated = [
        (each["step"], each["val_loss"])
        for each in records
        if isinstance(each.get("val_loss"), int | float)
    ]
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color="C1", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = metrics_path.with_name("loss.png")
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except OSError as error:
        # A full disk must not change the run's exit code.
        print(f"warning: {path} cannot be written: {error}", flush=True)
        return None
    finally:
        pyplot.close(figure)
    return path


def moving_average(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 values before it."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one per step, ascending. Of a step that was taken again, the
    last; lines that are incomplete or none of this code's are left out."""
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line, allow_nan=True)
        except ValueError:
            continue
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            continue
        losses = (record.get("loss"), record.get("val_loss", 0.0))
        if all(type(each) in (int, float) for each in losses):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [each for each in _read(path) if each["step"] <= step]
    staging = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        staging.write_text("".join(json.dumps(each) + "\n" for each in kept), encoding="utf-8")
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _move_aside(path: Path) -> None:
    if not path.is_file() or not path.stat().st_size:
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    os.rename(path, aside)
    print(f"metrics of an earlier run: {aside}", flush=True)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
