"""Tables and the chart of benchmarks/fp8.py."""

from __future__ import annotations

import json
from pathlib import Path

import losses_report

__all__ = ["docs_table", "loss_table", "speed_table", "table", "write"]


def table(report: dict) -> str:
    """Everything, as Markdown."""
    return "\n".join([losses_report.head(report), "", speed_table(report), loss_table(report)])


def speed_table(report: dict) -> str:
    """Speed and memory, each beside bfloat16 of the same run."""
    lines = [
        "| model | GPUs | recomputation | products | tokens/s | against bfloat16 | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    base = {_place(row): row["tokens_per_second"] for row in report["speed"] if _is_base(row)}
    for row in sorted(report["speed"], key=lambda row: (row["gpus"], row["recompute"] != "none")):
        ratio = ""
        if _place(row) in base and not _is_base(row):
            ratio = f"{row['tokens_per_second'] / base[_place(row)]:.2f}x"
        lines.append(
            f"| {row['model']} | {row['gpus']} | {row['recompute']} | {row['name']} "
            f"| {row['tokens_per_second']:,.0f} | {ratio} | {row['memory_gib']:.1f} GiB |"
        )
    return "\n".join(lines) + "\n"


def docs_table(report: dict) -> str:
    """The tables of docs/training.md, as Markdown."""
    parts = [losses_report.head(report), speed_table(report)]
    if report["loss"]:
        parts += [
            losses_report.title(report["loss"]),
            loss_table(report),
            "![Loss over steps with and without FP8](../benchmarks/results/fp8.png)\n",
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _place(row: dict) -> tuple:
    return row["model"], row["gpus"], row["recompute"], row["seq_len"]


def _is_base(row: dict) -> bool:
    return row["name"] == "bfloat16"


def loss_table(report: dict) -> str:
    """Validation loss by step, and its distance from bfloat16 at the last step of both."""
    return losses_report.table(report["loss"], "bfloat16", "products")


def write(report: dict, folder: Path) -> None:
    """The report as JSON, as tables and, if there are losses, as a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fp8.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "fp8.md").write_text(table(report))
    if report["loss"]:
        losses_report.plot(report["loss"], "bfloat16", report["device"], folder / "fp8.png")
