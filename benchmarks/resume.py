"""Going on from the JSON file of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["differing", "earlier_report"]


def differing(before: dict[str, Any], report: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The names whose values in an earlier report are not those of `report`."""
    return [name for name in names if before.get(name) != report[name]]


def earlier_report(
    path: Path, report: dict[str, Any], names: Iterable[str]
) -> dict[str, Any] | None:
    """The report in the file, None if there is no file, or one of another run: then prints which
    names differ from those of `report`."""
    if not path.exists():
        return None
    before = json.loads(path.read_text())
    others = differing(before, report, names)
    if others:
        print(f"{path} is of a run with other {', '.join(others)} and is replaced", flush=True)
        return None
    print(f"going on from {path}", flush=True)
    return before
