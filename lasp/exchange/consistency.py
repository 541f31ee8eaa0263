"""Checks that all ranks make the same call, before any state is sent.

Point-to-point messages carry no type: a sender and a receiver that disagree on shape, dtype or
order get silent garbage, or hang. So the ranks compare a fingerprint of every call, and if they
differ all ranks raise a ValueError that says what differs:

    check = PendingCheck(group, call)    # sends eight bytes, waits for nothing
    ...                                  # launch work that needs no other rank
    check.wait()                         # raises on all ranks, or on none

The checks of a group are numbered. A backward passes the number of its forward's check: ranks that
run the backwards of two calls in different orders disagree on it. Two forwards that are equal in
all that is compared cannot be told apart: which tensors a rank passes is its own affair.

A fingerprint is computed once per kind of call. It goes from host to host, whatever backend the
group has: no GPU waits, and the work launched in between hides the latency. What may differ between
ranks (the local length) is no part of it.

The ranks of a group on one host write it into shared memory (`lasp.exchange.shared_memory`).
Others send it over gloo connections, which exist in any case: over them the ranks set up the shared
memory, and tell each other what differs. So hosts must reach each other by name, or by the
interface that GLOO_SOCKET_IFNAME names.
"""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from functools import lru_cache, partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from lasp import replay
from lasp.exchange import shared_memory
from lasp.exchange.comm import device_types

__all__ = [
    "CallSignature",
    "PendingCheck",
    "checks_started",
    "gather_numbers",
    "record_exchange",
    "start_backward_check",
    "timeout_of",
]

# Mismatch reports have a fixed size: _TEXTS strings of _TEXT_BYTES bytes.
_TEXTS, _TEXT_BYTES = 13, 256
# Above this many ranks, rounds of messages cost less than an all-gather, and ranks connect only to
# those that they send to.
_FEW_RANKS = 16
# Spread small numbers over all bits, exchanges and forwards in different ways.
_ODD, _OTHER_ODD = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
# Exchanges so far per group: a rank that raised midway is detected at its next call.
_exchanges: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()
# Checks that this process has started, of all groups and per group.
_checks_started = 0
_checks: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()
# Per group: the connections, the group's own backend, and the shared memory if it is on one host.
_connections: WeakKeyDictionary[
    ProcessGroup, tuple[dist.ProcessGroupGloo, dist.Backend, shared_memory.SharedCheck | None]
]
_connections = WeakKeyDictionary()
# The newest check of each group.
_newest: WeakKeyDictionary[ProcessGroup, PendingCheck] = WeakKeyDictionary()


class CallSignature(dict):
    """What must be equal on all ranks, by name, for a call that is repeated: its fingerprint is
    computed once. Not to be changed afterwards."""

    def __init__(self, parts: dict[str, object]) -> None:
        super().__init__(parts)
        self.fingerprint = _fingerprint(None, *self.items())


def gather_numbers(group: ProcessGroup, number: int) -> tuple[int, ...]:
    """The number that each rank passes, in group order, from host to host: no GPU waits."""
    connections, _ = _connections_of(group)
    gathered, work = _all_gather(torch.tensor([number], dtype=torch.int64), connections)
    work.wait()
    return tuple(gathered.tolist())


def record_exchange(group: ProcessGroup) -> None:
    """Count an exchange of this rank; the next call compares the counts.

    A rank that raises midway, while the others go on, would otherwise stay one exchange behind and
    take one state for the next.
    """
    _exchanges[group] = _exchanges.get(group, 0) + 1


def checks_started() -> int:
    """Checks that this process has started, over all groups: equal on ranks that are in step."""
    return _checks_started


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long a rank waits for the others, by the group's backend."""
    connections, _ = _connections_of(group)
    return connections.options._timeout


