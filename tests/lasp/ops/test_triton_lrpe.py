"""The LRPE kernels: under Triton's interpreter, and compiled for Hopper."""

import pytest

from lasp.ops.triton.lrpe import TOKENS, lrpe_backward_kernel, lrpe_kernel
from tests.lasp.ops import interpreter
from tests.lasp.ops.lrpe_checks import CASES
from tests.lasp.ops.test_triton_compile import compile_for_hopper, spilled_bytes


@pytest.mark.parametrize("case", CASES)
def test_matches_the_equation(case):
    error = interpreter.errors("tests.lasp.ops.lrpe_checks")[case]
    assert error is None, error


@pytest.mark.parametrize("kernel", [lrpe_kernel, lrpe_backward_kernel])
def test_compiles_to_vector_loads_without_spills(kernel):
    bf16 = [name for name in kernel.arg_names if name.startswith("p_")]
    types = dict.fromkeys(bf16, "*bf16") | {"p_turns": "*fp64", "p_rates": "*fp64"}
    compiled = compile_for_hopper(kernel, dict(D=128, BD=128, BT=TOKENS), types, 4, 3)
    assert spilled_bytes(compiled) == 0
    assert "ld.global.v4.b32" in compiled.asm["ptx"], "loads are not whole vectors"
    assert "st.global.v4.b32" in compiled.asm["ptx"], "stores are not whole vectors"
