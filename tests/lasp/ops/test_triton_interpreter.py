"""The Triton kernels under Triton's interpreter: masks, packing, segments, strides, decays."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lasp.ops.triton_checks import GROUPS

ROOT = Path(__file__).parents[3]


@functools.cache
def errors_of(group):
    """{case: error or None}, from a process in which triton was imported as an interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.lasp.ops.triton_checks", group]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("group", "case"),
    [pytest.param(group, case, id=case) for group, cases in GROUPS.items() for case in cases],
)
def test_matches_token_loop(group, case):
    error = errors_of(group)[case]
    assert error is None, error
