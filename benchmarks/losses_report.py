"""The table and the chart of loss curves that are compared with one of them."""

from __future__ import annotations

from pathlib import Path

import versions

__all__ = ["head", "plot", "table", "title"]


def head(report: dict) -> str:
    """Where and when a report was measured."""
    text = f"{report['device']}, {versions.line(report['versions'])}, {report['date']}."
    return f"{text} {report['note']}" if report.get("note") else text


def title(runs: dict[str, dict]) -> str:
    """What `table` shows."""
    run = next(iter(runs.values()))
    return (
        f"Validation loss in nats per byte, {run['model']}, {run['tokens_per_step']:,} tokens "
        "per step of the sources of Python's standard library:"
    )


def table(runs: dict[str, dict], base: str, column: str) -> str:
    """Validation loss by step, and its distance from the run `base` at the last step of both.

    Args:
        runs: name -> what `losses.train` returned.
        column: what the names are.
    """
    runs = _sorted(runs, base)
    if not runs:
        return ""
    first = dict(next(iter(runs.values()))["validation"])
    lines = [
        f"| {column} | {' | '.join(f'step {step:,}' for step in first)} | last against {base} |",
        "|---|" + "---|" * (len(first) + 1),
    ]
    for name, run in runs.items():
        losses = dict(run["validation"])
        ratio = ""
        if name != base and base in runs:
            last = max(losses.keys() & first.keys())
            ratio = f"{losses[last] / first[last] - 1:+.2%}"
        shown = " | ".join(f"{losses[step]:.4f}" if step in losses else "" for step in first)
        lines.append(f"| {name} | {shown} | {ratio} |")
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, dict], base: str, device: str, path: Path) -> None:
    """Training and validation loss over steps, a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from chart import COLORS
    from matplotlib import pyplot

    runs = _sorted(runs, base)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.9))
    for axis, which in zip(axes, ("train", "validation"), strict=True):
        # A run that ended early may have validated once: a point, no line.
        style = dict(linewidth=1.5, marker="o" if which == "validation" else "", markersize=4)
        for (name, run), color in zip(runs.items(), COLORS, strict=False):
            axis.plot(*zip(*run[which], strict=True), label=name, color=color, **style)
        axis.set_title(f"{which} loss, nats per byte", loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.grid(axis="y", color="#e2e8f0")
        axis.legend(frameon=False)
    first = next(iter(runs.values()))
    caption = f"{device}, {first['model']}, {first['tokens_per_step']:,} tokens per step"
    figure.text(0.01, 0.01, caption, fontsize=8.5, color="#475569")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _sorted(runs: dict[str, dict], base: str) -> dict[str, dict]:
    """The runs, `base` first."""
    return dict(sorted(runs.items(), key=lambda item: item[0] != base))
