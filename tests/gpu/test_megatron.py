"""A TNL in megatron-core on GPUs, where the parts between products are compiled."""

import json

import pytest
import torch

from tests.gpu import torchrun

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def report():
    # Heads divide by one or two ranks.
    out, _ = torchrun.run(min(torch.cuda.device_count(), 2), "tests/gpu/run_megatron.py")
    line = next(each for each in out.splitlines() if each.startswith("report: "))
    return json.loads(line.removeprefix("report: "))


def test_gradients_are_those_of_one_device(report):
    assert len(report) == 4
    for layout, (loss, errors) in report.items():
        assert abs(loss) < 1e-3, layout
        for name, error in errors.items():
            # A kernel may use TF32. A rate's gradient is a small sum of large terms of both signs.
            assert error < (4e-2 if name.endswith("theta") else 1e-2), (layout, name)
