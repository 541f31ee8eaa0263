"""The table and the chart of benchmarks/learned_decay.py."""

from __future__ import annotations

import json
from pathlib import Path

import losses_report

__all__ = ["docs_table", "table", "write"]


def table(report: dict) -> str:
    """Where it was measured, and validation losses, as Markdown."""
    runs = report["loss"]
    parts = losses_report.head(report), losses_report.title(runs)
    return "\n\n".join((*parts, losses_report.table(runs, "fixed", "decay")))


def docs_table(report: dict) -> str:
    """The table of docs/training.md with its chart, as Markdown."""
    chart = "../benchmarks/results/learned_decay.png"
    return f"{table(report)}\n![Loss over steps with fixed and with learned decays]({chart})\n"


def write(report: dict, folder: Path) -> None:
    """The report as JSON, as a table and as a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "learned_decay.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "learned_decay.md").write_text(table(report))
    losses_report.plot(report["loss"], "fixed", report["device"], folder / "learned_decay.png")
