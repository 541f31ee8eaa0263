"""Do the ranks mean the same thing? Asked before a state travels.

Point-to-point messages carry no type: a sender and a receiver that disagree on shape, dtype or
order get silent garbage, or hang. So the ranks compare a fingerprint of every call, and if these
differ all of them raise a ValueError that says what differs:

    comparison = compare(group, call)    # sends eight bytes, waits for nothing
    ...                                  # launch work that needs no other rank
    comparison.confirm()                 # raises on all ranks, or on none

A fingerprint is computed once per kind of call. It goes from process to process past the GPUs,
whatever the group sends with: no GPU waits, and the work launched in between hides the way. What
may differ between ranks (the local length) is no part of it.

The ranks of a group on one host write it into memory that they share (`lasp.exchange.slate`).
Others send it over connections of their own, which are there in any case: over them the ranks agree
on the memory, and tell each other what differs. They are gloo's, so hosts must reach each other by
name, or by the interface that GLOO_SOCKET_IFNAME names.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from functools import lru_cache, partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from lasp.exchange import slate
from lasp.exchange.peers import device_types

__all__ = ["Call", "Comparison", "compare", "count_exchange", "gather_numbers", "timeout_of"]

# A comparison of texts has one size, whatever is wrong: so many texts of so many bytes.
_TEXTS, _TEXT_BYTES = 11, 256
# From so many ranks on, rounds of messages cost less than one from everybody to everybody.
_FEW_RANKS = 16
# Spreads a small number over all bits.
_ODD = 0x9E3779B97F4A7C15
# In how many exchanges of a group this rank has had its part.
_exchanges: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()
# The connections over which a group compares, its own backend, and what is shared if it is on one
# host; gone with the group.
_hosts: WeakKeyDictionary[
    ProcessGroup, tuple[dist.ProcessGroupGloo, dist.Backend, slate.Slate | None]
]
_hosts = WeakKeyDictionary()
# The newest comparison of each group.
_newest: WeakKeyDictionary[ProcessGroup, Comparison] = WeakKeyDictionary()


class Call(dict):
    """What must be equal on all ranks, by name, for a call that comes again: its fingerprint is
    taken once. Not to be changed afterwards."""

    def __init__(self, parts: dict[str, object]) -> None:
        super().__init__(parts)
        self.fingerprint = _fingerprint(None, *self.items())


def compare(
    group: ProcessGroup, call: dict[str, object], *, problem: str | None = None
) -> Comparison:
    """Begin to compare a call over the ranks of `group`; all of them call this.

    Args:
        call: what must be equal on all ranks, by name; the values are hashable and are compared by
            their repr. A `Call` where it will come again.
        problem: what this rank found wrong with its own input, if anything: then all ranks raise.
    """
    return Comparison(group, call, problem)


def gather_numbers(group: ProcessGroup, number: int) -> tuple[int, ...]:
    """What each rank passes, in group order, from host to host: no GPU waits."""
    hosts, _ = _hosts_of(group)
    gathered, work = _all_gather(torch.tensor([number], dtype=torch.int64), hosts)
    work.wait()
    return tuple(gathered.tolist())


def count_exchange(group: ProcessGroup) -> None:
    """Note that this rank has had its part in an exchange, which is compared at the next call.

    A rank that raises in between, where the others go on, would else be one exchange behind them
    for ever, and take the state of one for that of the next.
    """
    _exchanges[group] = _exchanges.get(group, 0) + 1


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long a rank waits for the others, by the group's backend."""
    hosts, _ = _hosts_of(group)
    return hosts.options._timeout


class Comparison:
    """A comparison under way.

    One that nobody confirmed, as where an exception came in between, is settled by the group's
    next: the other ranks may be waiting to tell what differs.
    """

    def __init__(self, group, call, problem):
        before = _newest.get(group)
        if before is not None:
            try:
                before._settle()
            except ValueError as error:
                raise ValueError(
                    f"in the call before, which this rank left early: {error}"
                ) from None
        self._settled = False
        self._hosts, self._shared = _hosts_of(group)
        self._call, self._problem = call, problem
        if problem is None and isinstance(call, Call):
            fingerprint = call.fingerprint
        else:
            fingerprint = _fingerprint(problem, *call.items())
        self._exchanges = _exchanges.get(group, 0)
        fingerprint = _signed(fingerprint + self._exchanges * _ODD)
        if self._shared is not None:
            self._asked = self._shared.ask(fingerprint)
        else:
            asked = _AllAtOnce if self._hosts.size() <= _FEW_RANKS else _InRounds
            self._asked = asked(fingerprint, self._hosts)
        _newest[group] = self

    def confirm(self) -> None:
        """Raise ValueError on every rank unless all passed the same call and none has a problem."""
        self._settle()
        if self._problem is not None:
            raise ValueError(self._problem)

    def _settle(self):
        if self._settled:
            return
        equal = self._asked.all_equal()
        # Not earlier: after an exception in there the question is still open.
        self._settled = True
        if not equal:
            self._explain()

    def _explain(self):
        call = {**self._call, "exchanges so far": self._exchanges}
        texts = [self._problem or "", *(_brief(value) for value in call.values())]
        try:
            gathered = _gather_texts(texts, self._hosts)
        except RuntimeError as error:
            # Who comes later would take the next call for its own.
            if self._shared is not None:
                self._shared.give_up("the ranks of the group disagreed, and not all said on what")
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


