"""Files that are hashed while they are written and while they are read, by several threads.

The manifest has a sha256 for each part of a file: [[bytes, sha256], ...] in order, which together
make up the file. A part has at most 16 MiB and ends where a tensor ends, so threads hash parts of
one file at the same time, and reading a tensor checks all of its bytes without reading others.
"""

import hashlib
import itertools
import os
import stat
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.exit_codes import CheckpointError

Parts = list[tuple[int, str]]

PART_BYTES = 16 << 20
# Read and hashed at a time: it is still in the processor's cache when it is hashed.
_BLOCK_BYTES = 1 << 20
# Bytes written to a file between two requests to put them on the disk.
_FLUSH_BYTES = 256 << 20
_MAX_THREADS = 16


class DamagedError(CheckpointError):
    """A checkpoint that cannot be read or is not what was written: an older one may do."""


def thread_count() -> int:
    """Threads of this process for files: its share of the processors, at least 2, so that one can
    hash while another waits for the disk."""
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = len(os.sched_getaffinity(0)) // max(1, int(local_ranks))
    return min(max(share, 2), _MAX_THREADS)


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what it has not begun if the block raises, and waits for what it has."""
    pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="checkpoint")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def split(lengths: Sequence[int]) -> list[int]:
    """The sizes of the parts of a file of consecutive sections of these lengths."""
    sizes = []
    for length in lengths:
        whole, rest = divmod(length, PART_BYTES)
        sizes += [PART_BYTES] * whole + [rest] * bool(rest)
    return sizes


def write_files(contents: Mapping[Path, Sequence[Tensor]]) -> list[dict[str, Any]]:
    """Write files and sync them to the disk; return their manifest entries.

    Args:
        contents: of each file, its consecutive sections as flat uint8 tensors on any device.

    Raises:
        OSError: the disk failed.
    """
    entries, buffers = [], threading.local()
    # The pool ends first, so no thread is left that writes to a closed file.
    with ExitStack() as files, thread_pool() as pool, ThreadPoolExecutor(1) as flusher:
        written: list[tuple[int, Path, list[Future[tuple[int, str]]]]] = []
        for path, sections in contents.items():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            files.callback(os.close, descriptor)
            parts, offset = [], 0
            for section in sections:
                for part in section.split(PART_BYTES):
                    parts.append(pool.submit(_write_part, descriptor, offset, part, buffers))
                    offset += part.numel()
            written.append((descriptor, path, parts))
        for descriptor, path, parts in written:
            done, unflushed, flushes = [], 0, []
            for part in parts:
                done.append(part.result())
                unflushed += done[-1][0]
                if unflushed >= _FLUSH_BYTES:
                    # The disk works while the rest is hashed.
                    flushes.append(flusher.submit(os.fdatasync, descriptor))
                    unflushed = 0
            for flush in flushes:
                flush.result()
            os.fsync(descriptor)
            entries.append(_entry(path, done))
    return entries


def _write_part(
    descriptor: int, offset: int, part: Tensor, buffers: threading.local
) -> tuple[int, str]:
    if part.is_cuda:
        if not hasattr(buffers, "pinned"):
            buffers.pinned = torch.empty(PART_BYTES, dtype=torch.uint8, pin_memory=True)
        part = buffers.pinned[: part.numel()].copy_(part)
    data = memoryview(part.numpy())
    digest = hashlib.sha256(data).hexdigest()
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
    return len(data), digest


def _entry(path: Path, parts: Sequence[tuple[int, str]]) -> dict[str, Any]:
    size = sum(length for length, _ in parts)
    return {"name": path.name, "size": size, "parts": [list(part) for part in parts]}


class PartedFile:
    """A file that is hashed while it is read.

    Args:
        path: of a regular file; it stays open as long as this object lives.
        parts: what the manifest has of it; None: nothing is checked.

    Raises:
        DamagedError: it is missing, cannot be read, is no regular file, or has another size.
    """

    def __init__(self, path: Path, parts: Parts | None) -> None:
        self.path = path
        self._file = -1
        with self._readable():
            # Without O_NONBLOCK, opening a FIFO would wait for a writer.
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is not a regular file.")
        self.size = status.st_size
        lengths = split([self.size]) if parts is None else [length for length, _ in parts]
        self._ends = [0, *itertools.accumulate(lengths)]
        self._digests = None if parts is None else [digest for _, digest in parts]
        if self._ends[-1] != self.size:
            raise DamagedError(
                f"{path} has {self.size} bytes, the manifest has {self._ends[-1]}: truncated."
            )

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`. Raises DamagedError."""
        data = bytearray(end - begin)
        for read in self.reads(begin, memoryview(data)):
            read()
        return bytes(data)

    def checks(self) -> list[Callable[[], None]]:
        """Functions that check a part of the file each. They raise DamagedError."""
        nothing = memoryview(bytearray())
        return [lambda part=part: self._read_part(part, 0, nothing) for part in self._parts()]

    def reads(self, begin: int, out: memoryview) -> list[Callable[[], None]]:
        """Functions that together fill `out` with the bytes from `begin` on, and check every part
        that they touch. They raise DamagedError."""
        end = begin + len(out)
        if end > self.size:
            raise DamagedError(f"{self.path} ends at byte {self.size}, not {end}: truncated.")
        touched = [part for part in self._parts(begin) if self._ends[part] < end]
        return [lambda part=part: self._read_part(part, begin, out) for part in touched]

    def _parts(self, begin: int = 0) -> range:
        """Numbers of the parts from that with byte `begin` on."""
        return range(bisect_right(self._ends, begin) - 1, len(self._ends) - 1)

    def _read_part(self, part: int, begin: int, out: memoryview) -> None:
        start, stop = self._ends[part], self._ends[part + 1]
        first = min(max(start, begin), stop)
        last = max(first, min(stop, begin + len(out)))
        if self._digests is None:
            self._fill(first, out[first - begin : last - begin])
            return
        digest = hashlib.sha256()
        scratch = memoryview(bytearray(min(_BLOCK_BYTES, stop - start - (last - first))))
        for low, high, target in ((start, first, None), (first, last, out), (last, stop, None)):
            for at in range(low, high, _BLOCK_BYTES):
                size = min(_BLOCK_BYTES, high - at)
                if target is None:
                    block = scratch[:size]
                else:
                    block = target[at - begin : at - begin + size]
                self._fill(at, block)
                digest.update(block)
        if digest.hexdigest() != self._digests[part]:
            raise DamagedError(f"{self.path} does not match its hash: its content has changed.")

    def _fill(self, offset: int, block: memoryview) -> None:
        done = 0
        while done < len(block):
            with self._readable():
                count = os.preadv(self._file, [block[done:]], offset + done)
            if not count:
                raise DamagedError(f"{self.path} ends at byte {offset + done}: truncated.")
            done += count

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DamagedError(f"{self.path} is missing.") from None
        except (OSError, ValueError) as error:
            # ValueError: a name with a NUL.
            reason = getattr(error, "strerror", None) or error
            raise DamagedError(f"{self.path} cannot be read: {reason}.") from None


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(path: Path, lengths: Sequence[int]) -> dict[str, Any]:
    """Sync a file that is there already; return its manifest entry.

    Args:
        lengths: of its consecutive sections.
    """
    sync(path)
    sizes = split(lengths)
    parts = []
    with path.open("rb") as file:
        for size in sizes:
            parts.append((size, hashlib.sha256(file.read(size)).hexdigest()))
    return _entry(path, parts)
