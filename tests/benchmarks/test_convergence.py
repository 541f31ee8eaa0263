"""benchmarks/convergence.py: its layouts, a row over ranks against one process, its table."""

import argparse
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.config import load_config
from tests.distributed import Pool

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def convergence(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import convergence

    return convergence


@pytest.fixture
def pair():
    """Two processes that form a job of their own."""
    pool = Pool((2,))
    yield pool
    pool.stop()


def options(data):
    about = dict(preset="tiny", steps=2, seq_len=64, lr=2e-3, dtype="auto", data=data, processes=2)
    return argparse.Namespace(**about)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_layout_is_a_command_line_of_the_launcher(convergence, processes, tmp_path):
    found = list(convergence.cases(processes))
    assert len({(case.name, case.cp, case.tp) for case in found}) == len(found)
    assert len(found) == {1: 1, 2: 1 + 10 + 1 + 0, 4: 1 + 15 + 3, 8: 1 + 20 + 5}[processes]
    arguments = options(tmp_path)
    arguments.processes = processes
    for case in found:
        config = load_config(convergence.command_line(case, arguments, tmp_path))
        assert config.parallelism.context_parallel_degree == case.cp
        dp = case.processes // (case.cp * case.tp)
        assert config.training.global_batch_size >= 2 * dp
        assert config.training.global_batch_size % dp == 0


def rows_of_rank(group, data, folder):
    sys.path.insert(0, BENCHMARKS)
    import convergence

    rank = dist.get_rank()
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, str(value))
        for case in convergence.cases(2):
            if (case.name, case.cp) in (("one process", 1), ("ZeRO-2", 1), ("DDP", 2)):
                place = folder / f"{case.name}-{rank}"
                place.mkdir()
                rows.append(convergence.run_case(case, options(data), place))
                dist.barrier()
    return rows


def test_rows_over_ranks_have_the_losses_of_one_process(pair, convergence, data, tmp_path):
    rows, others = pair.run(rows_of_rank, data, tmp_path, size=2)
    assert others[0] is None
    assert [(row["name"], row["cp"]) for row in rows] == [
        ("one process", 1),
        ("DDP", 2),
        ("ZeRO-2", 1),
    ]
    report = dict(
        device="CPU",
        processes=2,
        model="TNL tiny",
        settings=dict(steps=2, seq_len=64, dtype="auto"),
        versions={},
        date="",
        rows=rows,
    )
    alone = rows[0]["losses"]
    assert len(alone) == 2 and alone[0] != alone[1]
    for row in rows[1:]:
        assert convergence.convergence_report.difference(report, row) < 1e-5
    rows[1]["losses"][1] += 0.25
    text = convergence.convergence_report.table(report)
    assert "from that of one process is 2.5e-01:" in text
    assert "| 2.5e-01 | 3.719, 3.715 (-0.004) |" in text


def test_rows_on_disk_are_kept_if_the_settings_are_the_same(convergence, data, tmp_path, capsys):
    arguments = options(data)
    arguments.out, arguments.anew = tmp_path, False
    report = convergence.begin(arguments, 0)
    assert report["rows"] == []
    row = dict(name="one process", cp=1, tp=1, losses=[1.0, 0.5], validation=0.7, seconds=1.0)
    report["rows"].append(row)
    convergence.convergence_report.write(report, tmp_path)
    capsys.readouterr()
    assert convergence.begin(arguments, 0)["rows"] == [row]
    path = tmp_path / "convergence_cpu_2.json"
    assert capsys.readouterr().out == f"going on from {path}\n"
    assert convergence.case_of(row) == ("one process", 1, 1)
    for name, value in (("lr", 1e-3), ("processes", 4), ("anew", True)):
        other = options(data)
        other.out, other.anew = tmp_path, False
        setattr(other, name, value)
        assert convergence.begin(other, 0)["rows"] == []
        if name == "lr":
            said = f"{path} is of a run with other settings and is replaced\n"
            assert capsys.readouterr().out == said
