"""Compares a number over all ranks of one host, in shared memory.

    check = join(rank, size, gather, timeout)    # on all ranks; None on all: do without
    all_equal = check.start(number)              # writes eight bytes, waits for nothing
    all_equal()                                  # waits until all ranks have started

A message between two processes of one host costs two wake-ups of a thread and the way through TCP;
a word that the other process is polling costs a microsecond.

The memory is a file, in /dev/shm where there is one, that is unlinked once all ranks have mapped
it: nothing is left behind, however the processes end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

__all__ = ["SharedCheck", "host_id", "join"]

# A rank's words have 128 bytes of their own, since processors fetch cache lines in pairs; those
# before the first rank's hold the token that identifies the file.
_LINE_BYTES, _WORD_BYTES = 128, 8
_LINE = _LINE_BYTES // _WORD_BYTES
# The low bits of a word are its epoch, 1 to _EPOCHS and again; a word of the epoch before last is
# in the same slot, so the period is even. The number has the other 48 bits. That is enough: two
# calls that differ, which is a bug to be found once, go unnoticed once in 2^48.
_LOW_BITS, _EPOCHS = 0xFFFF, 0xFFFE
_NUMBER_BITS = 0xFFFF_FFFF_FFFF_0000
# Words of no epoch.
_JOINED, _CLOSED = 0x10000, 0xFFFF
# Polling back-off, in seconds: sched_yield between polls after _YIELD, sleep between them after
# _SLEEP (at most _LONGEST at a time), check the timeout every _LOOK.
_YIELD, _SLEEP, _LOOK, _LONGEST = 20e-6, 500e-6, 0.1, 1e-3


class SharedCheck:
    """The words of all ranks, two of each.

    A rank writes its word of epoch n in slot n % 2, number and epoch in one store: a reader that
    sees the epoch sees the number. It overwrites epoch n - 2, which is no longer read: this rank
    has seen every rank's word of epoch n - 1, which a rank writes once it is done with n - 2. So a
    comparison is started when the previous one has ended, and not before.

    Args:
        words: unsigned, 64 bits each and aligned, so that the processor writes a word at once.
        timeout: how long to wait for a rank; asked while waiting.
    """

    def __init__(
        self, words: memoryview, rank: int, size: int, timeout: Callable[[], timedelta]
    ) -> None:
        self._words, self._rank, self._timeout = words, rank, timeout
        self._slots = tuple([_LINE * (1 + r) + i for r in range(size)] for i in range(2))
        self._epoch = 0
        self._closed: str | None = None

    def start(self, number: int) -> Callable[[], bool]:
        """Start to compare the upper 48 of the 64 bits of a number.

        Returns a function: True if all ranks passed the same; RuntimeError if one does not come.
        """
        if self._closed is not None:
            raise RuntimeError(self._closed)
        self._epoch = self._epoch % _EPOCHS + 1
        self._words[self._slots[self._epoch % 2][self._rank]] = number & _NUMBER_BITS | self._epoch
        return partial(self._all_equal, self._epoch)

    def _all_equal(self, epoch):
        words, seen, wait = self._words, set(), None
        for slot in self._slots[epoch % 2]:
            while (word := words[slot]) & _LOW_BITS != epoch:
                if self._closed is not None:
                    raise RuntimeError(self._closed)
                wait = wait or _Wait()
                if wait.pause():
                    self._raise_if_timed_out(epoch, wait.seconds)
            seen.add(word)
        return len(seen) == 1

    def close(self, reason: str) -> None:
        """Compare nothing more, on any rank."""
        self._closed = (
            f"{reason}. All ranks of a group must make the same calls in the same order; this "
            "group can make no more."
        )
        for slots in self._slots:
            self._words[slots[self._rank]] = _CLOSED

    def _raise_if_timed_out(self, epoch, seconds):
        """Raise if the wait has timed out, or a rank has closed its words."""
        hopeless = seconds > self._timeout().total_seconds()
        reasons = []
        for rank, slot in enumerate(self._slots[epoch % 2]):
            word = self._words[slot]
            if word & _LOW_BITS == epoch:
                continue
            reason = f"has not made this call within {seconds:.1f} s"
            if word == _CLOSED:
                reason, hopeless = "has stopped waiting for another rank", True
            reasons.append(f"rank {rank} of the group {reason}")
        if reasons and hopeless:
            self.close(f"Timed out: {', '.join(reasons)}")
            raise RuntimeError(self._closed)


class _Wait:
    """Pauses that leave the processor to other processes the longer the wait takes."""

    def __init__(self):
        self._started, self.seconds, self._look = time.perf_counter(), 0.0, _LOOK

    def pause(self) -> bool:
        """True if it is time to check the timeout."""
        self.seconds = time.perf_counter() - self._started
        if self.seconds > _SLEEP:
            # This makes a wait at most 1/32 longer.
            time.sleep(min(self.seconds / 32, _LONGEST))
        elif self.seconds > _YIELD:
            os.sched_yield()
        if self.seconds < self._look:
            return False
        self._look = self.seconds + _LOOK
        return True


def join(
    rank: int,
    size: int,
    gather: Callable[[list[str]], list[Sequence[str]]],
    timeout: Callable[[], timedelta],
) -> SharedCheck | None:
    """The shared memory of `size` ranks, which all call this; None on all if one cannot have it.

    Args:
        gather: returns the texts of each rank, in order.
        timeout: how long to wait for a rank; asked while waiting.
    """
    host = host_id()
    path, token = _create(size) if rank == 0 and host else ("", "")
    try:
        gathered = gather([host, path, token])
        words = None
        if host and all(of_rank[0] == host for of_rank in gathered):
            words = _open(*gathered[0][1:3], size)
        # Copied machines may have one id. Memory is shared only if every rank sees what the others
        # wrote.
        slots = [_LINE * (1 + r) for r in range(size)]
        if words is not None:
            words[slots[rank]] = _JOINED
        gather([])
        good = words is not None and all(words[slot] == _JOINED for slot in slots)
        if not all(answer for answer, *_ in gather(["good" if good else ""])):
            return None
        return SharedCheck(words, rank, size, timeout)
    finally:
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)


def host_id() -> str:
    """Equal on all ranks of one host and different between hosts; "" if it is not known.

    Containers of one machine with host names of their own are hosts of their own: they reach each
    other over the network only.
    """
    with contextlib.suppress(OSError):
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {started}"
    return ""


def _create(size: int) -> tuple[str, str]:
    """(path, token) of a new file with the token and zeros; ("", "") if it cannot be made."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    token = secrets.token_hex(16)
    try:
        handle, path = tempfile.mkstemp(prefix="lasp-", dir=folder)
    except OSError:
        return "", ""
    try:
        with open(handle, "wb") as file:
            # Written in full: storing to a page for which there is no room would raise SIGBUS.
            file.write(token.encode().ljust(_bytes(size), b"\0"))
    except OSError:
        os.unlink(path)
        return "", ""
    return path, token


def _open(path: str, token: str, size: int) -> memoryview | None:
    """The words of the file; None if it is not there, or has another token."""
    try:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), _bytes(size))
    except (OSError, ValueError):
        return None
    if memory[: len(token)] != token.encode():
        return None
    return memoryview(memory).cast("Q")


def _bytes(size: int) -> int:
    return _LINE_BYTES * (1 + size)
