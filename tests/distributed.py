"""Pools of processes that run tests over ranks.

    results = pool.run(function, arg, size=3)        # [function(group, arg) on each rank]
    outcomes = pool.outcomes(function, arg, size=3)  # the same, exceptions returned, not raised

`function` is a module-level function of a test file; its first argument is the process group of the
ranks. A pool starts at its first job and serves all later ones, in milliseconds each. Starting it
counts in no job's deadline: one process imports torch and forks the others. A job that passes its
deadline fails alone: the stacks of all ranks are printed, and the next job gets new processes.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

import lasp  # noqa: F401 (so that workers are forked with it)
from tests.cleanup import end_descendants_with_this_process

# Seconds. The slowest job takes about 20 on two idle cores; pytest's own limit, in pyproject.toml,
# is above the sum of both.
JOB_TIMEOUT = 300
START_TIMEOUT = 300
# Groups of meshes that jobs may leave in a worker; each has threads that cost all later jobs time.
MESH_GROUPS = 50


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback."""


class Pool:
    """Worker processes for jobs of the given numbers of ranks.

    Args:
        sizes: numbers of ranks that jobs may have; the largest is the number of processes.
        backend: "gloo", or "nccl" with one GPU per process.
        timeout: seconds that a job may take, unless it is given its own.
        environment: variables that are set before the workers import anything but torch.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (1, 2, 3, 4),
        backend: str = "gloo",
        timeout: float = JOB_TIMEOUT,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._groups = {size: members(size, max(sizes)) for size in sizes}
        self._backend = backend
        self._timeout = timeout
        self._environment = environment or {}
        self._parent: multiprocessing.Process | None = None
        self._pipes: list = []
        self._pids: list[int] = []
        # Before multiprocessing's own handler, which would wait for the workers.
        atexit.register(self.stop)

    def run(self, function: Callable, *args, size: int, timeout: float | None = None) -> list:
        """Results by group rank; raises RankFailed if any rank raised."""
        outcomes = self.outcomes(function, *args, size=size, timeout=timeout)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                text = getattr(outcome, "rank_traceback", "")
                raise RankFailed(f"rank {rank} of {size}:\n{text}") from outcome
        return outcomes

    def outcomes(self, function: Callable, *args, size: int, timeout: float | None = None) -> list:
        """Results or exceptions by group rank; TimeoutError if a rank gives no answer."""
        timeout = timeout or self._timeout
        self._start()
        try:
            for worker in self._groups[size]:
                self._pipes[worker].send_bytes(pickle.dumps((function, args, size)))
            deadline = time.monotonic() + timeout
            what = f"of {size} in {function.__name__}"
            answers = [
                self._answer(worker, deadline - time.monotonic(), f"rank {rank} {what}")
                for rank, worker in enumerate(self._groups[size])
            ]
        except BaseException as error:
            # Also when pytest interrupts the test: answers still to come are not the next job's.
            self.stop(dump=not isinstance(error, RankFailed))
            raise
        if any(num_groups > MESH_GROUPS for _, num_groups in answers):
            self.stop()
        return [answer for answer, _ in answers]

    def stop(self, dump: bool = False) -> None:
        """End all workers; with `dump` they print their stacks first."""
        if self._parent is None:
            return
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                if dump:
                    os.kill(pid, signal.SIGUSR1)
                    time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
        # It ends when its workers have.
        self._parent.join(1 if self._pids else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._parent.pid, signal.SIGKILL)
        self._parent.kill()
        self._parent.join()
        for pipe in (*self._pipes, self._deaths):
            pipe.close()
        self._parent, self._pipes, self._pids = None, [], []
        self._folder.cleanup()

    def _answer(self, worker, timeout, who):
        if not self._pipes[worker].poll(max(timeout, 0)):
            raise TimeoutError(f"{who} gave no answer in time")
        try:
            return pickle.loads(self._pipes[worker].recv_bytes())
        except EOFError:
            code = "unknown"
            while self._deaths.poll(5):
                died, code = self._deaths.recv()
                if died == worker:
                    break
            # Its stack is in the captured output.
            raise RankFailed(f"{who} died, exit code {code} (negative: the signal)") from None

    def _start(self) -> None:
        if self._parent is not None and not self._deaths.poll():
            return
        self.stop()
        end_descendants_with_this_process()
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._deaths, deaths = context.Pipe(duplex=False)
        world_size = max(self._groups)
        pairs = [context.Pipe() for _ in range(world_size)]
        self._pipes, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        store = str(Path(self._folder.name) / "store")
        settings = (self._groups, self._backend, self._timeout, store)
        arguments = (settings, self._environment, theirs, deaths)
        self._parent = context.Process(target=_fork_workers, args=arguments)
        try:
            self._parent.start()
            for pipe in (*theirs, deaths):
                pipe.close()
            for worker, pipe in enumerate(self._pipes):
                if not pipe.poll(START_TIMEOUT):
                    raise TimeoutError(f"process {worker} did not start in {START_TIMEOUT} s")
                self._pids.append(pickle.loads(pipe.recv_bytes())[0])
        except BaseException:
            self.stop(dump=True)
            raise


def members(size: int, world_size: int) -> tuple[int, ...]:
    """The processes of a group: shifted and strided, so that group ranks are not global ranks."""
    return tuple(world_size - 1 - world_size * i // size for i in reversed(range(size)))


def _fork_workers(settings, environment, pipes, deaths) -> None:
    """The parent of the workers: reports those that end, (number, exit code)."""
    # So that all can be ended at once, with what they have started.
    os.setpgid(0, 0)
    os.environ.update(environment)
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(settings, worker, pipes))
        for worker in range(len(pipes))
    ]
    for worker in workers:
        worker.start()
    for pipe in pipes:
        pipe.close()
    numbers = {worker.sentinel: number for number, worker in enumerate(workers)}
    while numbers:
        for sentinel in wait(list(numbers)):
            number = numbers.pop(sentinel)
            workers[number].join()
            deaths.send((number, workers[number].exitcode))


def _work(settings, rank, pipes) -> None:
    """Join the world, then serve jobs until the pipe closes."""
    members_of, backend, timeout, store = settings
    pipe = pipes[rank]
    for other in pipes:
        if other is not pipe:
            other.close()
    torch.set_num_threads(1)
    faulthandler.enable(file=sys.__stderr__)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, len(pipes)),
        rank=rank,
        world_size=len(pipes),
        # A rank that waits for one that never comes says so before the job's time is over.
        timeout=timedelta(seconds=timeout / 2),
    )
    groups = {size: dist.new_group(list(workers)) for size, workers in members_of.items()}
    ours = set(dist.distributed_c10d._world.pg_map)
    answer, left = os.getpid(), []
    while True:
        pipe.send_bytes(pickle.dumps((answer, len(left))))
        try:
            function, args, size = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = function(groups[size], *args)
        except BaseException as error:
            error.rank_traceback = traceback.format_exc()
            answer = error
        left = set(dist.distributed_c10d._world.pg_map) - ours
        for group in [group for group in left if not group.group_desc.startswith("mesh")]:
            dist.destroy_process_group(group)
            left.remove(group)
        # Those of meshes stay: DTensor remembers them by the mesh, and a later one may be equal.
