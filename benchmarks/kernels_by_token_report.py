"""The tables of benchmarks/kernels_by_token.py."""

from __future__ import annotations

import json
from pathlib import Path

import versions

__all__ = ["docs_table", "table", "write"]

LASP, BASELINE = "lasp", "fla chunk_simple_gla"
WAYS = ("forward_ms", "backward_ms")


def table(report: dict) -> str:
    """The report as Markdown."""
    parts = [
        f"{report['device']}, {versions.line(report['versions'])}, {report['date']}. bfloat16, "
        "medians, caches cold.",
        _times(report["rows"]),
        _notes(report["rows"]),
        _errors(report["errors"]),
        report.get("note", ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def docs_table(report: dict | None) -> str:
    """The tables of docs/benchmarks.md, as Markdown; None: there are no results."""
    return "Not run yet.\n" if report is None else table(report)


def _times(rows: list[dict]) -> str:
    """A line per shape, as far as it was measured."""
    lines = [
        "| B, T, H, D, E | triton | constant, forward | backward | per token, forward | backward "
        "| extra memory, constant | per token | fla takes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        found = {
            (row["name"], row["decay"]): row
            for row in rows
            if tuple(row["shape"]) == shape and (row["name"] == BASELINE or not row["note"])
        }
        constant, by_token = (found.get((LASP, decay)) for decay in ("middle", "token"))
        if constant is None or by_token is None:
            continue
        cells = [", ".join(map(str, shape)), by_token["triton"] or ""]
        cells += [f"{constant[way]:.3f} ms" for way in WAYS]
        cells += [f"{by_token[way]:.3f} ms ({by_token[way] / constant[way]:.2f}x)" for way in WAYS]
        units = (constant["extra_units"], by_token["extra_units"])
        cells += ["" if unit is None else f"{unit:.1f}" for unit in units]
        fla = found.get((BASELINE, "token"), {})
        ratios = [f"{fla[way] / by_token[way]:.1f}x" if fla.get(way) else "-" for way in WAYS]
        cells.append(" / ".join(ratios) if fla.get(WAYS[0]) else "")
        lines.append(f"| {' | '.join(cell.strip() for cell in cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _notes(rows: list[dict]) -> str:
    """Why times are missing."""
    noted = [row for row in rows if row["note"]]
    return "\n\n".join(
        f"{row['name']} at {', '.join(map(str, row['shape']))}: {row['note']}" for row in noted
    )


def _errors(rows: list[dict]) -> str:
    if not rows:
        return ""
    names = [name for name in rows[0] if name not in ("tokens", "mean", "triton")]
    lines = [
        f"The gradient of log_decay, {rows[0]['tokens']:,} tokens, heads of 128, triton "
        f"{rows[0]['triton']}:",
        "",
        f"| mean log decay | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = ["-" if row[name] is None else f"{row[name]:.1e}" for name in names]
        lines.append(f"| {row['mean']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(report: dict, folder: Path) -> None:
    """The report as JSON and as tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels_by_token.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "kernels_by_token.md").write_text(table(report))
