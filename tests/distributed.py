"""A pool of real processes for distributed tests: started once, tens of milliseconds per test.

    results = pool.run(function, arg, size=3)        # [function(group, arg) on each rank]
    outcomes = pool.outcomes(function, arg, size=3)  # the same, exceptions returned, not raised

`function` is a module-level function of a test file; it gets the process group of its ranks first.
The processes form one gloo world over a file store (no ports); a test of size n runs on a group of
n of them, chosen so that group ranks are not global ranks. A test that times out costs the pool:
its processes are killed, with their stacks printed, and the next test starts new ones. None of them
outlives the process of the tests, however that one ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig

# Which processes serve a test of a given size: shifted and strided, so that group ranks are not
# global ranks.
MEMBERS = {1: (2,), 2: (1, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}
START_TIMEOUT = 100


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback."""


class Pool:
    """Worker processes that outlive a test.

    Args:
        members: for each size of a test, the processes that serve it.
        backend: "gloo", or "nccl" with one GPU per process.
        timeout: seconds that a job may take, unless it is given its own.
    """

    def __init__(
        self,
        members: dict[int, tuple[int, ...]] | None = None,
        backend: str = "gloo",
        timeout: float = 60,
    ) -> None:
        self._members = members or MEMBERS
        self._backend = backend
        self._timeout = timeout
        self._workers: list = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, function: Callable, *args, size: int, timeout: float | None = None) -> list:
        """Results by group rank; raises RankFailed if any rank raised."""
        outcomes = self.outcomes(function, *args, size=size, timeout=timeout)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                text = getattr(outcome, "rank_traceback", "")
                raise RankFailed(f"rank {rank} of {size}:\n{text}") from outcome
        return outcomes

    def outcomes(self, function: Callable, *args, size: int, timeout: float | None = None) -> list:
        """Results or exceptions by group rank; TimeoutError if a rank does not come back."""
        timeout = timeout or self._timeout
        self._start()
        job = pickle.dumps((function, args, size))
        members = self._members[size]
        for place in members:
            self._workers[place][1].send_bytes(job)
        outcomes = []
        for rank, place in enumerate(members):
            process, pipe = self._workers[place]
            if not self._answers(process, pipe, timeout):
                self.stop(dump=True)
                raise TimeoutError(
                    f"rank {rank} of {size} gave no answer to {function.__name__} in {timeout} s"
                )
            try:
                outcomes.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                process.join()
                # Its stack is in the captured output; the next test starts new processes.
                raise RankFailed(
                    f"rank {rank} of {size} died in {function.__name__}, exit code "
                    f"{process.exitcode} (negative: the signal)"
                ) from None
        return outcomes

    def stop(self, dump: bool = False) -> None:
        """End all workers; with `dump` they print their stacks first."""
        for process, pipe in self._workers:
            if dump and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                process.join(0.3)
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()

    def _answers(self, process, pipe, timeout) -> bool:
        with contextlib.suppress(OSError):
            return pipe.poll(timeout)
        return False

    def _start(self) -> None:
        if self._workers and all(process.is_alive() for process, _ in self._workers):
            return
        self.stop()
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        world_size = 1 + max(place for members in self._members.values() for place in members)
        store = str(Path(self._folder.name) / "store")
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, self._members, self._backend, self._timeout, store)
            process = context.Process(target=_work, args=(*arguments, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        # Before a test's clock starts: on a busy machine importing torch takes long.
        for rank, (process, pipe) in enumerate(self._workers):
            if not self._answers(process, pipe, START_TIMEOUT):
                self.stop(dump=True)
                raise TimeoutError(f"process {rank} did not start in {START_TIMEOUT} s")
            pipe.recv_bytes()


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends (on Linux).

    pytest-timeout ends a process at once, without a word to those that it started. A closed pipe is
    not seen in the middle of a job, and a thread that watches may never run while a rank waits for
    another in a kernel of NCCL: it would keep its GPU busy under whatever runs next.
    """
    _prctl_pr_set_pdeathsig(number)


def _work(rank, world_size, members, backend, timeout, store_path, pipe) -> None:
    """Worker: join the world, then serve jobs until the pipe closes."""
    end_with_parent()
    if os.getppid() != multiprocessing.parent_process().pid:
        return  # It ended before the kernel was asked.
    torch.set_num_threads(1)
    faulthandler.enable(file=sys.__stderr__)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store_path, world_size),
        rank=rank,
        world_size=world_size,
        # Who waits for a rank that never comes says so before the job's time is over.
        timeout=timedelta(seconds=timeout / 2),
    )
    groups = {size: dist.new_group(list(places)) for size, places in members.items()}
    pipe.send_bytes(b"ready")
    while True:
        try:
            function, args, size = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            outcome = function(groups[size], *args)
        except BaseException as error:
            error.rank_traceback = traceback.format_exc()
            outcome = error
        pipe.send_bytes(pickle.dumps(outcome))