class PendingCheck:
    """A started comparison of a call over the ranks of a group; all of them make one.

    If `wait` is never called, for example after an exception, the group's next check waits for it:
    the other ranks may be about to explain a difference.

    Args:
        call: what must be equal on all ranks, by name; the values are hashable and are compared by
            their repr. A `CallSignature` if the call is repeated.
        problem: an error in this rank's own input, if there is one: then all ranks raise.
        forward: for a backward, the number of the forward's check.

    Attributes:
        number: of this check in its group, from 1; equal on all ranks that are in step.
    """

    def __init__(
        self,
        group: ProcessGroup,
        call: dict[str, object],
        problem: str | None = None,
        *,
        forward: int | None = None,
    ) -> None:
        previous = _newest.get(group)
        if previous is not None:
            try:
                previous._finish()
            except ValueError as error:
                raise ValueError(
                    f"the previous call, which this rank did not finish, failed: {error}"
                ) from None
        global _checks_started
        _checks_started += 1
        self.number = _checks[group] = _checks.get(group, 0) + 1
        self._forward = forward
        self._finished = False
        self._connections, self._shared = _connections_of(group)
        self.call, self._problem = call, problem
        if problem is None and isinstance(call, CallSignature):
            fingerprint = call.fingerprint
        else:
            fingerprint = _fingerprint(problem, *call.items())
        self._exchanges = _exchanges.get(group, 0)
        fingerprint += self._exchanges * _ODD
        if forward is not None:
            fingerprint += forward * _OTHER_ODD
        fingerprint = _signed(fingerprint)
        if self._shared is not None:
            self._all_equal = self._shared.start(fingerprint)
        else:
            few = self._connections.size() <= _FEW_RANKS
            comparison = _AllGatherComparison if few else _RoundsComparison
            self._all_equal = comparison(fingerprint, self._connections).all_equal
        _newest[group] = self

    def as_tensor(self) -> torch.Tensor:
        """`number` [1], int64 on the host: in a type that an operator of torch returns."""
        return torch.tensor([self.number], dtype=torch.int64, device="cpu")

    def wait(self) -> None:
        """Raise ValueError on every rank unless all passed the same call and none has a problem."""
        self._finish()
        if self._problem is not None:
            raise ValueError(self._problem)

    def _finish(self):
        if self._finished:
            return
        equal = self._all_equal()
        # Not earlier: after an exception in there the comparison is still pending.
        self._finished = True
        if not equal:
            self._explain()

    def _explain(self):
        call = {
            **self.call,
            "which forward the backward belongs to": self._forward,
            "exchanges so far": self._exchanges,
        }
        texts = [self._problem or "", *(_shorten(value) for value in call.values())]
        try:
            gathered = _gather_texts(texts, self._connections)
        except RuntimeError as error:
            # A late rank would confuse the next call with this one.
            if self._shared is not None:
                self._shared.close("the ranks of the group disagreed, and not all said on what")
            if self._problem is not None:
                raise ValueError(self._problem) from error
            raise
        if self._problem is not None:
            raise ValueError(self._problem)
        bad = [rank for rank, of_rank in enumerate(gathered) if of_rank[0]]
        if bad:
            raise ValueError(f"rank {bad[0]} of the group refused its input: {gathered[bad[0]][0]}")
        for i, name in enumerate(call, start=1):
            seen = {rank: of_rank[i] for rank, of_rank in enumerate(gathered)}
            if len(set(seen.values())) > 1:
                listed = ", ".join(f"rank {rank}: {value}" for rank, value in seen.items())
                raise ValueError(
                    f"the ranks of the group disagree on {name} ({listed}). All ranks that share "
                    "a sequence must pass the same."
                )
        raise AssertionError("fingerprints differ, but not what they are made of")


def start_backward_check(
    group: ProcessGroup, operation: str, forward: torch.Tensor | None
) -> PendingCheck:
    """Start to check that all ranks run the backward of the same call.

    The check of the forward has compared all else that the backward's exchange depends on.

    Args:
        forward: the forward's check, `as_tensor`.
    """
    assert forward is not None
    return PendingCheck(group, _backward_signature(operation), forward=int(forward))


@lru_cache(maxsize=8)
def _backward_signature(operation):
    return CallSignature({"operation": f"backward of {operation}"})


def _shorten(value) -> str:
    """The value for a message; a long one ends in a digest that tells it from others."""
    text = repr(value)
    if len(text) <= 100:
        return text
    return f"{text[:80]}... (digest {hashlib.sha256(text.encode()).hexdigest()[:8]})"


class _AllGatherComparison:
    """Whether a number is equal on all ranks, by one all-gather."""

    def __init__(self, number, connections):
        self._gathered, self._work = _all_gather(torch.tensor([number]), connections)

    def all_equal(self) -> bool:
        self._work.wait()
        return len(set(self._gathered.tolist())) == 1


