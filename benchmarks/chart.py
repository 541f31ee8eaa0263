"""One style for all charts: one message each, few lines, each labelled where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["Panel", "draw", "tokens_in_short"]

# Distinguishable in print and with the common kinds of colour blindness.
COLORS = (
    "#1d4ed8",
    "#c2410c",
    "#0f766e",
    "#9333ea",
    "#64748b",
    "#b45309",
    "#be185d",
    "#15803d",
    "#0e7490",
    "#1f2937",
)


class Panel:
    """One set of axes.

    Args:
        title: what is drawn, with its unit.
        x: the label of the horizontal axis.
        lines: label -> (x values, y values).
        log_y: a logarithmic vertical axis, numbered at `y_ticks`; otherwise it starts at 0.
        label_room: room for labels, as a part of the lines' width.
        x_in_full: number the horizontal axis as 4,096, not as 4K.
    """

    def __init__(
        self,
        title: str,
        x: str,
        lines: dict[str, tuple[Sequence[float], Sequence[float]]],
        *,
        log_y: bool = False,
        y_ticks: Sequence[float] = (),
        label_room: float = 0.2,
        x_in_full: bool = False,
    ) -> None:
        self.title, self.x, self.lines = title, x, lines
        self.log_y, self.y_ticks, self.label_room = log_y, y_ticks, label_room
        self.x_in_full = x_in_full


def draw(panels: Sequence[Panel], caption: str, path: Path) -> None:
    """Write the panels side by side as a PNG, with a caption below. Each label keeps its colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = 7.4 if len(panels) == 1 else 5.6 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.9), squeeze=False)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    colors = dict(zip(labels, COLORS, strict=False))
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw_panel(axis, panel, colors)
    figure.text(0.01, 0.01, caption, fontsize=8.5, color="#475569")
    figure.tight_layout(rect=(0, 0.05, 1, 1), w_pad=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_panel(axis, panel: Panel, colors: dict[str, str]) -> None:
    axis.set_xscale("log", base=2)
    if panel.log_y:
        axis.set_yscale("log")
    for label, (x, y) in panel.lines.items():
        axis.plot(x, y, color=colors[label], marker="o", markersize=4.5, linewidth=2)
    lengths = sorted({each for x, _ in panel.lines.values() for each in x})
    number = "{:,}".format if panel.x_in_full else tokens_in_short
    axis.set_xticks(_apart(lengths), [number(each) for each in _apart(lengths)])
    axis.minorticks_off()
    if panel.log_y:
        heights = [each for _, y in panel.lines.values() for each in y]
        axis.set_ylim(0.9 * min(heights), 1.2 * max(heights))
        low, high = axis.get_ylim()
        ticks = [tick for tick in panel.y_ticks if low <= tick <= high]
        axis.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    else:
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_title(panel.title, loc="left", fontsize=11)
    axis.set_xlabel(panel.x)
    axis.grid(axis="y", color="#e2e8f0")
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    # Room for the labels, which stand to the right of the last point.
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** panel.label_room)
    _label_lines(axis, panel, colors)


def _label_lines(axis, panel: Panel, colors: dict[str, str]) -> None:
    """Write each line's label next to its last point, moved up where two would overlap."""
    ends = {label: (x[-1], y[-1]) for label, (x, y) in panel.lines.items()}
    to_pixels = axis.transData.transform
    lowest: dict[float, float] = {}
    for label, end in sorted(ends.items(), key=lambda item: item[1][1]):
        column, height = to_pixels(end)
        height = max(height, lowest.get(end[0], -1e9))
        lowest[end[0]] = height + 14
        offset = (height - to_pixels(end)[1]) * 72 / axis.figure.dpi
        axis.annotate(
            label,
            end,
            xytext=(7, offset),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=colors[label],
        )


def _apart(lengths: Sequence[float]) -> list[float]:
    """Those of the sorted lengths that leave room for their numbers."""
    kept: list[float] = []
    for length in lengths:
        if not kept or length >= 1.9 * kept[-1]:
            kept.append(length)
    # Of many, every other one, with the last.
    return kept if len(kept) <= 8 else kept[(len(kept) - 1) % 2 :: 2]


def tokens_in_short(tokens: float) -> str:
    """2048 -> "2K", 1048576 -> "1M"."""
    return f"{tokens / 2**10:.4g}K" if tokens < 2**20 else f"{tokens / 2**20:.4g}M"
