"""Tables and the chart of benchmarks/kernels.py."""

from __future__ import annotations

import json
from pathlib import Path

import chart
import versions

__all__ = ["docs_table", "plot", "table", "write"]

LASP, BASELINE = "lasp", "fla chunk_simple_gla"
# Shapes of the table in docs/benchmarks.md. The chart has more lengths; short calls are bound by
# the host.
IN_DOCS = (
    (1, 131072, 16, 128, 128),
    (1, 1048576, 16, 128, 128),
    (8, 2048, 32, 128, 128),
    (2, 8192, 32, 128, 128),
    (1, 65536, 64, 128, 128),
    (1, 32768, 32, 64, 64),
    (1, 32768, 32, 96, 96),
    (1, 131072, 16, 256, 128),
    (1, 32768, 16, 256, 256),
)


def table(report: dict) -> str:
    """The report as Markdown."""
    parts = [
        f"{report['device']}, copy {_copy(report['rows'])} TB/s, "
        f"{versions.line(report['versions'])}, {_dates(report['rows'])}. bfloat16, medians, caches "
        "cold.",
        _times(report["rows"]),
        _others(report),
        _per_token(report["rows"]),
        _errors(report["errors"]),
        report.get("note", ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _copy(rows: list[dict]) -> str:
    """Copy bandwidth of the runs, TB/s."""
    found = sorted({f"{row['copy_bandwidth'] / 1e12:.2f}" for row in rows})
    return " to ".join(dict.fromkeys((found[0], found[-1])))


def _dates(rows: list[dict]) -> str:
    return ", ".join(sorted({row["date"] for row in rows}))


def docs_table(report: dict) -> str:
    """The table of docs/benchmarks.md, as Markdown: lasp, and the baseline's time over it."""
    lines = [
        "| B, T, H, D, E | forward | backward | extra memory | fla takes | its extra memory |",
        "|---|---|---|---|---|---|",
    ]
    for shape in IN_DOCS:
        same = [r for r in report["rows"] if (tuple(r["shape"]), r["decay"]) == (shape, "middle")]
        found = {row["name"]: row for row in same if not row["note"]}
        if LASP not in found:
            continue
        mine = found[LASP]
        cells = [
            f"{mine[w + '_ms']:.3f} ms ({mine[w + '_fraction']:.0%})"
            for w in ("forward", "backward")
        ]
        cells.append(f"{mine['extra_units']:.1f}")
        if BASELINE in found:
            extra = f"{found[BASELINE]['extra_units']:.1f}"
            cells += [_times_lasp(found[BASELINE], same), extra]
        else:
            cells += ["", ""]
        lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _times(rows: list[dict]) -> str:
    lines = [
        "## Times",
        "",
        "In ms, with the fraction of the copy roofline. `call` is the time from call to call, host",
        "included. Extra memory is the peak of a forward and backward beyond q, k, v and do, in",
        "units of the mean size of q and v. The last column: time over that of lasp.",
        "",
        "| B, T, H, D, E | decay | implementation | forward | backward | extra memory | error "
        "| times lasp |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape = ", ".join(map(str, row["shape"]))
        head = f"| {shape} | {row['decay']} | {row['name']} "
        if row["note"]:
            lines.append(f"{head}| {row['note']} | | | | |")
            continue
        cells = []
        for way in ("forward", "backward"):
            cell = f"{row[way + '_ms']:.3f} ({row[way + '_fraction']:.1%})"
            if row[way + "_call_ms"]:
                cell += f", call {row[way + '_call_ms']:.3f}"
            cells.append(cell)
        cells += [f"{row['extra_units']:.1f}", f"{row['error']:.1e}", _times_lasp(row, rows)]
        lines.append(f"{head}| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times_lasp(row: dict, rows: list[dict]) -> str:
    """Forward and backward of a baseline over lasp's at the same shape and decay."""
    same = [r for r in rows if (r["shape"], r["decay"]) == (row["shape"], row["decay"])]
    lasp = next((r for r in same if r["name"] == LASP and not r["note"]), None)
    if row["name"] == LASP or lasp is None:
        return ""
    return " / ".join(f"{row[w] / lasp[w]:.1f}x" for w in ("forward_ms", "backward_ms"))


def _others(report: dict) -> str:
    step, packed, graph = report["step"], report["packed"], report["graph"]
    ratios = [packed["packed"][w] / packed["dense"][w] for w in ("forward_ms", "backward_ms")]
    return "\n".join(
        [
            f"Decoding step, B 64, H 32, d 128: {step['ms']:.4f} ms ({step['fraction']:.1%} of "
            "copy).",
            "",
            f"Packed, {packed['documents']} documents in 131,072 tokens, against dense: forward "
            f"{ratios[0]:.2f}x, backward {ratios[1]:.2f}x.",
            "",
            f"(1, 2048, 16, 128) under a CUDA graph: forward {graph['forward_ms']:.3f} ms, forward "
            f"and backward {graph['forward_backward_ms']:.3f} ms per replay.",
        ]
    )


def _along_length(rows: list[dict], batch: int = 1) -> dict[str, list[dict]]:
    """Implementation -> rows by rising length, at H 16, D = E = 128 and the middle decay."""
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["shape"][1]):
        plotted = row["shape"][0] == batch and row["shape"][2:] == [16, 128, 128]
        if plotted and row["decay"] == "middle" and not row["note"]:
            found.setdefault(row["name"], []).append(row)
    return found


def _per_token(rows: list[dict]) -> str:
    lines = [
        "## Time per token over the length (H 16, d 128)",
        "",
        "| B | T | forward, ns | backward, ns | both, ns | both, against the longest |",
        "|---|---|---|---|---|---|",
    ]

    def per_token(row):
        batch, T = row["shape"][:2]
        times = [row[w] * 1e6 / (batch * T) for w in ("forward_ms", "backward_ms")]
        return [*times, sum(times)]

    for batch in (1, 4):
        mine = _along_length(rows, batch).get(LASP, [])
        for row in mine:
            forward, backward, both = per_token(row)
            lines.append(
                f"| {batch} | {row['shape'][1]:,} | {forward:.2f} | {backward:.2f} | {both:.2f} "
                f"| {both / per_token(mine[-1])[-1] - 1:+.1%} |"
            )
    return "\n".join(lines) if len(lines) > 4 else ""


def _errors(rows: list[dict]) -> str:
    if not rows:
        return ""
    names = [n for n in rows[0] if n not in ("size", "dtype", "decay")]
    lines = [
        "## Errors",
        "",
        "The largest relative error (Frobenius norm) of o, dq, dk, dv against float64; T 2048.",
        "",
        f"| D, E | dtype | decay | {' | '.join(names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = ["did not run" if row[n] is None else f"{row[n]:.1e}" for n in names]
        size = ", ".join(map(str, row["size"]))
        lines.append(f"| {size} | {row['dtype']} | {row['decay']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Time per token over the length, at B 1, H 16, d 128; implementations with several lengths."""
    lines = {}
    for name, rows in _along_length(report["rows"]).items():
        if len(rows) > 2:
            both = [(r["forward_ms"] + r["backward_ms"]) * 1e6 / r["shape"][1] for r in rows]
            lines[name] = ([r["shape"][1] for r in rows], both)
    if lines:
        panel = chart.Panel("Forward and backward, ns per token", "tokens of one sequence", lines)
        caption = f"{report['device']}: B 1, H 16, d 128, bfloat16"
        chart.draw([panel], caption, path)


def write(report: dict, folder: Path) -> None:
    """The report as JSON, as tables and as a chart."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "kernels.md").write_text(table(report))
    plot(report, folder / "kernels.png")
