"""Jobs of several ranks without torchrun, of which single ranks can be stopped or killed.

    job = Job(folder, arguments, size=2, strike=Strike("backward", step=3, rank=1, number=SIGSTOP))
    codes = job.wait(60)          # exit codes by rank; None for a rank that has not ended
    job.output(0)                 # what it printed

A server that has imported the launcher forks the ranks, in a fraction of the time of a new process.
This process holds the store, as torchrun does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

# Seconds: for a loaded machine.
START = 300


@dataclass(frozen=True)
class Strike:
    """A signal that a rank sends itself: at a moment of the step after `step` steps."""

    moment: str
    step: int = 0
    rank: int = 1
    number: int = signal.SIGSTOP

    def arm(self) -> None:
        """Have this process struck at its moment."""
        MOMENTS[self.moment](self)

    def now(self) -> None:
        """Send the signal; if its number is 0, hang while all other threads run."""
        # The heartbeat, a thread, reports the phase meanwhile.
        time.sleep(0.5)
        print(f"strike: {time.time()}", flush=True)
        if self.number:
            os.kill(os.getpid(), self.number)
        else:
            time.sleep(3600)


def _before(module, name: str, strike: Strike, is_due=lambda *args: True) -> None:
    """Strike before the first call of a function that is due."""
    real = getattr(module, name)

    def wrapped(*args, **kwargs):
        if is_due(*args):
            strike.now()
        return real(*args, **kwargs)

    setattr(module, name, wrapped)


def _in_set_up(strike: Strike) -> None:
    from launch import distributed

    _before(distributed, "build_mesh", strike)


def _in_model_set_up(strike: Strike) -> None:
    from launch import train

    _before(train, "build_model", strike)


def _at_step(module: str, name: str):
    """Strike before a function whose first argument is the TrainState, after `step` steps."""

    def arm(strike: Strike) -> None:
        _before(sys.modules[module], name, strike, lambda state, *_: state.step == strike.step)

    return arm


def _in_model(method: str):
    """Strike in the forward of the model's last block, or in its backward."""

    def arm(strike: Strike) -> None:
        from launch import train

        real = train.train_step

        def wrapped(state):
            block = list(state.model.blocks)[-1]
            add = getattr(block, method)
            hook = add(lambda *_: strike.now()) if state.step == strike.step else None
            try:
                return real(state)
            finally:
                if hook is not None:
                    hook.remove()

        train.train_step = wrapped

    return arm


MOMENTS = {
    "set-up": _in_set_up,
    "building the model": _in_model_set_up,
    "reading data": _at_step("launch.trainer", "read_step"),
    "forward": _in_model("register_forward_pre_hook"),
    "backward": _in_model("register_full_backward_hook"),
    "reduction": _at_step("launch.trainer", "reduce_step"),
    "save": _at_step("launch.train", "start_save"),
    "end of a save": _at_step("launch.train", "finish_save"),
    "validation": _at_step("launch.train", "validate"),
}


def _rank(rank: int, size: int, port: int, path: str, arguments: list[str], strikes) -> None:
    """The process of a rank."""
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    from launch import train

    for strike in strikes:
        if strike.rank == rank:
            strike.arm()
    code = 1
    try:
        code = train.main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Job:
    """A running job.

    Args:
        folder: for what the ranks print.
        arguments: of launch/train.py; or a list of them, one per rank.
        store: of an earlier start, as after a restart by torchrun; None: a new one.
    """

    def __init__(
        self,
        folder: Path,
        arguments: list,
        size: int = 2,
        strikes: tuple[Strike, ...] = (),
        store: dist.TCPStore | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store = store or dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["launch.train"])
        self._paths = [folder / f"rank-{rank}.log" for rank in range(size)]
        of_rank = arguments if isinstance(arguments[0], list) else [arguments] * size
        self.processes = [
            context.Process(
                target=_rank,
                args=(rank, size, self.store.port, str(path), of_rank[rank], strikes),
                daemon=True,
            )
            for rank, path in enumerate(self._paths)
        ]
        for path, process in zip(self._paths, self.processes, strict=True):
            path.write_text("")
            process.start()

    def output(self, rank: int) -> str:
        return self._paths[rank].read_text()

    def outputs(self) -> str:
        return "\n".join(f"rank {n}:\n{self.output(n)}" for n in range(len(self.processes)))

    def wait(self, seconds: float, ranks: list[int] | None = None) -> list[int | None]:
        """Exit codes, once the processes of `ranks` (all) have ended or the time is over."""
        deadline = time.monotonic() + seconds
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for(self, text: str, rank: int = 0, seconds: float = START) -> bool:
        """Wait until a rank has printed something; False if it ended or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if text in self.output(rank):
                return True
            if self.processes[rank].exitcode is not None:
                return text in self.output(rank)
            time.sleep(0.02)
        return False

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL, and wait until they are gone."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGKILL)
        for rank in ranks:
            self.processes[rank].join()

    def end(self) -> None:
        """Nothing of the job is left."""
        self.kill(list(range(len(self.processes))))
