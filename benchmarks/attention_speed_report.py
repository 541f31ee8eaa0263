"""Tables and charts of benchmarks/attention_speed.py."""

from __future__ import annotations

import json
from pathlib import Path

import chart
import versions

__all__ = ["docs_table", "plot", "sequences_of", "spreads", "table", "write", "write_json"]

# Shorter lengths are left out of the spread: the papers' claim is about long ones.
FROM = 2048
TITLES = {"attention": "Attention alone", "1b": "Models of 1B", "385m": "Models of 0.4B"}
TNL, SEGMENTS = "TNL", "TNL, in segments"


def table(report: dict) -> str:
    """The report as Markdown."""
    dates = sorted({row["date"] for row in report["rows"]})
    span = " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))
    where = ", ".join(filter(None, (report["device"], versions.line(report["versions"]), span)))
    head = (
        f"{where}. Forward and backward; "
        f"{report['tokens']:,} tokens in a call ({report['model_tokens']:,} of a model), or one "
        "longer sequence. Thousands of tokens per second (GiB at the peak)."
    )
    parts = [head]
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        parts += [f"## {title_of(part, report)}", _by_length(report, part), _notes(report, part)]
    parts += ["## Spread", _spread_lines(report)]
    if report["errors"]:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in report["errors"].items())
        parts.append(f"Largest relative error of o, dq, dk, dv against float64: {errors}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def docs_table(report: dict | None) -> str:
    """The tables of docs/papers.md, as Markdown; None: there are no results."""
    if report is None:
        return "Not run yet.\n"
    charts = [
        f"![{title_of(part, report)}](../benchmarks/results/{_chart_name(part)})"
        for part in dict.fromkeys(row["part"] for row in report["rows"])
    ]
    return table(report).replace("\n## ", "\n### ") + "\n" + "\n\n".join(charts) + "\n"


def _chart_name(part: str) -> str:
    return f"attention_speed_{part}.png"


def sequences_of(row: dict, report: dict) -> int:
    """The sequences of a call, from the row's part and length."""
    tokens = report["tokens" if row["part"] == "attention" else "model_tokens"]
    return max(1, tokens // row["seq_len"])


def title_of(part: str, report: dict) -> str:
    title = TITLES.get(part, f"Models of preset {part}")
    if part == "attention":
        title += f": {report['heads']} heads of {report['head_size']}"
    return title


def _series(report: dict, part: str) -> dict[str, list[dict]]:
    """name -> rows by rising length, in the order of measurement."""
    found: dict[str, list[dict]] = {}
    for row in report["rows"]:
        if row["part"] == part:
            found.setdefault(row["name"], []).append(row)
    return {name: sorted(rows, key=lambda r: r["seq_len"]) for name, rows in found.items()}


def _by_length(report: dict, part: str) -> str:
    series = _series(report, part)
    lengths = sorted({row["seq_len"] for rows in series.values() for row in rows})
    lines = [
        f"| | {' | '.join(chart.tokens_in_short(length) for length in lengths)} |",
        "|---|" + "---|" * len(lengths),
    ]
    for name, rows in series.items():
        at = {row["seq_len"]: _cell(row) + _mark(row, report) for row in rows}
        lines.append(f"| {name} | {' | '.join(at.get(length, '') for length in lengths)} |")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    if row.get("note"):
        return row["note"].split(":")[0]
    thousands = f"{row['tokens_per_second'] / 1000:,.3g}"
    if row["tokens_per_second"] >= 1e6:
        thousands = f"{row['tokens_per_second'] / 1000:,.0f}"
    return thousands if row["memory_gib"] is None else f"{thousands} ({row['memory_gib']:.1f})"


def _mark(row: dict, report: dict) -> str:
    """A star on a row of an earlier run with other calls."""
    return "" if row["sequences"] == sequences_of(row, report) else "*"


def _notes(report: dict, part: str) -> str:
    """What a star means, and why curves end before the longest length."""
    starred = {
        row["sequences"] * row["seq_len"]
        for row in report["rows"]
        if row["part"] == part and _mark(row, report)
    }
    notes = [f"\\* Calls of {tokens:,} tokens." for tokens in sorted(starred)]
    ends = [
        f"{name} at {rows[-1]['seq_len']:,} tokens: {rows[-1]['note']}."
        for name, rows in _series(report, part).items()
        if rows[-1].get("note")
    ]
    return " ".join(notes + ends)


def spreads(report: dict) -> list[tuple[str, str, int, int, float]]:
    """(part, name, first length, last length, fastest over slowest length - 1), of the lengths from
    2,048 on at which a curve was measured with the calls of this report, where there are several.
    A TNL's last row is the whole of its curve: in segments beyond the lengths that fit without."""
    found = []
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        series = {
            name: [
                row
                for row in rows
                if not row.get("note") and row["seq_len"] >= FROM and not _mark(row, report)
            ]
            for name, rows in _series(report, part).items()
        }
        whole = series.get(TNL, [])
        if whole and series.get(SEGMENTS):
            beyond = [r for r in series[SEGMENTS] if r["seq_len"] > whole[-1]["seq_len"]]
            series["TNL, in segments where it does not fit whole"] = whole + beyond
        for name, rows in series.items():
            speeds = [row["tokens_per_second"] for row in rows]
            if len(speeds) > 1:
                ends = rows[0]["seq_len"], rows[-1]["seq_len"]
                found.append((part, name, *ends, max(speeds) / min(speeds) - 1))
    return found


def _spread_lines(report: dict) -> str:
    short = chart.tokens_in_short
    lines = [
        "Tokens per second at the fastest length over those at the slowest:",
        "",
        "| | | lengths | spread |",
        "|---|---|---|---|",
    ]
    for part, name, first, last, spread in spreads(report):
        # A curve that falls many times over is no spread.
        figure = f"{spread:.1%}" if spread < 1 else f"{spread + 1:,.1f}x"
        title = TITLES.get(part, part)
        lines.append(f"| {title} | {name} | {short(first)} to {short(last)} | {figure} |")
    return "\n".join(lines)


def plot(report: dict, folder: Path) -> None:
    """A chart per part: speed and memory over the length, attention_speed_PART.png."""
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        measured = {
            name: [row for row in rows if not row.get("note")]
            for name, rows in _series(report, part).items()
        }

        def lines(key, measured=measured):
            return {
                name: ([r["seq_len"] for r in rows], [r[key] for r in rows])
                for name, rows in measured.items()
                if rows and all(r[key] is not None for r in rows)
            }

        x = "tokens of one sequence"
        ticks = [digit * 10.0**power for power in range(9) for digit in (1, 2, 5)]
        panels = [
            chart.Panel(title, x, lines(key), log_y=True, y_ticks=ticks, label_room=0.5)
            for title, key in (
                ("Tokens per second", "tokens_per_second"),
                ("Peak memory, GiB", "memory_gib"),
            )
            if lines(key)
        ]
        if panels:
            caption = f"{report['device']}: {title_of(part, report)}, forward and backward"
            chart.draw(panels, caption, folder / _chart_name(part))


def write(report: dict, folder: Path) -> None:
    """The report as JSON, as tables and as charts."""
    write_json(report, folder)
    (folder / "attention_speed.md").write_text(table(report))
    plot(report, folder)


def write_json(report: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention_speed.json").write_text(json.dumps(report, indent=1) + "\n")
