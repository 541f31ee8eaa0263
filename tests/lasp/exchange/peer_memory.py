"""Peer memory and hosts on one machine without GPUs: messages in place of memory."""

from __future__ import annotations

import contextlib
import random
import time
from unittest import mock

import torch
import torch.distributed as dist

from lasp.exchange import comm, hosts


class Messages:
    """What `StateBuffer` does, without memory to share: rank by rank, and waiting for each.

    Args:
        ranks: those of the group that share memory.
        delay: seconds that a state is late at most, at random.
    """

    def __init__(self, group, ranks, delay=0.0):
        self.ranks, self.sent = ranks, 0
        self._group, self._works = group, []
        self._delay, self._chance = delay, random.Random(dist.get_rank(group))

    def on_stream(self, *tensors):
        return contextlib.nullcontext()

    def put(
        self, transition, state_in, *, upward, sends, overlapped, arrived=False, state_out=None
    ):
        rank, step = dist.get_rank(self._group), 1 if upward else -1
        receives, passes = state_in is not None, transition.factor is not None
        assert not (arrived and state_out is not None) and (sends or receives)
        assert sends or not arrived, "nothing to do"
        self._be_late()
        if sends and not (receives and passes):
            self._send(transition.local, rank + step)
        if receives and not arrived:
            dist.recv(state_in, src=self._global_rank(rank - step), group=self._group)
        if sends and receives and passes:
            self._send(transition.apply(state_in), rank + step)
        if state_out is not None:
            assert receives and passes and not sends
            state_out.copy_(transition.apply(state_in))

    def _send(self, state, rank):
        self._be_late()
        self.sent += 1
        state = state.contiguous()
        work = dist.isend(state, dst=self._global_rank(rank), group=self._group)
        self._works.append((work, state))

    def _global_rank(self, rank):
        assert rank in self.ranks, (rank, self.ranks)
        return dist.get_global_rank(self._group, rank)

    def _be_late(self):
        time.sleep(self._chance.uniform(0, self._delay))

    def record_stream(self, tensor):
        return tensor

    def join(self):
        pass

    def finish(self):
        """Wait until the others have received all."""
        for work, _ in self._works:
            work.wait()
        self._works.clear()


@contextlib.contextmanager
def pretended_hosts(group, places, reached=True):
    """The ranks are on these hosts, each with a GPU that reaches the others there, or not."""
    rank = dist.get_rank(group)
    with (
        mock.patch.object(hosts, "_host_number", return_value=places[rank]),
        mock.patch.object(hosts, "_pci_address", return_value=1000 + rank),
        mock.patch.object(hosts, "_reaches_all", return_value=reached),
    ):
        yield


@contextlib.contextmanager
def memory_within(group, places, delay=0.0):
    """The ring as on these hosts, in memory inside each. Gives (the buffer of this rank or None,
    the ranks to which it sends messages, filled in as it sends)."""
    rank, chance, targets = dist.get_rank(group), random.Random(-dist.get_rank(group)), []
    with pretended_hosts(group, places):
        parts = hosts.split_by_host(group, mock.Mock(spec=torch.device, index=rank))
    ranks = next(part.ranks for part in parts if rank in part.ranks)
    buffer = Messages(group, ranks, delay) if len(ranks) > 1 else None
    send = comm.send

    def counting(state, target, group):
        targets.append(dist.get_group_rank(group, target))
        time.sleep(chance.uniform(0, delay))
        return send(state, target, group)

    with (
        mock.patch("lasp.exchange.ring.find_buffer", return_value=buffer),
        mock.patch("lasp.exchange.ring.send", counting),
    ):
        yield buffer, targets
    if buffer is not None:
        buffer.finish()
