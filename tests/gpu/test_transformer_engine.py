"""Layers of the Megatron plug-in on Transformer Engine's linear layers, in bfloat16 and FP8."""

import json

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


# Products of float32 are in TF32. So other experts take some tokens of the hybrid.
@pytest.mark.parametrize(
    "model, compared, bound", [("TNL", 14, 1e-2), ("GPT", 14, 1e-2), ("hybrid", 180, 0.3)]
)
def test_gradients_are_those_of_local_layers(report, model, compared, bound):
    case = report[model]
    assert "failed" not in case, case["failed"]
    assert case["lacking"] == []
    assert case["compared"] == compared
    assert abs(case["loss"]) < bound / 100
    for name, error in case["errors"].items():
        assert error < bound, name


def test_training_in_fp8_is_near_that_in_bfloat16_and_resumes(report):
    case = report["TNL in FP8"]
    assert "failed" not in case, case["failed"]
    local = case["local"]
    assert case["TE"] == pytest.approx(local, rel=2e-3)
    for recipe in ("tensorwise", "delayed"):
        assert case[recipe] == pytest.approx(local, rel=2e-2)
        assert case[recipe] != case["TE"]
    assert case["resumed"] == pytest.approx(case["tensorwise"], rel=1e-3)


def test_the_distributed_optimizer_resumes(report):
    case = report["distributed optimizer"]
    assert "failed" not in case, case["failed"]
    assert case["resumed"] == pytest.approx(case["at once"], rel=1e-4)


def test_a_hybrid_with_experts_trains_in_fp8(report):
    case = report["hybrid in FP8"]
    assert "failed" not in case, case["failed"]
    assert case["TE"] == pytest.approx(case["local"], rel=1e-2)
    assert case["FP8"] == pytest.approx(case["local"], rel=3e-2)
    assert case["FP8"] != case["TE"]
