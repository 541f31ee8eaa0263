"""What benchmarks/sequence_parallel.py measured, as Markdown and as a plot."""

from __future__ import annotations

import json
from pathlib import Path

import cost_model

__all__ = ["RESULTS", "table", "write"]

RESULTS = Path(__file__).parent / "results"
ALONE = "lasp, no group"
# Figures that others published, to stand beside the projection.
PUBLISHED = (
    "Published, on other machines and models: ZeCO's pipelined scan of states takes 226 us on 8 "
    "ranks and 2,165 us on 256, its all-gather 375 and 8,514 us; its 1B model runs at 95.4% of "
    "data-parallel speed on 8 H100, 92% on 64, 88% on 256 (32K tokens per GPU, arXiv 2507.01004). "
    "LASP-2 reports 15.2% more tokens per second than LASP at 2048K tokens on 64 GPUs (arXiv "
    "2502.07563)."
)
# The pass that is projected: a layer of a 1B model on 32,768 tokens of one GPU, 6.5e13/24 FLOPs at
# 400 TFLOP/s, a third of it before the state is there.
LAYERS, BEFORE, AFTER = 24, 2.3e-3, 4.5e-3


def table(report: dict) -> str:
    """The report as Markdown."""
    parts = [
        f"{report['device']}, B 1, H {report['heads']}, d {report['head_dim']}, {report['dtype']}, "
        f"torch {report['torch']}, CUDA_DEVICE_MAX_CONNECTIONS {report['max_connections']}, "
        f"{report['date']}.",
        _times(report["rows"]),
        _exchanges(report),
        _overlap(report.get("overlap", [])),
        _projection(report),
        report.get("note", ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _times(rows: list[dict]) -> str:
    lines = [
        "## Times",
        "",
        "Tokens are those of one rank. In ms, median of the slowest rank; in brackets relative to",
        "the same local work with no group; `call` is the time from call to call, hosts included.",
        "",
        "| tokens per rank | implementation | forward | forward + backward | error |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["tokens"]):
        alone = next((r for r in rows if r["name"] == ALONE and r["tokens"] == row["tokens"]), None)
        cells = []
        for key in ("forward_ms", "both_ms"):
            relative = f" ({row[key] / alone[key]:.2f}x)" if alone and row is not alone else ""
            cells.append(f"{row[key]:.3f}{relative}")
        if "both_call_ms" in row:
            cells[-1] += f", call {row['both_call_ms']:.3f}"
        error = f"{row['error']:.1e}"
        lines.append(f"| {row['tokens']:,} | {row['name']} | {' | '.join(cells)} | {error} |")
    return "\n".join(lines)


def _exchanges(report: dict) -> str:
    links = {m: cost_model.Link(**link) for m, link in report["links"].items()}
    lines = [
        "## The exchange alone",
        "",
        "Until the last rank has its state, in us; in brackets what the cost model says with the "
        "latency and bandwidth that fit these rows best: "
        + ", ".join(
            f"{method} {1e6 * link.latency:.1f} us and {link.bandwidth / 1e9:.0f} GB/s"
            for method, link in links.items()
        )
        + ".",
        "",
        "| exchange | layout | "
        + " | ".join(f"{size / 2**20:g} MiB" for size in _sizes(report))
        + " |",
        "|---|---|" + "---|" * len(_sizes(report)),
    ]
    for method, layout in dict.fromkeys((r["method"], r["layout"]) for r in report["exchanges"]):
        cells = []
        for size in _sizes(report):
            row = next(
                r
                for r in report["exchanges"]
                if (r["method"], r["layout"], r["bytes"]) == (method, layout, size)
            )
            cell = f"{1000 * row['ms']:.0f}"
            if method in links:
                model = cost_model.seconds(method, report["ranks"], size, links[method], layout)
                cell += f" ({1e6 * model:.0f})"
            cells.append(cell)
        lines.append(f"| {method} | {layout} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sizes(report):
    return sorted({row["bytes"] for row in report["exchanges"]})


def _overlap(rows: list[dict]) -> str:
    if not rows:
        return ""
    lines = [
        "## Overlap",
        "",
        "Kernels of communication in a forward and backward of the ring, in us per rank: their",
        "time (which includes waiting for the other rank), and how much of it other kernels ran.",
        "",
        "| tokens per rank | implementation | "
        + " | ".join(f"rank {i}" for i in range(len(rows[0]["ranks"])))
        + " |",
        "|---|---|" + "---|" * len(rows[0]["ranks"]),
    ]
    for row in rows:
        cells = [f"{r['communication_us']:.0f}, {r['under_kernels_us']:.0f}" for r in row["ranks"]]
        lines.append(f"| {row['tokens']:,} | {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _projection(report: dict) -> str:
    links = {m: cost_model.Link(**link) for m, link in report["links"].items()}
    if set(links) != set(cost_model.METHODS):
        return ""
    state = report["heads"] * report["head_dim"] ** 2 * 4
    lines = [
        "## Projection, not measured",
        "",
        "From the fitted links inside a host of 8 and an assumed network between hosts (400 Gbit/s",
        "per GPU, 10 us more per message), with the formulas of benchmarks/cost_model.py.",
        cost_model.projection(links, state, LAYERS, BEFORE, AFTER),
        "",
        PUBLISHED,
    ]
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Times over tokens per rank, and relative to the local work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in report["rows"] if "zigzag" not in r["name"]]
    alone = {r["tokens"]: r["both_ms"] for r in rows if r["name"] == ALONE}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for number, name in enumerate(dict.fromkeys(r["name"] for r in rows)):
        style = dict(label=name, color=f"C{number}", marker="o")
        mine = sorted((r for r in rows if r["name"] == name), key=lambda r: r["tokens"])
        tokens = [r["tokens"] for r in mine]
        axes[0].plot(tokens, [r["both_ms"] for r in mine], **style)
        if name != ALONE and all(t in alone for t in tokens):
            relative = [r["both_ms"] / alone[r["tokens"]] for r in mine]
            axes[1].plot(tokens, relative, **style)
    axes[0].set(ylabel="forward + backward, ms", yscale="log")
    axes[1].set(ylabel="relative to the same local work", yscale="log")
    for axis in axes:
        axis.set(xlabel="tokens per rank", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(
        f"{report['device']}: B 1, H {report['heads']}, d {report['head_dim']}, {report['dtype']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(report: dict, folder: Path, with_plot: bool = False) -> None:
    """The report as JSON and as a table, named by the number of ranks; and as a plot, which takes
    longer."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"sequence_parallel_{report['ranks']}"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(report))
    if with_plot:
        plot(report, folder / f"{name}.png")
