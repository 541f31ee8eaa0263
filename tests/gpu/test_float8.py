"""FP8 on a GPU: products are the emulated ones; a compiled run learns and prints a sample."""

import pytest
import torch
from torch import nn

from parallel import float8
from tests.launch.runs import STEPS, losses, make_data, run_here

pytest.importorskip("torchao", reason="FP8 needs torchao: pip install -e '.[fp8]'")
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="this GPU has no FP8 products",
)


def products(recipe, emulate):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(256, 512, bias=False, device="cuda")])
    float8.check_available(torch.device("cuda"))
    float8.convert_blocks(layers, recipe, emulate=emulate)
    x = torch.randn(2, 160, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = layers[0](x)
    y.backward(torch.randn_like(y))
    return {"y": y.detach(), "dx": x.grad, "dw": layers[0].weight.grad}


@needs_fp8
@pytest.mark.parametrize("recipe", float8.RECIPES)
def test_products_are_those_emulated(recipe):
    emulated = products(recipe, True)
    for name, actual in products(recipe, False).items():
        expected = emulated[name].float()
        error = (actual.float() - expected).norm() / expected.norm()
        # Both are rounded to bfloat16; FP8 rounding would be ten times as much.
        assert error < 0.004, name


@needs_fp8
@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_runs_learn_as_in_bfloat16(tmp_path, capsys, mode):
    data = make_data(tmp_path / "data")
    # At the rate of the other runs, rounding alone moves the losses by a sixth within eight steps.
    sizes = dict(
        model__dim=256,
        model__glu_dim=512,
        training__seq_len=256,
        activation_checkpoint__mode=mode,
        optimizer__lr=0.001,
    )
    series = []
    for name, more in (
        ("plain", []),
        ("fp8", ["--quantize.linear.float8.recipe_name", "tensorwise"]),
    ):
        assert run_here(tmp_path / name, data, *more, **sizes) == 0
        series.append(list(losses(tmp_path / name).values()))
        assert f"sample of step {STEPS}" in capsys.readouterr().out
    plain, fp8 = series
    assert fp8 != plain and fp8 == pytest.approx(plain, rel=0.01)