class _RoundsComparison:
    """The same for many ranks, in log2 P rounds of messages.

    In round i, rank r sends rank (r + 2^i) mod P the maximum and minimum over the 2^i ranks that
    end at r. Only the first round is started at once.
    """

    def __init__(self, number, connections):
        self._connections, self._distance = connections, 1
        # The greatest of ~x is ~ the least of x.
        self._greatest = torch.tensor([number, ~number])
        self._start_round()

    def all_equal(self) -> bool:
        while self._distance < self._connections.size():
            for work in self._works:
                work.wait()
            self._greatest = torch.maximum(self._greatest, self._received)
            self._distance *= 2
            self._start_round()
        greatest, complement = self._greatest.tolist()
        return greatest == ~complement

    def _start_round(self):
        rank, size = self._connections.rank(), self._connections.size()
        if self._distance >= size:
            return
        self._received = torch.empty_like(self._greatest)
        self._works = (
            self._connections.send([self._greatest], (rank + self._distance) % size, 0),
            self._connections.recv([self._received], (rank - self._distance) % size, 0),
        )


def _signed(number):
    return (number + 2**63) % 2**64 - 2**63


@lru_cache(maxsize=1024)
def _fingerprint(*parts) -> int:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _connections_of(group):
    """(connections, shared memory or None) of the group, made by all ranks at its first check."""
    connections, backend, shared = _connections.get(group, (None, None, None))
    if connections is None:
        # Not `new_group`: all ranks of the job would have to call that, but only the ranks of
        # `group` are here. (Its use_local_synchronization names groups by how many a rank knows,
        # and ranks may know different numbers.)
        store = dist.PrefixStore(
            "lasp.consistency", distributed_c10d._get_process_group_store(group)
        )
        # Of "cpu" and "cuda" the latter, on all ranks: a set has no order of its own.
        backend = group._get_backend(torch.device(max(device_types(group))))
        connections = connect(store, group.rank(), group.size(), _timeout_of(backend))
        shared = None
        if _may_share_memory(connections):
            gather = partial(_gather_texts, connections=connections)
            shared = shared_memory.join(
                group.rank(), group.size(), gather, partial(_timeout_of, backend)
            )
        _connections[group] = connections, backend, shared
    # A launcher may change it after the first step.
    timeout = _timeout_of(backend)
    if connections.options._timeout != timeout:
        connections._set_default_timeout(timeout)
        replay.forget(group)  # Its launches hold the timeout.
    return connections, shared


def connect(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    """Gloo connections between the hosts of `size` ranks, which all call this.

    A rank of few connects to all others at once: it makes O(P) requests to the store and O(P)
    connections. One of many connects to another at their first message; rounds of messages need
    2 log2 P of each.

    Raises:
        RuntimeError: a rank does not come within the timeout.
    """
    if size <= _FEW_RANKS:
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    # Gloo tries five times, each until the timeout, to reach a rank that has given up. So none
    # begins before all are there.
    if store.add("ranks here", 1) == size:
        store.set("all ranks here", "")
    store.wait(["all ranks here"], timeout)
    gloo, options = dist.ProcessGroupGloo, dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = [gloo.create_device(interface=name, lazy_init=True) for name in names]
    options._devices = devices or [gloo.create_default_device(lazy_init=True)]
    return gloo(store, rank, size, options)


def _may_share_memory(connections) -> bool:
    """False on all ranks of a large group that spans hosts: then nothing is gathered."""
    if connections.size() <= _FEW_RANKS:
        return True
    return _RoundsComparison(_fingerprint(shared_memory.host_id()), connections).all_equal()


def _timeout_of(backend):
    return getattr(backend.options, "_timeout", dist.default_pg_timeout)


def _all_gather(message, connections):
    gathered = message.new_empty(connections.size() * message.numel())
    return gathered, connections._allgather_base(gathered, message)


def _gather_texts(texts, connections):
    """Each rank's texts, in messages of a fixed size; longer texts are truncated."""
    assert len(texts) <= _TEXTS, len(texts)
    texts = texts + [""] * (_TEXTS - len(texts))
    rows = [text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0") for text in texts]
    sent = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    received, work = _all_gather(sent, connections)
    work.wait()
    table = received.numpy().reshape(-1, _TEXTS, _TEXT_BYTES)
    return [
        [bytes(row).rstrip(b"\0").decode(errors="replace") for row in of_rank] for of_rank in table
    ]
