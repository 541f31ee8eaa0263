"""Layers of the Megatron plug-in on Transformer Engine's linear layers, in bfloat16 and FP8."""

import json
import math

import pytest
import torch

from tests.gpu import torchrun

pytest.importorskip("megatron.core")
pytest.importorskip("transformer_engine.pytorch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def report():
    out, _ = torchrun.run(1, "tests/gpu/run_transformer_engine.py")
    line = next(each for each in out.splitlines() if each.startswith("report: "))
    print(line)
    return json.loads(line.removeprefix("report: "))


# Float32 matmuls are in TF32. So some tokens of the hybrid go to other experts.
@pytest.mark.parametrize("model, bound", [("TNL", 1e-2), ("GPT", 1e-2), ("hybrid", 0.3)])
def test_gradients_are_those_of_local_layers(report, model, bound):
    case = report[model]
    assert "failed" not in case, case["failed"]
    assert case["lacking"] == []
    assert len(case["errors"]) > 10
    assert abs(case["loss"]) < bound / 100
    for name, error in case["errors"].items():
        assert error < bound, name


def test_training_in_fp8_is_near_that_in_bfloat16_and_resumes(report):
    """The losses of six steps vary by 1e-3 without training, and by 3e-3 with another seed."""
    case = report["TNL in FP8"]
    assert "failed" not in case, case["failed"]
    assert case["TE"] == pytest.approx(case["local"], rel=1e-5)
    for recipe in ("tensorwise", "delayed"):
        assert case[recipe] == pytest.approx(case["local"], rel=2e-4)
        assert case[recipe] != case["TE"]
    assert case["resumed"] == case["tensorwise"]


def test_the_distributed_optimizer_resumes(report):
    """To the bit: without the moments, losses differ by 1e-5."""
    case = report["distributed optimizer"]
    assert "failed" not in case, case["failed"]
    assert case["resumed"] == case["at once"]


def test_a_hybrid_with_experts_runs_in_fp8(report):
    case = report["hybrid in FP8"]
    assert "failed" not in case, case["failed"]
    assert case["TE"][0] == pytest.approx(case["local"][0], rel=1e-3)
    assert case["FP8"][0] == pytest.approx(case["local"][0], rel=1e-3)
    assert case["FP8"] != case["TE"]
    assert all(math.isfinite(loss) for loss in case["FP8"])
