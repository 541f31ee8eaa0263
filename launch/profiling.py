"""Profiler traces and memory snapshots of a few early steps, if enabled."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from launch.config import Config
from launch.distributed import DistContext

# After compilation and allocator warm-up.
_FIRST, _STEPS = 5, 3


@contextlib.contextmanager
def profiled(config: Config, ctx: DistContext) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step; files go to <dump_folder>/profiling."""
    folder = Path(config.job.dump_folder, "profiling")
    with contextlib.ExitStack() as stack:
        callbacks: list[Callable[[], None]] = []
        if config.profiling.enable_profiling:
            folder.mkdir(parents=True, exist_ok=True)
            trace = str(folder / f"trace-rank{ctx.rank}.json")
            profiler = stack.enter_context(
                torch.profiler.profile(
                    schedule=torch.profiler.schedule(
                        wait=_FIRST - 2, warmup=1, active=_STEPS, repeat=1
                    ),
                    on_trace_ready=lambda done: done.export_chrome_trace(trace),
                )
            )
            callbacks.append(profiler.step)
        if config.profiling.enable_memory_snapshot and ctx.device.type == "cuda":
            folder.mkdir(parents=True, exist_ok=True)
            callbacks.append(_memory_snapshots(str(folder / f"memory-rank{ctx.rank}.pickle")))
        yield lambda: [each() for each in callbacks] and None


def _memory_snapshots(path: str) -> Callable[[], None]:
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == _FIRST - 1:
            torch.cuda.memory._record_memory_history()
        elif steps == _FIRST - 1 + _STEPS:
            torch.cuda.memory._dump_snapshot(path)
            torch.cuda.memory._record_memory_history(enabled=None)

    return after_step
