"""The joined gradient of q, k, v, u: in Triton's interpreter, and compiled for Hopper."""

import pytest
import torch
import torch.nn.functional as F

from lasp.ops.triton.heads import split_heads_backward
from lasp.ops.triton.launch_config import HEADS_ROWS
from tests.lasp.cases import relative_error
from tests.lasp.ops.triton import interpreter
from tests.lasp.ops.triton.compiler import spilled_bytes


def check(B=1, T=1, H=2, D=16, dtype=torch.float32, activated=True, strided=False):
    qkvu = (3 * torch.randn(B, T, H, 4, D)).to(dtype)
    grads = torch.randn(4, B, T, H, D).to(dtype)
    if strided:
        qkvu = qkvu.transpose(0, 1).contiguous().transpose(0, 1)
        grads = grads.transpose(1, 2).contiguous().transpose(1, 2)
    exact = qkvu.double().requires_grad_()
    q, k, v, u = exact.unbind(-2)
    if activated:
        q, k = F.silu(q), F.silu(k)
    (wanted,) = torch.autograd.grad((q, k, v, u), exact, list(grads.double()))
    got = split_heads_backward(*grads, qkvu, activated)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == qkvu.shape
    if T:
        assert relative_error(got, wanted) < (3e-7 if dtype == torch.float32 else 5e-4)
    # What is not activated is copied to the bit.
    copied = slice(2 if activated else 0, 4)
    for joined, grad in list(zip(got.unbind(-2), grads, strict=True))[copied]:
        assert torch.equal(joined, grad)


CASES = {
    "no token": lambda: check(T=0),
    "one head of one token": lambda: check(H=1),
    "a last program that is not full, 24 values": lambda: check(B=2, T=HEADS_ROWS + 1, H=3, D=24),
    "128 values, float16": lambda: check(T=33, D=128, dtype=torch.float16),
    "no activation": lambda: check(T=9, D=256, activated=False),
    "strides": lambda: check(B=2, T=9, H=3, strided=True),
}


@pytest.mark.timeout(interpreter.TIMEOUT + 100)
@pytest.mark.parametrize("case", CASES)
def test_matches_autograd(case):
    error = interpreter.errors(__name__)[case]
    assert error is None, error


def test_compiles_to_vector_loads_without_spills(compiled):
    grads = torch.zeros(4, 1, 64, 4, 128, dtype=torch.bfloat16)
    split_heads_backward(*grads, torch.zeros(1, 64, 4, 4, 128, dtype=torch.bfloat16), True)
    (kernel,) = compiled
    assert kernel.name == "split_heads_backward_kernel"
    assert spilled_bytes(kernel) == 0
    assert "ld.global.v4.b32" in kernel.asm["ptx"], "loads are not whole vectors"
    assert "st.global.v4.b32" in kernel.asm["ptx"], "stores are not whole vectors"


if __name__ == "__main__":
    interpreter.report(CASES)
