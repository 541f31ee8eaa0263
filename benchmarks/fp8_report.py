"""Tables and the chart of benchmarks/fp8.py."""

from __future__ import annotations

import json
from pathlib import Path

import versions

__all__ = ["docs_table", "loss_table", "speed_table", "table", "write"]


def table(report: dict) -> str:
    """Everything, as Markdown."""
    return "\n".join([_head(report), "", speed_table(report), loss_table(report)])


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
    parts = [_head(report), speed_table(report)]
    if report["loss"]:
        run = next(iter(report["loss"].values()))
        parts += [
            f"Validation loss in nats per byte, {run['model']}, {run['tokens_per_step']:,} tokens "
            "per step of the sources of Python's standard library:",
            loss_table(report),
            "![Loss over steps with and without FP8](../benchmarks/results/fp8.png)\n",
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _head(report: dict) -> str:
    text = f"{report['device']}, {versions.line(report['versions'])}, {report['date']}."
    return f"{text} {report['note']}" if report.get("note") else text


def _place(row: dict) -> tuple:
    return row["model"], row["gpus"], row["recompute"], row["seq_len"]


def _is_base(row: dict) -> bool:
    return row["name"] == "bfloat16"


def loss_table(report: dict) -> str:
    """Validation loss by step, and its distance from bfloat16 at the last step of both."""
    runs = _runs(report)
    if not runs:
        return ""
    base = dict(next(iter(runs.values()))["validation"])
    lines = [
        f"| products | {' | '.join(f'step {step:,}' for step in base)} | last against bfloat16 |",
        "|---|" + "---|" * (len(base) + 1),
    ]
    for recipe, run in runs.items():
        losses = dict(run["validation"])
        ratio = ""
        if recipe != "bfloat16" and "bfloat16" in runs:
            last = max(losses.keys() & base.keys())
            ratio = f"{losses[last] / base[last] - 1:+.2%}"
        shown = " | ".join(f"{losses[step]:.4f}" if step in losses else "" for step in base)
        lines.append(f"| {recipe} | {shown} | {ratio} |")
    return "\n".join(lines) + "\n"


def _runs(report: dict) -> dict[str, dict]:
    """The runs by recipe, bfloat16 first."""
    return dict(sorted(report["loss"].items(), key=lambda item: item[0] != "bfloat16"))


def plot(report: dict, path: Path) -> None:
    """Training and validation loss over steps, a line per recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from chart import COLORS
    from matplotlib import pyplot

    runs = _runs(report)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.9))
    for axis, which in zip(axes, ("train", "validation"), strict=True):
        for (recipe, run), color in zip(runs.items(), COLORS, strict=False):
            axis.plot(*zip(*run[which], strict=True), label=recipe, color=color, linewidth=1.5)
        axis.set_title(f"{which} loss, nats per byte", loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.grid(axis="y", color="#e2e8f0")
        axis.legend(frameon=False)
    first = next(iter(runs.values()))
    caption = f"{report['device']}, {first['model']}, {first['tokens_per_step']:,} tokens per step"
    figure.text(0.01, 0.01, caption, fontsize=8.5, color="#475569")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(report: dict, folder: Path) -> None:
    """The report as JSON, as tables and, if there are losses, as a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fp8.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "fp8.md").write_text(table(report))
    if report["loss"]:
        plot(report, folder / "fp8.png")
