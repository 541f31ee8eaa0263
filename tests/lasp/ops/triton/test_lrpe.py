"""The LRPE kernels: in Triton's interpreter against float64, and compiled for Hopper."""

import pytest
import torch

from lasp.ops.triton.launch_config import LRPE_MAX_ROWS, LRPE_TOKENS
from lasp.ops.triton.lrpe import lrpe, lrpe_backward
from tests.lasp.cases import relative_error
from tests.lasp.ops.triton import interpreter
from tests.lasp.ops.triton.compiler import spilled_bytes


def equation(x, theta, position):
    """[x cos(theta p), x sin(theta p)] in float64, x [B, T, H, D], theta [H, D]."""
    steps = torch.arange(position, position + x.shape[1], dtype=torch.float64)
    angle = theta * steps[:, None, None]
    return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


def check(B=1, T=1, H=2, D=16, position=0, dtype=torch.float32):
    # Strided, as queries and keys are in the output of one projection.
    q, k, grads_q, grads_k = torch.randn(4, B, T, H, 2, 2 * D).to(dtype).unbind(0)
    q, k = q[..., 0, :D], k[..., 1, :D]
    grads = grads_q[..., 0, :], grads_k[..., 1, :]
    theta = torch.rand(H, D)
    exact = [x.double().requires_grad_() for x in (q, k, theta)]
    wanted = [equation(x, exact[2], position) for x in exact[:2]]
    wanted_grads = torch.autograd.grad(wanted, exact, [x.double() for x in grads])
    outputs = lrpe(q, k, theta, position)
    into = lrpe_backward(*grads, q, k, theta, position)
    bound = 3e-7 if dtype == torch.float32 else 5e-4
    for got, want in zip((*outputs, *into[:2]), (*wanted, *wanted_grads[:2]), strict=True):
        assert got.dtype == dtype
        if T:
            assert relative_error(got, want) < bound
    assert into[2].dtype == torch.float64
    # A small sum of large terms of both signs, weighed by position.
    scale = (position + T) * (B * T) ** 0.5
    assert (into[2] - wanted_grads[2]).abs().max() < 1e-6 * max(scale, 1)


CASES = {
    "no token": lambda: check(T=0),
    "one token far out": lambda: check(B=2, T=1, position=2**22 - 5),
    "63 tokens, half a tile of values": lambda: check(B=3, T=63, H=3, D=24, position=17),
    "100 tokens, 128 values, float16": lambda: check(T=100, D=128, dtype=torch.float16),
    "more tiles than rows": lambda: check(
        T=LRPE_TOKENS * LRPE_MAX_ROWS + 33, H=1, position=2**20 + 17
    ),
}


@pytest.mark.timeout(interpreter.TIMEOUT + 100)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_equation(case):
    error = interpreter.errors(__name__)[case]
    assert error is None, error


def test_compiles_to_vector_loads_without_spills(compiled):
    q, k = torch.zeros(2, 1, 64, 4, 128, dtype=torch.bfloat16)
    grads = torch.zeros(2, 1, 64, 4, 256, dtype=torch.bfloat16)
    theta = torch.zeros(4, 128)
    lrpe(q, k, theta, 0)
    lrpe_backward(*grads, q, k, theta, 0)
    assert [kernel.name for kernel in compiled] == ["lrpe_kernel", "lrpe_backward_kernel"]
    for kernel in compiled:
        assert spilled_bytes(kernel) == 0
        assert "ld.global.v4.b32" in kernel.asm["ptx"], "loads are not whole vectors"
        assert "st.global.v4.b32" in kernel.asm["ptx"], "stores are not whole vectors"


if __name__ == "__main__":
    interpreter.report(CASES)
