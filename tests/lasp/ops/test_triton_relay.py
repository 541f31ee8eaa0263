"""The relay kernel: under Triton's interpreter, and compiled for Hopper."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lasp.ops.triton.relay import CHUNK, relay_kernel
from tests.lasp.ops.relay_checks import CASES
from tests.lasp.ops.test_triton_compile import compile_for_hopper, spilled_bytes

ROOT = Path(__file__).parents[3]


@functools.cache
def errors():
    """{case: error or None}, from a process in which triton was imported as an interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.lasp.ops.relay_checks"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_passes_states_on(case):
    assert errors()[case] is None, errors()[case]


@pytest.mark.parametrize(
    "receives, sends", [each for each in itertools.product((True, False), repeat=2) if any(each)]
)
def test_compiles_to_packets_that_are_written_whole(receives, sends):
    types = {"p_inbox": "*i64", "p_outbox": "*i64", "p_counters": "*i32", "p_previous": "*i32"}
    constants = dict(SIZE=128 * 128, CHUNK=CHUNK, num_floats=16 * 128 * 128, WAITS=True)
    constants |= dict(RECEIVES=receives, SENDS=sends, PASSES=True)
    compiled = compile_for_hopper(relay_kernel, constants, types, num_warps=8, num_stages=3)
    assert spilled_bytes(compiled) == 0
    ptx = compiled.asm["ptx"]
    # Never less than eight bytes at once: half a packet could be taken for all of it.
    if sends:
        assert "st.global.v2.b64" in ptx
        assert "ld.global.sys.acquire" in ptx, "an inbox is written to before it was read"
    if receives:
        assert "ld.volatile.global.v2.b64" in ptx
        assert "st.release.sys.global.u32" in ptx
    assert "globaltimer" in ptx and "trap" in ptx
