"""The tables of benchmarks/convergence.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import versions

__all__ = ["docs_table", "line", "path_of", "read", "table", "write"]

# arXiv 2404.02882, table 2: loss of TNL-0.4B after 50,000 steps without and with LASP.
PAPER = {
    "DDP": (3.719, 3.715),
    "FSDP": (3.717, 3.714),
    "ZeRO-1": (3.653, 3.653),
    "ZeRO-2": (3.655, 3.649),
    "ZeRO-3": (3.656, 3.649),
}


def difference(report: dict[str, Any], row: dict[str, Any]) -> float:
    """The largest difference of the row's losses from those of one process: of any step, and of
    validation."""
    alone = report["rows"][0]
    pairs = zip(row["losses"], alone["losses"], strict=True)
    return max(abs(row["validation"] - alone["validation"]), *(abs(a - b) for a, b in pairs))


def table(report: dict[str, Any]) -> str:
    """Where it was measured, and the losses of every layout, as Markdown."""
    settings, rows = report["settings"], report["rows"]
    names = {"auto": "bfloat16" if report["device"] != "CPU" else "float32"}
    dtype = names.get(settings["dtype"], settings["dtype"])
    largest = max((difference(report, row) for row in rows), default=0.0)
    lines = [
        f"{report['device']}, {report['processes']} processes, "
        f"{versions.line(report['versions'])}, {report['date']}. {report['model']}, "
        f"{settings['steps']:,} steps on sequences of {settings['seq_len']:,} tokens, {dtype}. The "
        f"largest difference of a loss from that of one process is {largest:.1e}:",
        "",
        "| data parallelism | cp | tp | last training loss | validation loss | largest difference "
        "| paper, without and with LASP |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = PAPER.get(row["name"])
        theirs = f"{paper[0]:.3f}, {paper[1]:.3f} ({paper[1] - paper[0]:+.3f})" if paper else ""
        lines.append(
            f"| {row['name']} | {row['cp']} | {row['tp']} | {row['losses'][-1]:.6f} "
            f"| {row['validation']:.6f} | {difference(report, row):.1e} "
            f"| {theirs if row['cp'] > 1 else ''} |"
        )
    return "\n".join(lines) + "\n"


def line(report: dict[str, Any], row: dict[str, Any]) -> str:
    """One row, to print as soon as it is known."""
    return (
        f"{row['name']}, cp {row['cp']}, tp {row['tp']}: last loss {row['losses'][-1]:.6f}, "
        f"largest difference {difference(report, row):.1e}, {row['seconds']:.1f} s"
    )


def docs_table(reports: list[dict[str, Any]]) -> str:
    """The tables of docs/papers.md, GPUs first; a line in place of none."""
    return "\n".join(map(table, reports)) if reports else "Not measured yet.\n"


def read(folder: Path) -> list[dict[str, Any]]:
    """The reports of all runs, those of GPUs first, of more processes first."""
    reports = [json.loads(path.read_text()) for path in folder.glob("convergence_*.json")]
    return sorted(reports, key=lambda each: (each["device"] == "CPU", -each["processes"]))


def path_of(report: dict[str, Any], folder: Path) -> Path:
    """The report's JSON file."""
    device = "cpu" if report["device"] == "CPU" else "gpu"
    return folder / f"convergence_{device}_{report['processes']}.json"


def write(report: dict[str, Any], folder: Path) -> None:
    """The report as JSON and as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(report, folder)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
