"""Pools of ranks: what a job that hangs, dies or is interrupted leaves to the next one, and to the
machine."""

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.cleanup import with_variable
from tests.distributed import Pool, RankFailed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two():
    pool = Pool((2,))
    yield pool
    pool.stop()


def answer(group, value):
    return value, dist.get_rank(group)


def hang_on_rank_1(group):
    if dist.get_rank(group) == 1:
        time.sleep(1000)


def test_a_hanging_job_fails_with_its_stacks_and_the_next_one_runs(two, capfd):
    with pytest.raises(TimeoutError, match="rank 1 of 2 in hang_on_rank_1 gave no answer"):
        two.run(hang_on_rank_1, size=2, timeout=2)
    assert "in hang_on_rank_1" in capfd.readouterr().err
    assert two.run(answer, "next", size=2) == [("next", 0), ("next", 1)]


def end_rank_0(group):
    if dist.get_rank(group) == 0:
        os._exit(7)


def test_a_rank_that_ends_is_reported_with_its_exit_code(two):
    with pytest.raises(RankFailed, match="rank 0 of 2 in end_rank_0 died, exit code 7"):
        two.run(end_rank_0, size=2)
    assert two.run(answer, "next", size=2) == [("next", 0), ("next", 1)]


class Interrupted(Exception):
    pass


def test_an_interrupted_test_leaves_no_answers_to_the_next(two):
    def interrupt(*_):
        raise Interrupted

    two.run(answer, "started", size=2)
    before = signal.signal(signal.SIGUSR2, interrupt)
    parent = os.getpid()
    try:
        with pytest.raises(Interrupted):
            two.run(interrupt_the_test, parent, size=2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert two.run(answer, "next", size=2) == [("next", 0), ("next", 1)]


def interrupt_the_test(group, parent):
    """As pytest's own limit does: by a signal, while the test waits."""
    if dist.get_rank(group) == 1:
        os.kill(parent, signal.SIGUSR2)
    time.sleep(1 - dist.get_rank(group))
    return "too late"


def leave_a_group(group):
    dist.new_group()
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_groups_that_jobs_leave_behind_cost_no_threads(two):
    threads = [two.run(leave_a_group, size=2) for _ in range(6)]
    assert threads[-1] == threads[1]


def stay(folder):
    """A process that only a kill ends, as a rank does that waits in NCCL."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    (folder / str(os.getpid())).touch()
    time.sleep(300)


def stay_with_a_child_in_another_session(group, folder):
    child = f"import pathlib, tests.test_distributed as t; t.stay(pathlib.Path({str(folder)!r}))"
    subprocess.Popen([sys.executable, "-c", child], cwd=ROOT, start_new_session=True)
    stay(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="finds descendants in /proc")
def test_nothing_that_a_killed_run_started_outlives_it(tmp_path):
    command = [sys.executable, "-m", "tests.test_distributed", str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT)
    variable = f"LASP_TESTS_OF_{run.pid}"
    try:
        # Two ranks, a child of each, and the worker of an executor.
        while len(list(tmp_path.iterdir())) < 5:
            assert run.poll() is None, "it ended before its processes were at work"
            time.sleep(0.05)
        assert {int(file.name) for file in tmp_path.iterdir()} <= set(with_variable(variable))
        run.kill()
        run.wait()
        deadline = time.monotonic() + 100
        while with_variable(variable):
            assert time.monotonic() < deadline, "processes outlive the run that started them"
            time.sleep(0.05)
    finally:
        run.kill()
        for pid in with_variable(variable):
            os.kill(pid, signal.SIGKILL)


def main(folder):
    # By the module's name, as pytest has it: workers import it.
    from tests import test_distributed as here

    pool = Pool((2,))
    pool.run(here.answer, "started", size=2)
    executor = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    executor.submit(here.stay, folder)
    pool.run(here.stay_with_a_child_in_another_session, folder, size=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
