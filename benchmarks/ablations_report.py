"""The tables and charts of benchmarks/ablations.py."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import versions

__all__ = ["PAPER", "docs_table", "read", "table", "write"]

BASE = "TNL"
# name of a row -> (what it changes, loss in bits per token of arXiv 2405.17381 at 385M).
PAPER: dict[str, tuple[str, float]] = {
    "TNL": ("", 2.248),
    "LRPE and decay in all layers": ("position", 2.236),
    "decay only": ("position", 2.267),
    "LRPE only": ("position", 2.287),
    "absolute position embeddings": ("position", 2.387),
    "same decay in all layers": ("decay", 2.258),
    "no gate": ("gate", 2.263),
    "RMSNorm": ("norm", 2.247),
    "LayerNorm": ("norm", 2.247),
    "no activation of q and k": ("activation", 2.283),
    "1 + elu of q and k": ("activation", 2.252),
    "swish in GLU": ("activation", 2.254),
    "Transformer": ("attention", 2.362),
}


def table(report: dict[str, Any]) -> str:
    """Where it was measured, and the loss of every row beside the paper's, as Markdown."""
    settings = report["settings"]
    tokens = settings["steps"] * settings["seq_len"] * settings["sequences"]
    lines = [
        f"{report['device']}, {versions.line(report['versions'])}, {report['date']}. Size "
        f"{report['size']}, {settings['steps']:,} steps of {settings['sequences']} sequences of "
        f"{settings['seq_len']:,} tokens ({tokens / 1e6:.2f}M in all) of {report['text']}. Losses "
        "in bits per token; differences from TNL are means over seeds, with their standard "
        "deviation:",
        "",
        "| part | row | parameters | loss | against TNL | seeds | paper, 385M | as in the paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (part, paper) in PAPER.items():
        runs = [run for run in report["runs"] if run["name"] == name]
        if not runs:
            continue
        loss = statistics.mean(run["loss"] for run in runs)
        found = differences(report, name)
        against, theirs, verdict = "", "", ""
        if name != BASE and found:
            mean, spread = statistics.mean(found), _spread(found)
            against = f"{mean:+.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
            theirs = f"{paper - PAPER[BASE][1]:+.3f}"
            verdict = _verdict(mean, spread, paper - PAPER[BASE][1])
        lines.append(
            f"| {part} | {name} | {runs[0]['parameters'] / 1e6:.2f}M | {loss:.3f} | {against} "
            f"| {len(runs)} | {theirs} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def differences(report: dict[str, Any], name: str) -> list[float]:
    """The row's loss minus TNL's, for every seed that both have."""
    losses = {(run["name"], run["seed"]): run["loss"] for run in report["runs"]}
    seeds = sorted(seed for other, seed in losses if other == name)
    return [losses[name, seed] - losses[BASE, seed] for seed in seeds if (BASE, seed) in losses]


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _verdict(mean: float, spread: float | None, paper: float) -> str:
    """yes or no, by the sign of the difference, where it is more than the spread over seeds."""
    if spread is None:
        return "one seed"
    if abs(mean) <= spread:
        return "not told apart"
    return "yes" if (mean > 0) == (paper > 0) else "no"


def docs_table(reports: list[dict[str, Any]]) -> str:
    """The tables of docs/papers.md, the largest size first; a line in place of none."""
    if not reports:
        return "Not measured yet.\n"
    return "\n".join(map(table, reports))


def read(folder: Path) -> list[dict[str, Any]]:
    """The reports of all sizes that were run, the largest first."""
    paths = [folder / f"ablations_{size}.json" for size in ("385m", "45m", "tiny")]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def write(report: dict[str, Any], folder: Path) -> None:
    """The report as JSON and as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"ablations_{report['size']}"
    path = folder / f"{name}.json"
    # Never half a file, which the next run could not read.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)
    (folder / f"{name}.md").write_text(table(report))
