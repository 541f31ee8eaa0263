"""Meshes over two GPUs with NCCL: losses of one GPU, and checkpoints."""

import json

import pytest
import torch

from tests.gpu import torchrun

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA GPUs of one host"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    out, err = torchrun.run(2, "tests/gpu/run_layouts.py", str(folder))
    assert "serialize" not in err
    line = next(each for each in out.splitlines() if each.startswith("report: "))
    return json.loads(line.removeprefix("report: "))


def test_layouts_give_the_losses_of_one_gpu(report):
    alone = report["alone"]
    assert len(report["layouts"]) > 5
    for name, others in report["layouts"].items():
        # bfloat16 products: the first step sees rounding only, later ones what it grew to.
        assert others[0] == pytest.approx(alone[0], rel=1e-3), name
        assert others == pytest.approx(alone, rel=1e-2), name


def test_in_float32_only_the_order_of_sums_differs(report):
    alone, cut = report["float32"]
    assert cut == pytest.approx(alone, rel=1e-4)


def test_a_save_in_the_background_is_of_its_step(report):
    went_on, resumed = report["saved"]
    assert resumed == pytest.approx(went_on, rel=1e-3)
