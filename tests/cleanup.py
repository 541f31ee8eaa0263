"""Ends whatever a test run started, as soon as the run has ended, however it ended.

A run that is killed stops nothing. Workers in the middle of a job, the workers of an executor, and
what any of these started in a session of its own would go on. So a run sets a variable that its
descendants inherit, and a process beside it waits for its end and kills all that have the variable.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Seconds in which a killed process must be gone; one that the kernel cannot end is left.
PATIENCE = 60


def end_descendants_with_this_process() -> None:
    """Have all processes that this one starts from now on killed after its end (on Linux)."""
    variable = f"LASP_TESTS_OF_{os.getpid()}"
    if variable in os.environ or not Path("/proc/self/environ").exists():
        return
    # Isolated: this folder is not searched for modules, where `operator` is not Python's own.
    command = [sys.executable, "-IS", __file__, str(os.getpid()), variable]
    nothing = subprocess.DEVNULL
    # In a session of its own: Ctrl-C ends the run and not this.
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    os.environ[variable] = "1"


def with_variable(variable: str) -> list[int]:
    """Processes that were started with an environment variable; zombies are not among them."""
    entry, found = f"\0{variable}=".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in b"\0" + (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def main(parent: int, variable: str) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    deadline = time.monotonic() + PATIENCE
    # Again, for what was being started meanwhile.
    while (pids := with_variable(variable)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
