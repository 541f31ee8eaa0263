"""A function applied to many items by several processes, with the results in order."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from launch.exit_codes import DataError

T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_order(
    start: Callable[..., Callable[[T], R]],
    arguments: tuple[Any, ...],
    items: Iterable[T],
    workers: int,
) -> Iterator[R]:
    """`map(start(*arguments), items)`, in `workers` processes; with one worker, in this one.

    Three items per worker are under way at most, so neither items nor results pile up.

    Args:
        start: called once in each process; what it returns is applied to items.

    Raises:
        DataError: a worker ended without an exception.
    """
    if workers == 1:
        yield from map(start(*arguments), items)
        return
    # Not forked: a fork inherits the threads' locks of torch and tokenizers, but no threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (start, arguments))
    items = iter(items)
    try:
        pending = collections.deque(
            pool.submit(_apply, item) for item in itertools.islice(items, 3 * workers)
        )
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(_apply, item) for item in itertools.islice(items, 1))
            yield result
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, as happens when memory runs out: use fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]


def _start(start: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _function
    # Ctrl-C stops the parent, which stops its workers. If it is killed, they end by themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One thread each: there is a process per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = start(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _apply(item: Any) -> Any:
    return _function(item)
