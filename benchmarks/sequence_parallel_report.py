"""Tables and the chart of benchmarks/sequence_parallel.py."""

from __future__ import annotations

import json
from pathlib import Path

import chart
import cost_model

__all__ = ["BY_TOKEN", "RESULTS", "docs_table", "plot", "table", "write"]

RESULTS = Path(__file__).parent / "results"
NO_GROUP = "lasp, no group"
# Ends the names of rows with a decay per token.
BY_TOKEN = ", by token"
# What was measured once and has been removed since: kept in the JSON, left out of tables and chart.
REMOVED = ("lasp ring, two calls",)
# Lines of the chart, by name of the row.
CHARTED = {
    "lasp ring": "ring",
    "lasp ring, messages": "ring, messages",
    "lasp all_gather": "all_gather (LASP-2)",
    "lasp doubling": "doubling",
    "head all-to-all + fla": "all-to-all (Ulysses), fla",
}
# Columns of the table in docs/benchmarks.md, likewise.
IN_DOCS = {
    "lasp ring": "ring",
    "lasp ring, messages": "ring, messages",
    "lasp all_gather": "all_gather",
    "lasp doubling": "doubling",
    "lasp ring, zigzag": "ring, zigzag",
    "head all-to-all + fla": "all-to-all (Ulysses), fla",
}


def table(report: dict) -> str:
    """The report as Markdown."""
    parts = [
        f"{report['device']}, B 1, H {report['heads']}, d {report['head_dim']}, {report['dtype']}, "
        f"torch {report['torch']}, CUDA_DEVICE_MAX_CONNECTIONS {report['max_connections']}, "
        f"{report['date']}.",
        _times(report["rows"]),
        _exchanges(report),
        _overlap(report.get("overlap", [])),
        report.get("note", ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def docs_table(reports: list[dict]) -> str:
    """The table of docs/benchmarks.md, as Markdown: forward and backward over the local work."""
    lines = [
        "| GPUs | tokens per rank | no group | " + " | ".join(IN_DOCS.values()) + " |",
        "|---|---|---|" + "---|" * len(IN_DOCS),
    ]
    for report in sorted(reports, key=lambda report: report["ranks"]):
        times = {(row["name"], row["tokens"]): row["both_ms"] for row in _current(report)}
        for name, tokens in sorted(times, key=lambda key: key[1]):
            if name != NO_GROUP:
                continue
            local = times[name, tokens]
            cells = [
                f"{times[other, tokens] / local:.2f}x" if (other, tokens) in times else ""
                for other in IN_DOCS
            ]
            head = f"| {report['ranks']} | {tokens:,} | {local:.3f} ms "
            lines.append(f"{head}| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _current(report: dict) -> list[dict]:
    """Rows but those whose names are marked in the JSON as outdated by a change of the code."""
    return [row for row in report["rows"] if row["name"] not in report.get("outdated", ())]


def _times(rows: list[dict]) -> str:
    lines = [
        "## Times",
        "",
        "Tokens are per rank. Times in ms: medians of the slowest rank; in brackets relative to",
        "the same local work with no group. `call` is the time from call to call, host included.",
        "By token: with a decay per token, and its gradient.",
        "",
        "| tokens per rank | implementation | forward | forward + backward | error |",
        "|---|---|---|---|---|",
    ]
    rows = [row for row in rows if row["name"] not in REMOVED]
    for row in sorted(rows, key=lambda row: row["tokens"]):
        base = NO_GROUP + BY_TOKEN * row["name"].endswith(BY_TOKEN)
        same = (r for r in rows if r["name"] == base and r["tokens"] == row["tokens"])
        local = next(same, None)
        cells = []
        for key in ("forward_ms", "both_ms"):
            relative = f" ({row[key] / local[key]:.2f}x)" if local and row is not local else ""
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
        "Time until the last rank has its state, in us, and in brackets that of the latency and "
        "bandwidth that fit these rows best: "
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
        "Communication kernels in a forward and backward of the ring, in us per rank: their time",
        "(waiting for the other rank included), and how much of it other kernels ran under.",
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


def plot(report: dict, path: Path) -> None:
    """Time over that of the same local work without a group, by tokens per rank."""
    rows = _current(report)
    local = {r["tokens"]: r["both_ms"] for r in rows if r["name"] == NO_GROUP}
    lines = {}
    for name, label in CHARTED.items():
        mine = [r for r in rows if r["name"] == name and r["tokens"] in local]
        mine.sort(key=lambda row: row["tokens"])
        if mine:
            tokens = [row["tokens"] for row in mine]
            lines[label] = (tokens, [row["both_ms"] / local[row["tokens"]] for row in mine])
    if lines:
        title = "Forward and backward, times the same local work without a group"
        panel = chart.Panel(title, "tokens per rank", lines, log_y=True, y_ticks=(1, 1.5, 2, 5, 10))
        caption = (
            f"{report['device']}: B 1, H {report['heads']}, d {report['head_dim']}, "
            f"{report['dtype']}"
        )
        chart.draw([panel], caption, path)


def write(report: dict, folder: Path, with_plot: bool = False) -> None:
    """The report as JSON and as tables, named by the number of ranks; with_plot: the chart too,
    which takes longer."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"sequence_parallel_{report['ranks']}"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(report))
    if with_plot:
        plot(report, folder / f"{name}.png")
