"""Tables and chart of benchmarks/decoding.py."""

from __future__ import annotations

import json
from pathlib import Path

import chart
import versions

__all__ = ["table", "write"]


def table(report: dict) -> str:
    """All suites that were measured, as Markdown; also the tables of docs/decoding.md."""
    parts = [f"{report['device']}, {versions.line(report['versions'])}, {report['date']}."]
    tables = {
        "batches": _batches,
        "contexts": _contexts,
        "prefill": _prefill,
        "start": _start,
        "kernel": _kernel,
    }
    parts += [write_table(report[name]) for name, write_table in tables.items() if name in report]
    return "\n\n".join(parts) + "\n"


def write(report: dict, folder: Path) -> None:
    """decoding.json, decoding.md and, with contexts, decoding.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decoding.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "decoding.md").write_text(table(report))
    if "contexts" in report:
        _plot(report, folder / "decoding.png")


def _batches(rows: list[dict]) -> str:
    lines = [
        "| model | sequences | ms per token | tokens/s | of the roof | first token of 1,024 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["tokens_per_second"] / row["roof"]
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['step_ms']:.3f} | "
            f"{row['tokens_per_second']:,.0f} | {share:.0%} | {row['first_token_seconds']:.2f} s |"
        )
    return "\n".join(lines)


def _contexts(rows: list[dict]) -> str:
    lines = [
        "| model | context | first token | ms per token | tokens/s | memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['model']} | {row['context']:,} "
        if row.get("out_of_memory"):
            lines.append(f"{start}| out of memory | | | |")
            continue
        memory = f"{row['memory_gib']:.1f} GiB" if "memory_gib" in row else ""
        lines.append(
            f"{start}| {row['first_token_seconds']:.2f} s | {row['step_ms']:.3f} | "
            f"{row['tokens_per_second']:,.0f} | {memory} |"
        )
    return "\n".join(lines)


def _prefill(rows: list[dict]) -> str:
    lines = ["| model | prompt | blocks | tokens/s | first call |", "|---|---|---|---|---|"]
    for row in rows:
        kind = "compiled" if row["compiled"] else "as they are"
        first = f"{row['first_call']:.0f} s" if row["first_call"] else ""
        lines.append(
            f"| {row['model']} | {row['tokens']:,} | {kind} | {row['tokens_per_second']:,.0f} | "
            f"{first} |"
        )
    return "\n".join(lines)


def _start(rows: list[dict]) -> str:
    lines = [
        "| fresh process | imports | random weights | first token of 1,000 | in all |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (f"{row[name]:.1f} s" for name in ("import", "build", "first_token", "seconds"))
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kernel(rows: list[dict]) -> str:
    lines = ["| step of the operator | time | of a copy's bandwidth |", "|---|---|---|"]
    for row in rows:
        shape = f"{row['batch']} sequences, {row['heads']} heads of {row['dim']}"
        lines.append(f"| {shape} | {row['microseconds']:.1f} us | {row['of_copy']:.0%} |")
    return "\n".join(lines)


def _plot(report: dict, path: Path) -> None:
    rates: dict[str, tuple[list[float], list[float]]] = {}
    memory: dict[str, tuple[list[float], list[float]]] = {}
    for row in report["contexts"]:
        if row.get("out_of_memory"):
            continue
        for lines, name in ((rates, "tokens_per_second"), (memory, "memory_gib")):
            if name in row:
                x, y = lines.setdefault(row["model"], ([], []))
                x.append(row["context"])
                y.append(row[name])
    panels = [
        chart.Panel("Tokens per second, one sequence", "tokens of context", rates),
        chart.Panel("Memory (GiB)", "tokens of context", memory),
    ]
    caption = (
        f"{report['device']}, {versions.line(report['versions'])}; a missing point: out of memory."
    )
    chart.draw(panels, caption, path)
