"""Tables of benchmarks/eager.py."""

from __future__ import annotations

import json
from pathlib import Path

import versions

__all__ = ["table", "write"]


def table(report: dict) -> str:
    """All parts that were measured, as Markdown; also the table of docs/benchmarks.md."""
    head = f"{report['device']}, {versions.line(report['versions'])}, {report['date']}."
    parts = [head]
    if "one" in report:
        parts.append(_one_gpu(report["one"]))
    if "ranks" in report:
        parts.append(_over_ranks(report["ranks"]))
    if "cold" in report:
        parts.append(_cold(report["cold"]))
    return "\n\n".join(parts) + "\n"


def write(report: dict, folder: Path) -> None:
    """eager.json and eager.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eager.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "eager.md").write_text(table(report))


def _one_gpu(rows: list[dict]) -> str:
    lines = [
        "| B, T, H, D | lasp | softmax (SDPA) | an empty autograd function |",
        "|---|---|---|---|",
    ]
    for row in rows:
        shape = ", ".join(map(str, row["shape"]))
        cells = (_time(row.get(name)) for name in ("lasp", "softmax", "nothing"))
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_ranks(part: dict) -> str:
    names = ("no group", "ring", "all_gather")
    lines = [
        f"| tokens per rank, {part['size']} GPUs | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for row in part["rows"]:
        cells = " | ".join(_time(row[name]) for name in names)
        lines.append(f"| {row['tokens_per_rank']:,} | {cells} |")
    return "\n".join(lines)


def _cold(part: dict[str, dict[str, float]]) -> str:
    steps = list(next(iter(part.values())))
    lines = [f"| seconds | {' | '.join(steps)} |", "|---|" + "---|" * len(steps)]
    for name, seconds in part.items():
        lines.append(f"| {name} | {' | '.join(f'{seconds[step]:.2f}' for step in steps)} |")
    return "\n".join(lines)


def _time(found: dict[str, float] | None) -> str:
    """Median (best) in milliseconds."""
    return "" if found is None else f"{found['median']:.2f} ({found['best']:.2f}) ms"
