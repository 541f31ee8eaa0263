"""benchmarks/kernels.py: the rows that a run of some shapes keeps. The rest needs a GPU."""

import argparse
import json
from pathlib import Path

import pytest
import torch

OLD = [
    {"shape": [1, 64, 2, 16, 16], "decay": "middle", "name": "lasp"},
    {"shape": [1, 32, 2, 16, 16], "decay": "middle", "name": "lasp"},
    {"shape": [1, 32, 2, 16, 16], "decay": "middle", "name": "fla"},
    {"shape": [1, 32, 2, 16, 16], "decay": "last", "name": "lasp"},
    {"shape": [1, 16, 2, 16, 16], "decay": "middle", "name": "lasp"},
]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import kernels

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    return kernels


def test_measured_rows_replace_those_of_their_case(benchmark):
    new = [{"shape": [1, 32, 2, 16, 16], "decay": "middle", "name": "lasp", "error": 0.1}]
    assert benchmark.replaced(OLD, new) == [OLD[0], *new, *OLD[2:]]
    other = [{"shape": [1, 8, 2, 16, 16], "decay": "middle", "name": "lasp"}]
    assert benchmark.replaced(OLD, other) == OLD + other


@pytest.mark.parametrize("shapes", [None, ["1,32,2,16"]])
@pytest.mark.parametrize("no_errors", [False, True])
@pytest.mark.parametrize("device", ["GPU", "another GPU"])
def test_a_run_of_some_shapes_keeps_rows_of_the_same_gpu_and_versions(
    benchmark, tmp_path, shapes, no_errors, device
):
    found = benchmark.versions.installed("torch", "triton", "fla-core")
    before = {"device": device, "versions": found, "errors": ["kept"], "rows": OLD}
    (tmp_path / "kernels.json").write_text(json.dumps(before))
    arguments = argparse.Namespace(shapes=shapes, no_errors=no_errors, out=tmp_path)
    report = benchmark.begin(arguments)
    keeps = shapes is not None and device == "GPU"
    assert report["rows"] == (OLD if keeps else [])
    assert report["errors"] == (["kept"] if keeps and no_errors else [])
