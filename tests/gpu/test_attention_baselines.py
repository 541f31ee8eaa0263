"""The attentions of benchmarks/attention_baselines.py that differ on a GPU."""

from pathlib import Path

import pytest
import torch

import lasp
from tests.lasp import cases

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import attention_baselines

    return attention_baselines


def results(function, q, k, v, do, log_decay):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves, log_decay)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def reference(q, k, v, log_decay):
    return lasp.reference.quadratic(q, k, v, log_decay)[0]


@pytest.mark.parametrize("length", [1, 127, 1000])
@pytest.mark.parametrize(
    "dims, dtype",
    [
        ((128, 128), torch.bfloat16),
        ((256, 128), torch.bfloat16),
        ((96, 192), torch.bfloat16),
        ((128, 128), torch.float16),
        ((64, 64), torch.float32),
    ],
)
def test_lightning_attention_1_errs_like_plain_torch(baselines, length, dims, dtype):
    torch.manual_seed(0)
    size = max(dims)
    # Strided, as queries, keys and values are in the output of one projection.
    q, k, v, do = torch.randn(2, length, 4, 4, size, device="cuda").to(dtype).unbind(-2)
    q, k, v, do = 0.25 * q[..., : dims[0]], 0.25 * k[..., : dims[0]], v, do
    v, do = v[..., : dims[1]], do[..., : dims[1]]
    log_decay = lasp.decay.tnl(4, 12, 24).cuda()
    exact = [x.double() for x in (q, k, v, do, log_decay)]
    wanted = results(reference, *exact)
    plain = results(reference, q, k, v, do, log_decay)
    function = baselines.BASELINES["Lightning Attention-1"]
    found = results(function, q, k, v, do, log_decay)
    for name, a, b, truth in zip(("o", "dq", "dk", "dv"), found, plain, wanted, strict=True):
        allowed = 3 * cases.relative_error(b, truth) + 1e-6
        assert cases.relative_error(a, truth) <= allowed, name


@pytest.mark.parametrize("log_decay", [-0.5, -0.01, 0.0])
def test_prefix_sums_beyond_32_bits_are_those_of_the_operator(baselines, log_decay):
    # 2.9e9 values in the states of all tokens.
    torch.manual_seed(0)
    q, k, v, do = torch.randn(4, 1, 22000, 8, 128, device="cuda")
    log_decay = torch.full((8,), log_decay, device="cuda")
    q, k = 0.25 * q, 0.25 * k
    wanted = results(lasp.lightning_attention, q, k, v, do, log_decay)
    found = results(baselines.cumulative_sum, q, k, v, do, log_decay)
    for name, a, truth in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
        assert cases.relative_error(a, truth) < 1e-4, name
