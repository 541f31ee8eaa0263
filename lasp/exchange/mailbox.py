"""Memory that the ranks of one host write into each other's, where NVLink or PCIe lets them.

Between such ranks a state goes without NCCL, by a kernel (`lasp.ops.send_recv_state`): a few
microseconds per hop instead of twenty. Every rank of a group has a mailbox: for each direction an
inbox of one state (twice its bytes) and counters. It is made at the group's first exchange of a
size, serves states up to the next power of two, and lives as long as the group.

A group uses it if all its ranks are on one host and reach each other's memory, unless any of them
has LASP_PEER_MEMORY=0 in its environment. torch's symmetric memory maps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import socket
import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup

from lasp.exchange import guard, slate
from lasp.exchange.peers import AffineMap

__all__ = ["Mailbox", "find_mailbox"]

# Floats of the smallest mailbox: its inbox fills whole lines of 128 bytes, as all larger ones do.
_LEAST = 16

# A group's mailboxes by device and capacity, None where it could not be had; None in place of all:
# the group has to send messages.
_mailboxes: WeakKeyDictionary[ProcessGroup, dict[tuple, Mailbox | None] | None]
_mailboxes = WeakKeyDictionary()
# How often this process came to a rendezvous. torch numbers these, whatever the group, and a rank
# waits in vain for another that counts otherwise.
_rendezvous = 0


def find_mailbox(
    group: ProcessGroup, local: torch.Tensor, relay: Callable | None
) -> Mailbox | None:
    """The mailbox for states like `local`, or None if the group has to send messages.

    All ranks of the group call this, with states of one size, and all get one or none does.

    Args:
        relay: `lasp.ops.send_recv_state`, or None: messages.

    Raises:
        RuntimeError: a CUDA graph is being captured, and there is no mailbox of that size yet.
    """
    n = local.numel()
    if relay is None or not local.is_cuda or local.dtype != torch.float32 or group.size() == 1:
        return None
    if not 0 < n < 2**31:
        return None
    # Sizes share one, as batches of different sizes have: few are ever made.
    key = local.device, max(_LEAST, 1 << (n - 1).bit_length())
    made = _mailboxes.get(group, ())
    if made is not None and key not in made:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot hold a group's first exchange of a size: run it once before "
                "the capture."
            )
        if made == ():
            made = _mailboxes[group] = {} if _share_a_host(group, local.device) else None
        if made is not None:
            made[key] = _make(group, *key, relay)
    box = None if made is None else made[key]
    if box is not None:
        # A launcher changes it after the first step.
        box.limit = guard.timeout_of(group)
    return box


def _make(
    group: ProcessGroup, device: torch.device, capacity: int, relay: Callable
) -> Mailbox | None:
    """A mailbox on every rank, or on none."""
    global _rendezvous
    box = problem = None
    try:
        box = Mailbox(device, capacity, relay)
    except Exception as error:
        problem = error
    # So that nobody waits in the rendezvous for one that does not come.
    numbers = guard.gather_numbers(group, -1 if box is None else _rendezvous)
    if min(numbers) >= 0 and len(set(numbers)) == 1:
        _rendezvous += 1
        try:
            box.connect(group)
        except Exception as error:
            problem = error
        # Nobody writes before all are here.
        if all(guard.gather_numbers(group, int(problem is None))):
            return box
    problem = problem or RuntimeError(f"another rank could not, or has met others: {numbers}")
    warnings.warn(
        f"peer memory could not be mapped ({type(problem).__name__}: {problem}). States of this "
        "size go through the process group instead; LASP_PEER_MEMORY=0 asks for that.",
        stacklevel=2,
    )
    return None


def _share_a_host(group: ProcessGroup, device: torch.device) -> bool:
    """Whether every rank says yes, is on the same host and reaches every other rank's GPU."""
    wanted = os.environ.get("LASP_PEER_MEMORY", "1") != "0" and torch.version.hip is None
    # Containers of one host have names of their own, and may not see each other's processes.
    host = slate.host()
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt") if host]
    here = f"{socket.gethostname()} {host} {spaces}"
    number = int.from_bytes(hashlib.sha256(here.encode()).digest()[:7], "little")
    hosts = guard.gather_numbers(group, number if wanted else -1)
    if min(hosts) < 0 or len(set(hosts)) > 1:
        return False
    devices = guard.gather_numbers(group, device.index)
    # Processes that see one GPU each all call it 0, and cannot name the others'.
    reached = len(set(devices)) == len(devices) and all(
        other == device.index
        or (
            other < torch.cuda.device_count()
            and torch.cuda.can_device_access_peer(device.index, other)
        )
        for other in devices
    )
    return all(guard.gather_numbers(group, int(reached)))


