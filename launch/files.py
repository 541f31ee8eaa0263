"""Reading what others wrote: files that may be damaged, endless, or no files at all.

Every text and every JSON that a program of this package reads comes through here. Only regular
files are opened, so nothing waits for the other end of a FIFO; problems of a path are OSErrors with
a `strerror`, those of the content ValueErrors.
"""

import errno
import io
import json
import math
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any, BinaryIO

# Deeper JSON is not of this package, nor of any that it reads.
_MOST_LEVELS = 100
# Long enough for the 31 digits that transformers writes for "no limit".
_MOST_DIGITS = 40
# Of a text that is read as a whole.
_TEXT_LIMIT = 1 << 30


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened to be read without a buffer.

    Raises:
        OSError: it is missing, cannot be read, or is a folder, FIFO, socket or device.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise OSError(errno.EINVAL, "the path holds a NUL byte", str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    os.set_blocking(descriptor, True)
    return io.FileIO(descriptor)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, as Python reads text: without a byte order mark, and `\\r\\n` as
    `\\n`.

    Raises:
        OSError: it cannot be read, or is larger than 1 GiB.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _TEXT_LIMIT:
            raise OSError(errno.EFBIG, f"{size:,} bytes, the limit is {_TEXT_LIMIT:,}", str(path))
        text = file.read().decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, *, allow_nan: bool = False) -> Any:
    """The content of a JSON file. Raises OSError and ValueError."""
    return parse_json(read_text(path), allow_nan=allow_nan)


def parse_json(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """What a JSON text says.

    Args:
        allow_nan: accept NaN and infinities, which are not JSON but which Python writes.

    Raises:
        ValueError: it is not JSON or not UTF-8, is nested deeper than 100 levels, or has a number
            of more than 40 digits, or, without allow_nan, one that is no finite float.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    constant = None if allow_nan else _refuse_constant
    number = None if allow_nan else _finite
    try:
        value = json.loads(text, parse_constant=constant, parse_float=number, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested deeper than {_MOST_LEVELS} levels") from None
    # Most texts have too few brackets to be deep.
    if text.count("[") + text.count("{") > _MOST_LEVELS and _depth(value) > _MOST_LEVELS:
        raise ValueError(f"nested deeper than {_MOST_LEVELS} levels")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits, the limit is {_MOST_DIGITS}")
    return int(text)


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [
            inner for each in level for inner in (each.values() if type(each) is dict else each)
        ]
    return depth


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; False, too, where it cannot be said."""
    return _has_mode(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False, too, where it cannot be said."""
    return _has_mode(path, stat.S_ISDIR)


def _has_mode(path: Path, test: Any) -> bool:
    try:
        return bool(test(os.stat(path).st_mode))
    # ValueError: a NUL byte.
    except (OSError, ValueError):
        return False


def staging_folder(output: Path) -> Path:
    """The folder beside `output` in which this process writes what becomes it."""
    return output.parent / f".{output.name}-{os.getpid()}"


def remove_leftovers(output: Path) -> None:
    """Remove the `staging_folder`s of processes that were killed before they could rename theirs to
    `output`."""
    pattern = re.compile(rf"\.{re.escape(output.name)}-(\d+)")
    try:
        names = os.listdir(output.parent)
    except OSError:
        return
    for name in names:
        match = pattern.fullmatch(name)
        if match and not is_running(int(match[1])):
            shutil.rmtree(output.parent / name, ignore_errors=True)


def is_running(process: int) -> bool:
    """True if there is a process of this number on this host, other than this one."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    # A restarted job in a container often gets the number of the previous one.
    return process != os.getpid()
