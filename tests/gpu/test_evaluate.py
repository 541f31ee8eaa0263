"""launch/evaluate.py on a GPU: the trainer's validation loss in bfloat16, whole and in segments."""

import json

import pytest

from launch import evaluate
from tests.launch.runs import make_data, records, run_here

# Long enough for the kernels to scan in several blocks.
FLAGS = ("--compile.enable", "False", "--sample.no-enable")
RUN = dict(model__dim=128, model__glu_dim=128, training__seq_len=1500, training__steps=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = make_data(folder / "data", documents=100)
    assert run_here(folder / "out", data, *FLAGS, **RUN) == 0
    return folder / "out", data


@pytest.mark.parametrize("segment_len", [0, 400])
def test_the_loss_is_the_trainers_validation_loss(trained, tmp_path, segment_len):
    folder, data = trained
    output = tmp_path / "results.json"
    line = ["--checkpoint", str(folder / "checkpoint"), "--data", str(data), "--max-samples", "8"]
    line += ["--segment-len", str(segment_len), "--output", str(output)]
    assert evaluate.main(line) == 0
    found = json.loads(output.read_text())
    # Segments start with other rounding of the state's products.
    bound = 1e-3 if segment_len else 1e-5
    assert found["loss"] == pytest.approx(records(folder)[-1]["val_loss"], rel=bound)
    assert sum(row["tokens"] for row in found["loss_by_position"]) == found["tokens"] > 10_000


def test_recall_runs_on_the_gpu(trained, tmp_path):
    output = tmp_path / "results.json"
    line = ["--checkpoint", str(trained[0] / "checkpoint"), "--task", "recall"]
    assert evaluate.main([*line, "--recall.max-gap", "5000", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["recall_by_gap"]
    assert [row["queries"] for row in rows] == [32 * 8] * 14
    # It has learned no recall: about as bad as a uniform distribution over 320 tokens.
    assert all(3 < row["loss"] < 8 for row in rows)
