"""The pool of processes: none of them outlives the process of the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import Pool

ROOT = Path(__file__).parents[1]


def say_and_stay(group, folder):
    """A job that is deaf to all but a kill, as a rank is that waits for another in NCCL."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    (folder / str(os.getpid())).touch()
    time.sleep(300)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    # Dead, and its new parent has not asked yet.
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel must end them, Linux has that")
def test_ranks_end_with_the_process_of_the_tests(tmp_path):
    command = [sys.executable, "-m", "tests.test_distributed", str(tmp_path)]
    tests = subprocess.Popen(command, cwd=ROOT)
    pids = []
    try:
        while len(pids) < 2:
            assert tests.poll() is None, "it ended before its ranks were at work"
            time.sleep(0.05)
            pids = [int(file.name) for file in tmp_path.iterdir()]
        assert all(map(is_running, pids))
        # As at a timeout: nothing is told to the ranks.
        tests.kill()
        tests.wait()
        deadline = time.monotonic() + 20
        while any(map(is_running, pids)):
            assert time.monotonic() < deadline, "ranks outlive the process that started them"
            time.sleep(0.05)
    finally:
        tests.kill()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    from tests.test_distributed import say_and_stay as by_name

    Pool({2: (0, 1)}).run(by_name, Path(sys.argv[1]), size=2)