def _brief(value) -> str:
    """The value for a message; what is too long for it ends in a digest that tells it apart."""
    text = repr(value)
    if len(text) <= 100:
        return text
    return f"{text[:80]}... (digest {hashlib.sha256(text.encode()).hexdigest()[:8]})"


class _AllAtOnce:
    """Whether a number is equal on all ranks: P - 1 messages, all under way by themselves."""

    def __init__(self, number, hosts):
        self._gathered, self._work = _all_gather(torch.tensor([number]), hosts)

    def all_equal(self) -> bool:
        self._work.wait()
        return len(set(self._gathered.tolist())) == 1


class _InRounds:
    """The same for many ranks: in round i a rank tells the one 2^i places on the greatest and the
    least number of the 2^i ranks up to itself. Only the first round is under way by itself."""

    def __init__(self, number, hosts):
        self._hosts, self._distance = hosts, 1
        # The greatest of ~x is ~ the least of x.
        self._greatest = torch.tensor([number, ~number])
        self._begin_round()

    def all_equal(self) -> bool:
        while self._distance < self._hosts.size():
            for work in self._works:
                work.wait()
            self._greatest = torch.maximum(self._greatest, self._received)
            self._distance *= 2
            self._begin_round()
        greatest, complement = self._greatest.tolist()
        return greatest == ~complement

    def _begin_round(self):
        rank, size = self._hosts.rank(), self._hosts.size()
        if self._distance >= size:
            return
        self._received = torch.empty_like(self._greatest)
        self._works = (
            self._hosts.send([self._greatest], (rank + self._distance) % size, 0),
            self._hosts.recv([self._received], (rank - self._distance) % size, 0),
        )


def _signed(number):
    return (number + 2**63) % 2**64 - 2**63


@lru_cache(maxsize=1024)
def _fingerprint(*parts) -> int:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _hosts_of(group):
    """(connections, slate or None) of the group; when it first compares, all ranks make them."""
    hosts, backend, shared = _hosts.get(group, (None, None, None))
    if hosts is None:
        # Not `new_group`: all ranks of the job would have to call that, and here are only those of
        # `group`. (Its use_local_synchronization names groups by how many a rank knows, and ranks
        # may know different numbers.)
        store = dist.PrefixStore("lasp.guard", distributed_c10d._get_process_group_store(group))
        # Of "cpu" and "cuda" the latter, on all ranks: a set has no order of its own.
        backend = group._get_backend(torch.device(max(device_types(group))))
        hosts = dist.ProcessGroupGloo(store, group.rank(), group.size(), _timeout_of(backend))
        gather = partial(_gather_texts, hosts=hosts)
        shared = slate.join(group.rank(), group.size(), gather, partial(_timeout_of, backend))
        _hosts[group] = hosts, backend, shared
    # It may have changed, as a launcher changes it after the first step.
    timeout = _timeout_of(backend)
    if hosts.options._timeout != timeout:
        hosts._set_default_timeout(timeout)
    return hosts, shared


def _timeout_of(backend):
    return getattr(backend.options, "_timeout", dist.default_pg_timeout)


def _all_gather(message, hosts):
    gathered = message.new_empty(hosts.size() * message.numel())
    return gathered, hosts._allgather_base(gathered, message)


def _gather_texts(texts, hosts):
    """Each rank's texts, cut to a fixed size: equal on all ranks whatever they disagree on."""
    assert len(texts) <= _TEXTS, len(texts)
    texts = texts + [""] * (_TEXTS - len(texts))
    rows = [text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0") for text in texts]
    sent = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    received, work = _all_gather(sent, hosts)
    work.wait()
    table = received.numpy().reshape(-1, _TEXTS, _TEXT_BYTES)
    return [
        [bytes(row).rstrip(b"\0").decode(errors="replace") for row in of_rank] for of_rank in table
    ]
