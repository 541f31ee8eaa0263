"""The relay kernel: under Triton's interpreter, and compiled for Hopper."""

import itertools

import pytest

from lasp.ops.triton.relay import CHUNK, relay_kernel
from tests.lasp.ops import interpreter
from tests.lasp.ops.relay_checks import CASES
from tests.lasp.ops.test_triton_compile import compile_for_hopper, spilled_bytes


@pytest.mark.parametrize("case", CASES)
def test_passes_states_on(case):
    error = interpreter.errors("tests.lasp.ops.relay_checks")[case]
    assert error is None, error


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
