"""Checks that run in Triton's interpreter, in a process of their own.

TRITON_INTERPRET is read when triton is imported, so a test module runs itself as a program, and
reads from its output which of its cases failed:

    errors = interpreter.errors(__name__)                       # {case: traceback or None}
    if __name__ == "__main__": interpreter.report(CASES)
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tests.poison import ALLOCATORS, poisoned

# Seconds, of one process: all of its cases wait for it.
TIMEOUT = 280
ROOT = Path(__file__).parents[4]


@functools.cache
def _started(module: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@functools.cache
def errors(module: str, *arguments: str, groups: tuple[str, ...] = ()) -> dict[str, str | None]:
    """The traceback of each case that failed, None for each that did not.

    groups: other arguments with which the module is started at the same time.
    """
    for group in groups:
        _started(module, group)
    process = _started(module, *arguments)
    output, problems = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, problems
    return json.loads(output.splitlines()[-1])


def report(cases: dict[str, Callable[[], object]]) -> None:
    """Run all cases in poisoned memory and write one line of JSON."""
    for owner, name in ALLOCATORS:
        setattr(owner, name, poisoned(getattr(owner, name)))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = dict.fromkeys(cases)
    for name, case in cases.items():
        try:
            case()
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
