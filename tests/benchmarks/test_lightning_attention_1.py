"""Lightning Attention-1, the baseline: in Triton's interpreter against float64, and compiled."""

import sys
from pathlib import Path

import pytest
import torch

import lasp
from tests.lasp.cases import relative_error
from tests.lasp.ops.triton import interpreter
from tests.lasp.ops.triton.compiler import TARGETS, Resources, compiling

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import lightning_attention_1 as la1  # noqa: E402

# The modules there have common names.
del sys.path[0]


def check(B=1, T=1, H=2, D=16, E=16, dtype=torch.float32, strongest=0.3):
    # Strided, as queries, keys and values are in the output of one projection.
    size = max(D, E)
    q, k, v, do = torch.randn(B, T, H, 4, size).to(dtype).unbind(-2)
    q, k, v, do = 0.3 * q[..., :D], 0.3 * k[..., :D], v[..., :E], do[..., :E]
    log_decay = -torch.linspace(0.01, strongest, H)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    o = la1.lightning_attention_1(*leaves, log_decay)
    truth, _ = lasp.reference.quadratic(*exact, log_decay.double())
    found = [o, *torch.autograd.grad(o, leaves, do)]
    wanted = [truth, *torch.autograd.grad(truth, exact, do.double())]
    bound = 1e-6 if dtype == torch.float32 else 2e-3
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert relative_error(got.detach(), want.detach()) < bound


CASES = {
    "one token": lambda: check(D=8, E=8),
    "63 tokens, wider values": lambda: check(B=2, T=63, H=3, D=24, E=40),
    "100 tokens, wider keys, strong decay": lambda: check(T=100, D=32, E=16, strongest=80.0),
    "300 tokens of 128, float16": lambda: check(T=300, D=128, E=128, dtype=torch.float16),
    "130 tokens, keys of 256, float16": lambda: check(T=130, D=256, E=128, dtype=torch.float16),
}


@pytest.mark.timeout(interpreter.TIMEOUT + 100)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case):
    error = interpreter.errors(__name__)[case]
    assert error is None, error


@pytest.mark.parametrize("dims", [(128, 128), (256, 128), (128, 256)])
@pytest.mark.parametrize("reverse", [False, True])
def test_compiles_to_hopper_products_without_spills(dims, reverse):
    D, E = dims
    a = torch.zeros(1, 256, 2, D, dtype=torch.bfloat16)
    x = torch.zeros(1, 256, 2, E, dtype=torch.bfloat16)
    with compiling(TARGETS["sm_90"]) as results:
        la1.masked_product(a, a, x, torch.zeros(2), reverse=reverse)
    (compiled,) = results
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "mma.sync" not in compiled.asm["ptx"], "a product fell back to older instructions"
    used = Resources.of(compiled)
    assert used.spilled == 0
    assert used.shared_memory <= TARGETS["sm_86"].shared_memory, "must fit smaller GPUs too"


def test_wrong_arguments_are_refused():
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match="a head has 257 values: the limit is 256"):
        la1.lightning_attention_1(torch.zeros(1, 3, 2, 257), q, q, torch.zeros(2))
    with pytest.raises(ValueError, match="give q, k and v of one dtype, and log_decay as float32"):
        la1.lightning_attention_1(q, q, q.half(), torch.zeros(2))


if __name__ == "__main__":
    interpreter.report(CASES)
