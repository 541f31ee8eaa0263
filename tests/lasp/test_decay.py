"""Decay builders against the figures that papers and released code give."""

import math

import pytest
import torch

from lasp import decay


def test_slopes_of_a_power_of_two():
    assert decay.alibi_slopes(8) == [2.0**-i for i in range(1, 9)]


def test_slopes_between_powers_take_every_second_of_the_next():
    expected = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert decay.alibi_slopes(12) == pytest.approx(expected)
    assert len(decay.alibi_slopes(40)) == 40


def test_tnl_falls_with_the_layer():
    first, last = decay.tnl(8, 0, 24), decay.tnl(8, 23, 24)
    torch.testing.assert_close(first[:3], -torch.tensor([0.500005, 0.2500025, 0.12500125]))
    torch.testing.assert_close(last, first / (1 + 1e-5) * 1e-5, rtol=1e-4, atol=0)
    assert first.dtype == torch.float32 and first.shape == (8,)


def test_tnl_of_one_layer_does_not_divide_by_zero():
    torch.testing.assert_close(
        decay.tnl(4, 0, 1), -torch.tensor(decay.alibi_slopes(4)) * (1 + 1e-5)
    )


def test_minimax_takes_its_formula_for_any_head_count():
    torch.testing.assert_close(
        decay.minimax(6, 0, 80),
        -torch.tensor([2.0 ** (-8 * (h + 1) / 6) for h in range(6)]) * (1 + 1e-5),
    )


def test_retention():
    torch.testing.assert_close(
        decay.retention(3).exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])
    )


@pytest.mark.parametrize("layer, layers", [(-1, 4), (4, 4), (0, 0)])
def test_a_layer_that_is_not_there(layer, layers):
    with pytest.raises(ValueError, match=f"layer is {layer}: layers are counted from 0"):
        decay.tnl(4, layer, layers)


def test_no_heads():
    with pytest.raises(ValueError, match="num_heads is 0"):
        decay.alibi_slopes(0)
    assert math.isclose(decay.alibi_slopes(1)[0], 2**-8)


def test_ling_takes_the_factor_of_the_layer_before():
    torch.testing.assert_close(decay.ling(8, 1, 24), decay.tnl(8, 0, 24))
    torch.testing.assert_close(decay.ling(8, 0, 24)[:2], -torch.tensor([0.52174, 0.26087]))
