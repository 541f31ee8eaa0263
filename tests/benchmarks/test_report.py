"""The figures of README.md and docs/benchmarks.md are those of benchmarks/results."""

from pathlib import Path

import pytest


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import report

    return report


def test_tables_of_the_docs_match_the_results(report):
    for path, name, table in report.docs_tables(*report.read_reports()):
        text = path.read_text()
        hint = f"{path.name}, table {name}: run benchmarks/report.py"
        assert report.filled(text, name, table) == text, hint


def test_a_table_without_a_place_is_refused(report):
    with pytest.raises(ValueError, match="0 tables 'kernels'"):
        report.filled("no table here", "kernels", "| a |\n")
