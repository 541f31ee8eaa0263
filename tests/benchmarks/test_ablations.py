"""benchmarks/ablations.py: its rows, a run that goes on where it stopped, its table."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from lasp.tnl import TNLConfig
from launch.config import load_config

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import ablations

    return ablations


def test_every_row_is_a_model_and_has_a_figure_of_the_paper(ablations):
    for size in ablations.SIZES.values():
        rows = ablations.rows(size)
        assert list(rows) == list(ablations.ablations_report.PAPER)
        configs = {name: TNLConfig(**size.model | fields) for name, fields in rows.items()}
        assert len(set(configs.values())) == len(rows)
        # The gate's matrices went into the channel mixer.
        counts = {name: each.num_parameters() for name, each in configs.items()}
        assert counts["no gate"] == pytest.approx(counts["TNL"], rel=0.03)
        assert counts["Transformer"] == pytest.approx(counts["TNL"], rel=0.03)


def test_every_size_is_a_command_line_of_the_launcher(ablations, tmp_path):
    for size in ablations.SIZES.values():
        config = load_config(ablations.command_line(size, {}, 7, tmp_path, tmp_path))
        assert (config.training.steps, config.training.seed) == (size.steps, 7)
        local = config.training.local_batch_size
        assert size.sequences == max(config.training.global_batch_size, local)
        assert config.compile.enable == size.flags.get("compile.enable")


@pytest.fixture
def run(ablations, data, tmp_path, monkeypatch):
    """Runs the command with a size of two steps; returns its report."""
    tiny = dataclasses.replace(
        ablations.SIZES["tiny"], steps=2, seq_len=64, sequences=2, validation=2
    )
    monkeypatch.setitem(ablations.SIZES, "tiny", tiny)

    def call(*flags):
        line = ["ablations.py", "--data", str(data), "--out", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", line)
        ablations.main()
        return json.loads((tmp_path / "ablations_tiny.json").read_text())

    return call


def test_a_run_goes_on_where_it_stopped(run, capsys):
    report = run("--rows", "TNL", "Transformer", "--seeds", "0")
    assert [(each["name"], each["seed"]) for each in report["runs"]] == [
        ("TNL", 0),
        ("Transformer", 0),
    ]
    first = report["runs"][0]
    # A fresh model predicts none of 258 tokens.
    assert 6 < first["loss"] < 9 and first["train"]
    report = run("--rows", "TNL", "Transformer", "no gate", "--seeds", "0", "1")
    assert report["runs"][0] == first
    assert len(report["runs"]) == 6
    assert "| gate | no gate |" in capsys.readouterr().out
    # Other settings start anew.
    report = run("--rows", "TNL", "--seeds", "0", "--steps", "3")
    assert [each["train"][-1][0] for each in report["runs"]] == [3]


def test_the_same_seed_gives_the_same_loss_and_another_seed_another(run):
    losses = [run("--rows", "TNL", "--anew", "--seeds", seed)["runs"][0]["loss"] for seed in "001"]
    assert losses[0] == losses[1] != losses[2]


def test_the_table_compares_differences_of_equal_seeds(ablations):
    report = ablations.ablations_report
    losses = {"TNL": (2.0, 3.0), "decay only": (2.1, 3.2), "RMSNorm": (2.1, 2.9), "no gate": (1, 2)}
    runs = [
        {"name": name, "seed": seed, "parameters": 10**6, "loss": loss}
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    settings = dict(steps=1, seq_len=1, sequences=1)
    about = dict(size="tiny", settings=settings, device="CPU", versions={}, date="", text="text")
    lines = report.table({**about, "runs": runs}).splitlines()
    (decay,) = (line for line in lines if "decay only" in line)
    assert "| 2.650 | +0.150 ± 0.071 | 2 | +0.019 | yes |" in decay
    (norm,) = (line for line in lines if "RMSNorm" in line)
    assert norm.endswith("| +0.000 ± 0.141 | 2 | -0.001 | not told apart |")
    (gate,) = (line for line in lines if "no gate" in line)
    assert gate.endswith("| -1.000 ± 0.000 | 2 | +0.015 | no |")


def test_an_unknown_row_is_refused(run):
    with pytest.raises(SystemExit, match="choose among TNL, LRPE"):
        run("--rows", "gates")
