"""The table of benchmarks/megatron_training.py."""

from __future__ import annotations

import json
from pathlib import Path

import versions

__all__ = ["table", "write"]


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['device']}. The number in the layout is the number of GPUs. One sequence per "
        "step, all layers recomputed, memory per GPU.",
        "",
        "| model | layout | sequence | tokens/s | per GPU | memory, GiB | steps | first, last loss "
        "| used | measured with |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        is_native = row["model"] == "launcher"
        name = "TNL, launch/train.py" if is_native else f"{row['model']}, megatron-core"
        gpus = int(row["layout"].split()[1])
        losses = row.get("losses")
        losses = f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else ""
        used = "; ".join(f"{part} {which}" for part, which in row["used"].items())
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
        lines.append(
            f"| {row['preset']} {name} | {row['layout']} | {row['seq_len']:,} "
            f"| {row['tokens_per_second']:,.0f} | {row['tokens_per_second'] / gpus:,.0f} "
            f"| {memory} | {len(row['steps'])} | {losses} | {used} "
            f"| {versions.line(row['versions'])}, {row['date']} |"
        )
    if report.get("note"):
        lines += ["", report["note"]]
    return "\n".join(lines) + "\n"


def write(report: dict, folder: Path) -> None:
    """The report as JSON and as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "megatron.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "megatron.md").write_text(table(report))