class Mailbox:
    """A rank's inboxes, those of its neighbours, and the stream on which states come and go.

    `limit` is how long a rank waits for its neighbours before it gives the process up.

    All exchanges go over one stream, in the order of the calls: the counters tell apart what was
    sent first from what was sent next, and nothing else does. A CUDA graph has its own order:
    replay it where its eager call would stand, not beside other calls of the group.
    """

    def __init__(self, device: torch.device, capacity: int, relay: Callable) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._capacity, self._relay = capacity, relay
        # Two directions, each an inbox and its counters, on whole lines of 128 bytes.
        self._each = capacity + (capacity // 1024 + 3 + 31) // 32 * 16
        # First come, first served, before the kernels that hide it.
        self._stream = torch.cuda.Stream(device, priority=-1)
        options = dict(dtype=torch.int64, device=device)
        try:
            self._memory = symmetric_memory.empty(2 * self._each, **options)
        except RuntimeError:
            # It does not come from torch's cache, which may hold what is free.
            torch.cuda.empty_cache()
            self._memory = symmetric_memory.empty(2 * self._each, **options)
        self._memory.zero_()
        torch.cuda.synchronize(device)

    def connect(self, group: ProcessGroup) -> None:
        """Map the neighbours' memory. All ranks of the group call this, and may wait here."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self._handle = symmetric_memory.rendezvous(self._memory, group)
        self._rank, each = group.rank(), self._each

        def boxes(rank):
            whole = self._memory
            if rank != self._rank:
                whole = self._handle.get_buffer(rank, (2 * each,), torch.int64)
            for begin in (0, each):
                counters = whole[begin + self._capacity : begin + each].view(torch.int32)
                yield whole[begin : begin + self._capacity], counters

        self._boxes = {
            rank: tuple(boxes(rank))
            for rank in (self._rank - 1, self._rank, self._rank + 1)
            if 0 <= rank < group.size()
        }

    @contextlib.contextmanager
    def on_its_stream(self):
        """Run kernels after all that is queued now, beside what will be."""
        self._caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(self._caller)
        with torch.cuda.stream(self._stream):
            yield

    def pass_on(
        self,
        each: AffineMap,
        entering: torch.Tensor | None,
        *,
        upward: bool,
        sends: bool,
        few: bool,
    ) -> None:
        """Queue one place's part of the ring, on its stream.

        Args:
            each: the place's map.
            entering: gets what comes from the neighbour before; None: nothing comes.
            upward: whether that is the rank below, and what leaves goes to the rank above.
            sends: whether anything leaves.
            few: run beside other kernels, on few multiprocessors.
        """
        step, box = (1, 0) if upward else (-1, 1)
        local = each.local.contiguous()
        goes_on = sends and entering is not None and each.passes
        factor = each.factor if goes_on else None
        for tensor in {each.local, local, factor, entering} - {None}:
            # Whoever starts an exchange may never finish it.
            tensor.record_stream(self._stream)
        self._relay(
            local,
            factor,
            entering,
            self._boxes[self._rank][box],
            self._boxes[self._rank - step][box] if entering is not None else None,
            self._boxes[self._rank + step][box] if sends else None,
            overlapped=few,
            limit_seconds=math.ceil(self.limit.total_seconds()),
        )

    def lent(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which was made on its stream and will be read on the caller's."""
        tensor.record_stream(self._caller)
        return tensor

    def join(self) -> None:
        """What the caller queues from now on waits for all that this stream was given.

        Sends too: the caller's next kernel would take the multiprocessors that they need.
        """
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
