"""The LRPE kernels: under Triton's interpreter, and compiled for Hopper."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lasp.ops.triton.lrpe import TOKENS, lrpe_backward_kernel, lrpe_kernel
from tests.lasp.ops.lrpe_checks import CASES
from tests.lasp.ops.test_triton_compile import compile_for_hopper, spilled_bytes

ROOT = Path(__file__).parents[3]


@functools.cache
def errors():
    """{case: error or None}, from a process in which triton was imported as an interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.lasp.ops.lrpe_checks"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_matches_the_equation(case):
    assert errors()[case] is None, errors()[case]


@pytest.mark.parametrize("kernel", [lrpe_kernel, lrpe_backward_kernel])
def test_compiles_to_vector_loads_without_spills(kernel):
    bf16 = [name for name in kernel.arg_names if name.startswith("p_")]
    types = dict.fromkeys(bf16, "*bf16") | {"p_turns": "*fp64", "p_rates": "*fp64"}
    compiled = compile_for_hopper(kernel, dict(D=128, BD=128, BT=TOKENS), types, 4, 3)
    assert spilled_bytes(compiled) == 0
    assert "ld.global.v4.b32" in compiled.asm["ptx"], "loads are not whole vectors"
    assert "st.global.v4.b32" in compiled.asm["ptx"], "stores are not whole vectors"
