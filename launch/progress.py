"""A progress bar for what takes long: on a terminal; elsewhere a line every half minute."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import track

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 30.0


def progress(
    items: Iterable[T], name: str, *, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Yield `items` and show how many are done.

    Args:
        name: what is being done.
        total: number of items, if `items` has no length.
        enabled: False shows nothing, as on all ranks but the first.
    """
    if not enabled:
        yield from items
        return
    if total is None:
        total = len(items)
    if sys.stdout.isatty():
        yield from track(items, name, total=total, transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            print(f"{name}: {done:,}/{total:,}", flush=True)
            last = time.monotonic()
        yield item
