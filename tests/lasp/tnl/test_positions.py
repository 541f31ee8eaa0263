"""LRPE and RoPE against their equations, far out and across table blocks."""

import copy

import pytest
import torch

from lasp.tnl.positions import LRPE, apply_rope
from tests.lasp.tnl.equations import rope


def lrpe_equation(x, theta, position):
    """LRPE in float64."""
    steps = torch.arange(position, position + x.shape[1], dtype=torch.float64)
    angle = theta.double().squeeze(1) * steps[:, None, None]
    x = x.double()
    return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


@pytest.mark.parametrize("position", [0, 1, 1000, 2**20 + 17, 2**22 - 5000])
def test_angles_are_exact_far_out(position):
    lrpe = LRPE(2, 24)
    length = 5000  # more than two table blocks, the last one partial
    ones = torch.ones(1, length, 2, 24)
    out, _ = lrpe(ones, ones, position)
    assert out.dtype == torch.float32
    assert (out - lrpe_equation(ones, lrpe.theta, position)).abs().max() < 3e-7


@pytest.mark.parametrize("length", [0, 1, 63, 100, 2049])
@pytest.mark.parametrize("position", [0, 12345])
def test_gradients_equal_autograd_of_the_equation(length, position, poisoned_memory):
    torch.manual_seed(0)
    lrpe = LRPE(2, 4)
    q, k = (torch.randn(2, length, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "qk")
    theta = lrpe.theta.detach().double().requires_grad_()
    out = lrpe(q, k, position)
    expected = tuple(lrpe_equation(x, theta, position) for x in (q, k))
    weights = [torch.randn_like(x) for x in out]
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    *grads, grad_theta = torch.autograd.grad(out, (q, k, lrpe.theta), weights)
    *wanted, wanted_theta = torch.autograd.grad(expected, (q, k, theta), weights)
    torch.testing.assert_close(grads, wanted, rtol=1e-8, atol=1e-8)
    # Accumulated in float64, then rounded to theta's float32 once.
    torch.testing.assert_close(grad_theta, wanted_theta.float(), rtol=1.2e-7, atol=0)


def test_autocast_rounds_no_position():
    torch.manual_seed(0)
    lrpe = LRPE(2, 4)
    q = torch.randn(1, 3000, 2, 4)
    weights = [torch.randn(1, 3000, 2, 8) for _ in "qk"]
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads += torch.autograd.grad(lrpe(q, q, 17), lrpe.theta, weights)
    assert torch.equal(*grads)


def test_bfloat16_inputs_are_rounded_once():
    torch.manual_seed(0)
    lrpe = LRPE(2, 4)
    q = torch.randn(1, 100, 2, 4).bfloat16()
    out, _ = lrpe(q, q, 2**20)
    assert out.dtype == torch.bfloat16
    expected = lrpe_equation(q, lrpe.theta, 2**20)
    # All but values within the float32 table's error of a rounding boundary.
    assert (out == expected.bfloat16()).double().mean() > 0.99
    torch.testing.assert_close(out, expected.bfloat16())


def test_zigzag_chunks_have_their_own_positions():
    torch.manual_seed(0)
    lrpe = LRPE(2, 4)
    q, k = torch.randn(2, 1, 20, 2, 4)
    outs = lrpe(q, k, 7, 1000)
    for out, x in zip(outs, (q, k), strict=True):
        chunks = [lrpe(c, c, start)[0] for c, start in zip(x.chunk(2, 1), (7, 1000), strict=True)]
        assert torch.equal(out, torch.cat(chunks, 1))


def test_product_depends_on_the_distance_only():
    torch.manual_seed(0)
    lrpe = LRPE(1, 8)
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 20, 1, 8)
    for position in (0, 2**21):
        q, k = lrpe(x, x, position)
        products = torch.einsum("bihd,bjhd->ij", q, k)
        for offset in (0, 3, 19):
            diagonal = products.diagonal(offset)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
            cosine = (lrpe.theta.double().flatten() * offset).cos()
            expected = (x[0, 0, 0].square() * cosine).sum()
            torch.testing.assert_close(diagonal[0], expected.detach())


def test_strided_views_are_accepted():
    torch.manual_seed(0)
    lrpe = LRPE(2, 4)
    q, k = torch.randn(1, 10, 2, 3, 4).unbind(3)[:2]
    out = lrpe(q, k, 5)
    expected = lrpe(q.contiguous(), k.contiguous(), 5)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_theta_stays_float32_to_the_bit(cast):
    lrpe = LRPE(2, 4)
    parameter, before = lrpe.theta, lrpe.theta.detach().clone()
    lrpe.theta.grad = torch.ones_like(lrpe.theta)
    getattr(lrpe, cast)()
    assert lrpe.theta is parameter
    assert lrpe.theta.dtype == lrpe.theta.grad.dtype == torch.float32
    assert torch.equal(lrpe.theta, before)
    assert torch.equal(copy.deepcopy(lrpe).theta, before)


def test_meta_initialisation_gives_the_same_theta():
    with torch.device("meta"):
        lrpe = LRPE(2, 4)
    lrpe.to_empty(device="cpu")
    assert torch.equal(lrpe.theta, LRPE(2, 4).theta)
    assert lrpe.theta[0, 0, 0] == 1.0


def test_keep_heads_keeps_their_rates():
    lrpe, full = LRPE(4, 4), LRPE(4, 4)
    lrpe.keep_heads(slice(1, 3))
    assert torch.equal(lrpe.theta, full.theta[1:3])
    lrpe.reset_parameters()
    assert torch.equal(lrpe.theta, full.theta[1:3])


def test_theta_in_low_precision_is_refused():
    lrpe = LRPE(1, 4)
    lrpe.theta.data = lrpe.theta.data.bfloat16()
    x = torch.ones(1, 1, 1, 4)
    with pytest.raises(ValueError, match="param_dtype=torch.float32"):
        lrpe(x, x, 0)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-7), (torch.bfloat16, 5e-3)]
)
def test_rope_is_the_equation(dtype, bound, poisoned_memory):
    # More than one table block (8192 tokens), and two ranges, as in a zigzag shard.
    ranges = ((10**6, 10**6 + 8195), (7, 12))
    torch.manual_seed(0)
    x = torch.randn(1, 8200, 2, 6).to(dtype).requires_grad_()
    weight = torch.randn(x.shape).to(dtype)
    position = torch.cat([torch.arange(*each) for each in ranges])
    y = apply_rope(x, ranges, 100.0)
    (grad,) = torch.autograd.grad(y, x, weight)
    assert y.dtype == grad.dtype == dtype
    for actual, wanted in (
        (y, rope(x, position, 100.0)),
        (grad, rope(weight, -position, 100.0)),
    ):
        assert (actual - wanted).norm() / wanted.norm() < bound
