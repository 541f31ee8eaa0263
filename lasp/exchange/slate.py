"""Is a number equal on all ranks of one host? Asked in memory that they share.

    slate = join(rank, size, gather, timeout)    # of all ranks; None on all of them: do without
    question = slate.ask(number)                 # writes eight bytes, waits for nothing
    question.all_equal()                         # waits until all ranks have asked

A message between two processes of one host costs two wake-ups of a thread and the way through TCP;
a word that the other one is already polling costs a microsecond.

The slate is a file, in memory where there is such a folder, that has no name any more once all
ranks have mapped it: nothing is left behind, however the processes end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

__all__ = ["Question", "Slate", "host", "join"]

# A rank's words have 128 bytes of their own, since processors fetch cache lines in pairs; those
# before the first rank's hold the token by which the file is known.
_LINE_BYTES, _WORD_BYTES = 128, 8
_LINE = _LINE_BYTES // _WORD_BYTES
# The low bits of a word are its turn, 1 to _TURNS and again; a word of the turn before last is in
# the same place, so the period is even. The number has the other 48 bits, which is enough: nobody
# seeks a collision, so a pair of calls that differ, which is a bug to be found once, goes unnoticed
# once in 2^48.
_LOW_BITS, _TURNS = 0xFFFF, 0xFFFE
_NUMBER_BITS = 0xFFFF_FFFF_FFFF_0000
# Words of no turn.
_ARRIVED, _GAVE_UP = 0x10000, 0xFFFF
# Seconds of waiting after which a rank lets others run between two looks at the words, and sleeps
# between them; seconds between two looks at what keeps the others; the longest sleep.
_YIELD, _SLEEP, _LOOK, _LONGEST = 20e-6, 500e-6, 0.1, 1e-3


class Slate:
    """The words of all ranks, two of each.

    A rank writes its word of turn n in the place n % 2, number and turn in one store: whoever sees
    the turn sees the number. It overwrites turn n - 2, which nobody reads any more: it has seen
    everybody's word of turn n - 1, and who writes that is done with n - 2. So a question is asked
    when the last one is answered, and not before.

    Args:
        words: unsigned, 64 bits each and aligned, so that the processor writes a word at once.
        timeout: how long to wait for a rank.
        lives: (pid, what `_life` says of it) of the ranks that can be watched from here.
    """

    def __init__(
        self,
        words: memoryview,
        rank: int,
        size: int,
        timeout: Callable[[], timedelta],
        lives: dict[int, tuple[int, str]],
    ) -> None:
        self._words, self._rank, self._timeout, self._lives = words, rank, timeout, lives
        self._places = tuple([_LINE * (1 + r) + i for r in range(size)] for i in range(2))
        self._turn = 0
        self._broken: str | None = None

    def ask(self, number: int) -> Question:
        """Begin to compare the upper 48 of the 64 bits of a number."""
        if self._broken is not None:
            raise RuntimeError(self._broken)
        self._turn = self._turn % _TURNS + 1
        place = self._places[self._turn % 2][self._rank]
        self._words[place] = number & _NUMBER_BITS | self._turn
        return Question(self, self._turn)

    def answer(self, turn: int) -> bool:
        """Whether all ranks wrote the same in this turn; RuntimeError if one does not come."""
        words, patience, seen = self._words, None, set()
        for place in self._places[turn % 2]:
            while (word := words[place]) & _LOW_BITS != turn:
                if self._broken is not None:
                    raise RuntimeError(self._broken)
                if patience is None:
                    patience = _Patience()
                if patience.pause():
                    self._look(turn, patience.waited)
            seen.add(word)
        return len(seen) == 1

    def _look(self, turn, waited):
        """Raise if there is nothing to wait for, or no more time."""
        hopeless = waited > self._timeout().total_seconds()
        reasons, somebody_ended = [], False
        for rank, place in enumerate(self._places[turn % 2]):
            # The life before the word: a rank may write and then end.
            pid, life = self._lives.get(rank, (0, None))
            ended = life is not None and _life(pid) not in (life, None)
            word = self._words[place]
            if word & _LOW_BITS == turn:
                continue
            reason = f"has not made this call within {waited:.1f} s"
            if word == _GAVE_UP:
                reason, hopeless = "has given up waiting for another", True
            elif ended:
                reason, hopeless = "has ended before it made this call", True
                somebody_ended = True
            reasons.append(f"rank {rank} of the group {reason}")
        if not reasons or not hopeless:
            return
        self.give_up(f"{'' if somebody_ended else 'Timed out: '}{', '.join(reasons)}")
        raise RuntimeError(self._broken)

    def give_up(self, reason: str) -> None:
        """Ask and answer no more, on any rank: what a closed connection tells."""
        self._broken = (
            f"{reason}. All ranks of a group must make the same calls in the same order; this "
            "group can make no more."
        )
        for places in self._places:
            self._words[places[self._rank]] = _GAVE_UP


class Question:
    """A number that this rank has written, and the others may have."""

    def __init__(self, slate: Slate, turn: int) -> None:
        self._slate, self._turn = slate, turn

    def all_equal(self) -> bool:
        return self._slate.answer(self._turn)


class _Patience:
    """Pauses that leave the processor to others the longer the longer one waits."""

    def __init__(self):
        self._began, self.waited, self._look = time.perf_counter(), 0.0, _LOOK

    def pause(self) -> bool:
        """Whether it is time to look what keeps the others."""
        self.waited = time.perf_counter() - self._began
        if self.waited > _SLEEP:
            # A wait becomes a thirty-second longer by it.
            time.sleep(min(self.waited / 32, _LONGEST))
        elif self.waited > _YIELD:
            os.sched_yield()
        if self.waited < self._look:
            return False
        self._look = self.waited + _LOOK
        return True


def join(
    rank: int,
    size: int,
    gather: Callable[[list[str]], list[Sequence[str]]],
    timeout: Callable[[], timedelta],
) -> Slate | None:
    """A slate of `size` ranks, each of which calls this; None on all of them if one cannot have it.

    Args:
        gather: the texts of each rank, in order.
        timeout: how long to wait for a rank; asked while waiting.
    """
    here, pid = host(), os.getpid()
    path, token = _create(size) if rank == 0 and here else ("", "")
    try:
        told = gather([here, path, token, str(pid), _life(pid) or ""])
        words = None
        if here and all(of_rank[0] == here for of_rank in told):
            words = _open(*told[0][1:3], size)
        # Machines copied from one another may pass for one. Only memory that shows to everybody
        # what everybody wrote is shared.
        places = [_LINE * (1 + r) for r in range(size)]
        if words is not None:
            words[places[rank]] = _ARRIVED
        gather([])
        good = words is not None and all(words[place] == _ARRIVED for place in places)
        # Who is not seen as it sees itself, as from another pid namespace, is not watched.
        lives = {r: (int(of_rank[3]), of_rank[4]) for r, of_rank in enumerate(told)}
        lives = {r: seen for r, seen in lives.items() if seen[1] and _life(seen[0]) == seen[1]}
        if not all(answer for answer, *_ in gather(["good" if good else ""])):
            return None
        return Slate(words, rank, size, timeout, lives)
    finally:
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)


def host() -> str:
    """The same on all ranks of one host, of different hosts never; "" if that is not known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _life(pid: int) -> str | None:
    """What a running process has and no other ever; "" if it is not there, None if nobody knows."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        # Such as too many open files: no reason to give anybody up.
        return None
    # After the name, which is in brackets and may hold any: the state; in 19th place, the start.
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else f"{namespace} {rest[18]}"


def _create(size: int) -> tuple[str, str]:
    """(path, token) of a new file of zeros and the token; ("", "") if there can be none."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    token = secrets.token_hex(16)
    try:
        handle, path = tempfile.mkstemp(prefix="lasp-", dir=folder)
    except OSError:
        return "", ""
    try:
        with open(handle, "wb") as file:
            # All of it is written: storing to a page for which there is no room would be SIGBUS.
            file.write(token.encode().ljust(_bytes(size), b"\0"))
    except OSError:
        os.unlink(path)
        return "", ""
    return path, token


def _open(path: str, token: str, size: int) -> memoryview | None:
    """The words of the file, if it is there and is the one that is meant."""
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
