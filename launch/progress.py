"""A progress bar for what takes long: on a terminal; elsewhere a line every half minute."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0


class LineTimer:
    """Says when the next line about something slow is due: every half minute."""

    def __init__(self) -> None:
        self.began = self._printed = time.monotonic()

    def is_due(self) -> bool:
        """True if half a minute has passed since this was True, or since the beginning."""
        now = time.monotonic()
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return False
        self._printed = now
        return True


def progress(
    items: Iterable[T],
    name: str,
    *,
    total: int | None = None,
    size: Callable[[T], int] | None = None,
    enabled: bool = True,
) -> Iterator[T]:
    """Yield `items` and show how many are done.

    Args:
        name: what is being done.
        total: number of items, if `items` has no length; with `size`, of bytes.
        size: the bytes of an item, which are then shown instead of items.
        enabled: False shows nothing, as on all ranks but the first.
    """
    if not enabled:
        yield from items
        return
    if total is None:
        total = len(items)
    if sys.stdout.isatty():
        yield from _with_bar(items, name, total, size)
        return
    timer, done = LineTimer(), 0
    for item in items:
        if timer.is_due():
            print(f"{name}: {_amount(done, total, size is not None)}", flush=True)
        yield item
        done += 1 if size is None else size(item)


def _with_bar(
    items: Iterable[T], name: str, total: int, size: Callable[[T], int] | None
) -> Iterator[T]:
    amount = [MofNCompleteColumn()] if size is None else [DownloadColumn(), TransferSpeedColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn()]
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(name, total=total)
        for item in items:
            yield item
            bar.advance(task, 1 if size is None else size(item))


def _amount(done: int, total: int, are_bytes: bool) -> str:
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if are_bytes else f"{done:,}/{total:,}"
