"""Names the rank that a job waits for, when one has died, was stopped or hangs.

A thread of each rank writes the rank's position to the store that the ranks meet in: the step, its
phase, and how many collective calls it has made. It does so once a second and at each phase; with
many ranks, less often. No collective is involved, and the other ranks' positions are read only once
something is wrong:

- a call raised here (gloo's after its timeout, or because a connection was lost), or
- the main thread has made no call for longer than the timeout that applies. NCCL does not raise: it
  ends the process some time after its own timeout, which is therefore longer.

To blame is a rank whose thread is silent too (it was stopped, it or its host died), one that has
ended by an exception, or else the one that has made fewer calls than this rank. Its name goes to
the store, so that all ranks end with the same reason, each with the stacks of its threads written
to a file: a rank that hangs shows where. If all ranks of a host are silent, the host is named; so
is the one that holds the store if that does not answer.

Processes whose torchrun has died end too: no other would ever end them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from lasp.exchange.consistency import checks_started
from launch.exit_codes import HUNG
from launch.hosts import Hosts

# Seconds between two reports of a rank. A rank is silent after _SILENT without one: a process that
# is alive on a starved machine writes sooner.
_INTERVAL, _SILENT = 1.0, 5.0
# Reports that the store takes in a second, of all ranks together; with more ranks than that each
# reports less often.
_REPORTS_PER_SECOND = 1000
# Seconds that a rank's own collectives have to raise, before this thread ends the process.
_GRACE = 2.0
# Seconds after which the store is taken to be gone.
_STORE_SECONDS = 20
# Seconds that NCCL's timeout is longer than ours.
NCCL_MARGIN = 30
# What the errors of gloo, of the store and of lasp's checks say if another rank does not answer.
_WAITING = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")


class Heartbeat:
    """The thread of one rank. It ends the process if another rank keeps this one waiting.

    Args:
        store, hosts: of this start of the job (`launch.rendezvous.meet`).
        seconds: the timeout, until `limit` is set.
        folder: for the stacks; they go to stderr if it cannot be written.
    """

    def __init__(
        self, store: dist.Store, rank: int, hosts: Hosts, *, seconds: float, folder: Path
    ) -> None:
        # A connection of its own: one that waits blocks all who use it.
        self._store = _PatientStore(store.clone())
        self._rank, self._hosts, self._folder = rank, hosts, folder
        self._size = size = hosts.num_ranks
        self._least = size / _REPORTS_PER_SECOND
        self._interval = max(_INTERVAL, self._least)
        self.limit = seconds
        self.step, self._phase, self._entered = 0, "set-up", 0
        self._reports = 0
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # Set where the thread should not wait for its next report.
        self._ending, self._news, self._stopped = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._report()
        self._thread.start()

    def enter(self, phase: str) -> None:
        """The main thread begins a phase; all ranks pass the same phases in the same order."""
        self._phase = phase
        self._entered += 1
        self._news.set()

    def stop(self, problem: str | None = None) -> None:
        """This rank has ended, by a `problem` if there is one."""
        self._stopped = True
        self._news.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._report(ended=problem or "")
        self._store.close()

    def explain(self, error: BaseException) -> None:
        """End the process, with code HUNG, if the error is another rank's doing; else return."""
        if not isinstance(error, RuntimeError):
            return
        text = f"{type(error).__name__}: {error}"
        waits = any(word in text.lower() for word in _WAITING)
        is_lost = isinstance(error, dist.DistStoreError | dist.DistNetworkError)
        try:
            reason = self._verdict()
            if reason is None:
                reason = self._find_cause(needs_silence=not waits, ended_too=True)
            if reason is not None:
                self._end(reason, text)
        except RuntimeError:
            is_lost = True
        if waits and is_lost:
            self._end(self._lost_store(), text)

    def _run(self) -> None:
        position, since = self._position(), time.monotonic()
        while True:
            if self._news.wait(self._interval) and not self._stopped:
                # Phases may be shorter than the time between two reports.
                time.sleep(self._least)
            self._news.clear()
            if self._stopped:
                return
            if self._parent is not None and os.getppid() != self._parent:
                self._end("torchrun, which started this process, has died")
            if (current := self._position()) != position:
                position, since = current, time.monotonic()
            try:
                self._report()
                reason = self._verdict()
                if reason is None and time.monotonic() - since > self.limit + _GRACE:
                    reason = self._find_cause()
            except RuntimeError:
                # Without a store no rank can be named.
                if time.monotonic() - since <= self.limit + _GRACE:
                    continue
                reason = self._lost_store()
            if reason is not None:
                self._end(reason)

    def _position(self) -> tuple[int, int]:
        """Phases entered and collective calls made: equal on all ranks at the same point."""
        calls = checks_started()
        with contextlib.suppress(RuntimeError):
            # A group that the main thread is making may not be ready.
            groups = list(dist.distributed_c10d._world.pg_map)
            calls += sum(group._get_sequence_number_for_group() for group in groups)
        return self._entered, calls

    def _report(self, ended: str | None = None) -> None:
        self._reports += 1
        report = {
            "number": self._reports,
            "position": self._position(),
            "where": self._where(),
            "ended": ended,
        }
        self._store.set(f"heartbeat/{self._rank}", json.dumps(report))

    def _where(self) -> str:
        # During set-up there is no step.
        return f"step {self.step}, {self._phase}" if self.step else self._phase

    def _verdict(self) -> str | None:
        """What another rank has found."""
        if not self._store.check(["verdict of the ranks"]):
            return None
        return self._store.get("verdict of the ranks").decode()

    def _read(self) -> list[dict[str, Any] | None]:
        """The newest report of each rank; None before its first one."""
        keys = [f"heartbeat/{rank}" for rank in range(self._size)]
        # One request, once all ranks have reported.
        present = [True] * len(keys)
        if not self._store.check(keys):
            present = [self._store.check([key]) for key in keys]
        reports = iter(self._store.multi_get([k for k, p in zip(keys, present, strict=True) if p]))
        return [json.loads(next(reports)) if p else None for p in present]

    def _find_cause(self, needs_silence: bool = False, ended_too: bool = False) -> str | None:
        """A sentence that names the rank to blame; None if there is none.

        Args:
            needs_silence: blame no rank that is alive.
            ended_too: blame a rank that has ended, even without a problem.
        """
        before, deadline = self._read(), time.monotonic() + max(_SILENT, 3 * self._interval)
        silent = set(range(self._size)) - {self._rank}
        failed: list[int] = []
        while silent and not failed and time.monotonic() < deadline:
            time.sleep(self._interval / 2)
            if threading.current_thread() is self._thread:
                self._report()
            reports = self._read()
            silent = {rank for rank in silent if reports[rank] in (None, before[rank])}
            failed = [rank for rank, report in enumerate(reports) if report and report["ended"]]
        reports = self._read()
        if failed:
            report = reports[failed[0]]
            who = self._hosts.rank(failed[0])
            return f"{who} failed in {report['where']} ({report['ended']})"
        for rank in sorted(silent):
            report, who = reports[rank], self._hosts.rank(rank)
            if report is None or report["ended"] is None:
                return self._name_silent(sorted(silent), rank, report)
            if ended_too:
                return f"{who} has ended its part of the job"
        running = [
            (tuple(report["position"]), rank, report["where"])
            for rank, report in enumerate(reports)
            if report is not None and report["ended"] is None
        ]
        position, rank, where = min(running, default=(self._position(), self._rank, ""))
        if needs_silence or position >= self._position():
            return None
        who = self._hosts.rank(rank)
        return f"{who} hangs in {where}: others wait for a call that it has not made"

    def _name_silent(self, silent: Sequence[int], rank: int, report: dict[str, Any] | None) -> str:
        """A sentence on the first of the silent ranks, or on its host if all ranks there are."""
        number = self._hosts.number_of(rank)
        of_host = self._hosts.ranks_of(number)
        others = len(silent) - 1
        is_host = self._hosts.are_several and set(of_host) <= set(silent)
        if is_host:
            others = len(silent) - len(of_host)
        who = self._hosts.host(number) if is_host else self._hosts.rank(rank)
        if others:
            who += f" (and {others} other rank{'s' if others > 1 else ''})"
        if is_host:
            who += " is down or cannot be reached"
            if report is None:
                return f"{who}: no rank there started"
            return f"{who}: rank {rank} was last seen in {report['where']}"
        if report is None:
            return f"{who} did not start"
        return f"{who} is stopped or dead: it was last seen in {report['where']}"

    def _lost_store(self) -> str:
        """A sentence on the store, which does not answer."""
        if not self._hosts.are_several:
            return "the store of the job does not answer: the process that holds it died"
        holder = os.environ.get("MASTER_ADDR", "")
        for number, host in enumerate(self._hosts.hosts):
            if holder in (host.name, host.address):
                holder = self._hosts.host(number)
        return (
            f"the store of the job, on {holder}, does not answer: that host is down or cannot be "
            "reached, or its torchrun has died"
        )

    def _end(self, reason: str, error: str | None = None) -> NoReturn:
        """Print why and end the process; torchrun, or the heartbeat, ends the other ranks."""
        if not self._ending.acquire(blocking=False):
            # The other thread of this process is doing it.
            threading.Event().wait()
        with contextlib.suppress(RuntimeError):
            if not self._store.check(["verdict of the ranks"]):
                self._store.set("verdict of the ranks", reason)
        stacks = self._write_stacks()
        here = f"{self._hosts.rank(self._rank)} waited in {self._where()}"
        text = f"error: {reason}. {here} (timeout {self.limit:g} s); stacks: {stacks}."
        if error is not None:
            text += f" What ended the wait: {error}"
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(HUNG)

    def _write_stacks(self) -> str:
        """The stacks of all threads to a file; its name."""
        path = self._folder / "stacks" / f"rank-{self._rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                print(f"rank {self._rank}, {self._where()}, {time.ctime()}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            return "above"
        return str(path)


class _PatientStore:
    """A store of which no call waits for longer than _STORE_SECONDS: then it raises.

    The store's own timeout applies to few calls, and after a host was cut off none of them returns.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # When the call that has not returned began.
        self._since: float | None = None
        threading.Thread(target=self._serve, name="heartbeat's store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        self._call("set", key, value)

    def get(self, key: str) -> bytes:
        return self._call("get", key)

    def check(self, keys: list[str]) -> bool:
        return self._call("check", keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._call("multi_get", keys)

    def close(self) -> None:
        """No call follows."""
        self._requests.put(None)

    def _call(self, name: str, *args: Any) -> Any:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        began = self._since or time.monotonic()
        self._requests.put((name, args, answer))
        try:
            result, error = answer.get(timeout=max(0.1, began + _STORE_SECONDS - time.monotonic()))
        except queue.Empty:
            raise dist.DistStoreError(f"no answer within {_STORE_SECONDS} s") from None
        if error is not None:
            raise error
        return result

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            name, args, answer = request
            self._since = time.monotonic()
            try:
                answer.put((getattr(self._store, name)(*args), None))
            except BaseException as error:
                answer.put((None, error))
            self._since = None
