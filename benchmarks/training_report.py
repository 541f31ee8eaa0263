"""Tables and the chart of benchmarks/training.py."""

from __future__ import annotations

import json
from pathlib import Path

import chart
import versions

__all__ = ["docs_table", "readme_table", "segments_table", "table", "write"]


# Measured once and removed since: kept in the JSON, left out of the docs.
REMOVED = ("full, inputs on host",)


def table(report: dict) -> str:
    """Every row, as Markdown."""
    lines = [
        f"{report['device']}, {versions.line(report['versions'])}, {report['date']}. bfloat16 "
        "products, float32 weights, AdamW; MFU of 989 TFLOP/s per GPU, memory per GPU.",
        "",
        "| model | GPUs | layout, recomputation | sequence | tokens per step | tokens/s | "
        "per GPU | MFU | memory, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        head = f"| {row['model']} | {row['gpus']} | {row['name']} | {row['seq_len']:,} "
        if row.get("note"):
            lines.append(f"{head}| {row['note']} | | | | |")
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        lines.append(
            f"{head}| {row['tokens_per_step']:,} | {row['tokens_per_second']:,.0f} "
            f"| {row['tokens_per_second_per_gpu']:,.0f} | {mfu} | {row['memory_gib']:.1f} |"
        )
    if report.get("note"):
        lines += ["", report["note"]]
    return "\n".join(lines) + "\n"


def docs_table(report: dict) -> str:
    """The table of docs/benchmarks.md, as Markdown: all rows but those of the README's table."""
    shown = [id(row) for rows in by_gpus(report).values() for row in rows]
    return _rows_table(
        [
            row
            for row in report["rows"]
            if id(row) not in shown
            and row["suite"] != "segments"
            and row["name"] not in REMOVED
            and not row.get("note")
        ]
    )


def segments_table(report: dict) -> str:
    """The table of docs/training.md, as Markdown: sequences in segments."""
    return _rows_table(_in_segments(report))


def _in_segments(report: dict) -> list[dict]:
    return [row for row in report["rows"] if row["suite"] == "segments" and not row.get("note")]


def by_gpus(report: dict) -> dict[int, list[dict]]:
    """TNL on one sequence per step, all blocks recomputed, cut over all GPUs: number of GPUs ->
    rows by rising length. The newest row counts where a length was measured twice."""
    found: dict[int, dict[int, dict]] = {}
    for row in report["rows"]:
        gpus = row["gpus"]
        alone = gpus == 1 and row["name"] in ("full", "one GPU, full")
        cut = row["name"] == f"cp {gpus}, FSDP, full"
        if row.get("note") or not row["model"].startswith("TNL") or not (alone or cut):
            continue
        if row["tokens_per_step"] == row["seq_len"]:
            found.setdefault(gpus, {})[row["seq_len"]] = row
    return {gpus: [rows[length] for length in sorted(rows)] for gpus, rows in sorted(found.items())}


def readme_table(report: dict) -> str:
    """The table of the README, as Markdown: one sequence per step, and softmax to compare with."""
    rows = [row for rows in by_gpus(report).values() for row in rows]
    softmax = [row for row in report["rows"] if row["model"].startswith("softmax")]
    return _rows_table(rows + [row for row in softmax if not row.get("note")], layout=False)


def _rows_table(rows: list[dict], *, layout: bool = True) -> str:
    lines = [
        f"| model | GPUs |{' layout, recomputation |' * layout} one sequence | tokens/s "
        "| tokens/s per GPU | MFU | memory per GPU |",
        "|---|---|" + "---|" * layout + "---|---|---|---|---|",
    ]
    for row in rows:
        length = f"{row['seq_len']:,} tokens"
        if row["tokens_per_step"] > row["seq_len"]:
            length += f" (x {row['tokens_per_step'] // row['seq_len']})"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        name = f" {row['name']} |" if layout else ""
        lines.append(
            f"| {row['model']} | {row['gpus']} |{name} {length} "
            f"| {row['tokens_per_second']:,.0f} | {row['tokens_per_second_per_gpu']:,.0f} | {mfu} "
            f"| {row['memory_gib']:.1f} GiB |"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict, path: Path) -> None:
    """Tokens/s and memory per GPU over the sequence length, one line per number of GPUs."""
    series = by_gpus(report)
    if not series:
        return

    def lines(key):
        return {
            f"{gpus} GPU{'s' * (gpus > 1)}": (
                [row["seq_len"] for row in rows],
                [row[key] for row in rows],
            )
            for gpus, rows in series.items()
        }

    x = "tokens of one sequence"
    panels = [
        chart.Panel("Tokens per second, all GPUs together", x, lines("tokens_per_second")),
        chart.Panel("Peak memory per GPU, GiB", x, lines("memory_gib")),
    ]
    name = next(iter(series.values()))[0]["model"]
    caption = f"{report['device']}, {name}, one sequence per step, all blocks recomputed"
    chart.draw(panels, caption, path)


def plot_segments(report: dict, path: Path) -> None:
    """Tokens/s and memory of one GPU over the sequence length, beside whole sequences."""
    rows = [row for row in _in_segments(report) if row["gpus"] == 1]
    models = [row["model"] for row in rows]
    if not rows:
        return
    model = max(models, key=models.count)
    series = {"whole, all blocks recomputed": by_gpus(report).get(1, [])}
    for row in rows:
        if row["model"] == model:
            series.setdefault(row["name"], []).append(row)

    def lines(key):
        return {
            name: ([row["seq_len"] for row in each], [row[key] for row in each])
            for name, each in series.items()
            if each
        }

    x = "tokens of one sequence"
    panels = [
        chart.Panel("Tokens per second", x, lines("tokens_per_second")),
        chart.Panel("Peak memory, GiB", x, lines("memory_gib")),
    ]
    chart.draw(panels, f"{report['device']}, {model}, one GPU, one sequence per step", path)


def write(report: dict, folder: Path) -> None:
    """The report as JSON, as a table and as a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "training.md").write_text(table(report))
    plot(report, folder / "training.png")
    plot_segments(report, folder / "segments.png")
