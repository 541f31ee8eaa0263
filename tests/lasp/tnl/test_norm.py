import pytest
import torch

from lasp.tnl.norm import SRMSNorm


def spec(x, eps=1e-6):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 1e-3)],
)
def test_norm_equals_the_equation(dtype, tolerance):
    torch.manual_seed(0)
    # Squares of 300 overflow float16: the mean square must be taken in float32.
    x = (300 * torch.randn(3, 7, 96)).to(dtype).requires_grad_()
    y = SRMSNorm(96)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), spec(x), rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, weight)
    (expected,) = torch.autograd.grad(spec(x), x, weight.double())
    assert (grad - expected).abs().max() <= 4 * tolerance * expected.abs().max()


def test_zero_input_stays_zero_with_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = SRMSNorm(8)(x)
    y.sum().backward()
    assert (y == 0).all()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1000.0))


def test_autocast_does_not_widen():
    with torch.autocast("cpu", torch.bfloat16):
        assert SRMSNorm(8)(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
