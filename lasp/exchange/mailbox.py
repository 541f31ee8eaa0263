"""Memory that the ranks of one host write into each other's, where NVLink or PCIe lets them.

Between such ranks a state goes without NCCL, by a kernel (`lasp.ops.relay`): a few microseconds per
hop instead of twenty. Every rank of a group has a mailbox: for each direction an inbox of one state
(twice its bytes) and counters. It is made at the group's first exchange of a size, and lives as
long as the group.

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
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup

from lasp.exchange import guard
from lasp.exchange.peers import AffineMap

__all__ = ["Mailbox", "find_mailbox"]

# Programs of a relay. They hold multiprocessors while they wait, so few of them where other
# kernels run meanwhile.
PROGRAMS, FEW_PROGRAMS = 64, 16

# A group's mailboxes by number of floats; None: it has to send messages.
_mailboxes: WeakKeyDictionary[ProcessGroup, dict[int, Mailbox] | None] = WeakKeyDictionary()


def find_mailbox(
    group: ProcessGroup, local: torch.Tensor, relay: Callable | None
) -> Mailbox | None:
    """The mailbox for states like `local`, or None if the group has to send messages.

    `relay` is `lasp.ops.relay`, or None: messages.

    All ranks of the group call this, with states of one size, and all get one or none does.
    """
    if relay is None or not local.is_cuda or local.dtype != torch.float32 or group.size() == 1:
        return None
    if group not in _mailboxes:
        _mailboxes[group] = {} if _share_a_host(group, local.device) else None
    made = _mailboxes[group]
    if made is None:
        return None
    if local.numel() not in made:
        box, problem = None, None
        try:
            box = Mailbox(group, local, relay)
        except Exception as error:
            problem = error
        if not all(guard.gather_numbers(group, int(problem is None))):
            reason = f": {type(problem).__name__}: {problem}" if problem else " on another rank"
            warnings.warn(
                f"peer memory could not be mapped{reason}. States go through the process group "
                "instead; LASP_PEER_MEMORY=0 asks for that.",
                stacklevel=2,
            )
            _mailboxes[group] = None
            return None
        made[local.numel()] = box
    box = made[local.numel()]
    # A launcher changes it after the first step.
    box.limit = guard.timeout_of(group)
    return box


def _share_a_host(group: ProcessGroup, device: torch.device) -> bool:
    """Whether every rank says yes, is on the same host and reaches every other rank's GPU."""
    wanted = os.environ.get("LASP_PEER_MEMORY", "1") != "0" and torch.version.hip is None
    # Containers of one host have names of their own, and may not see each other's processes.
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = f"{socket.gethostname()} {boot.read_text() if boot.exists() else ''}"
    number = int.from_bytes(hashlib.sha256(host.encode()).digest()[:7], "little")
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

    All exchanges of a size go over one stream, in the order of the calls: the counters tell apart
    what was sent first from what was sent next, and nothing else does.
    """

    def __init__(self, group: ProcessGroup, local: torch.Tensor, relay: Callable) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        # Two directions, each an inbox and its counters, on whole lines of 128 bytes.
        num_floats = local.numel()
        padded = -(-num_floats // 16) * 16
        each = padded + (num_floats // 1024 + 3 + 31) // 32 * 16
        self._memory = symmetric_memory.empty(2 * each, dtype=torch.int64, device=local.device)
        self._memory.zero_()
        # Before the others have it in hand.
        torch.cuda.synchronize(local.device)
        self._handle = symmetric_memory.rendezvous(self._memory, group)

        def boxes(rank):
            whole = self._memory
            if rank != group.rank():
                whole = self._handle.get_buffer(rank, (2 * each,), torch.int64)
            for begin in (0, each):
                counters = whole[begin + padded : begin + each].view(torch.int32)
                yield whole[begin : begin + num_floats], counters

        rank = group.rank()
        self._boxes = {
            place: tuple(boxes(place))
            for place in (rank - 1, rank, rank + 1)
            if 0 <= place < group.size()
        }
        self._rank, self._relay = rank, relay
        # First come, first served, before the kernels that hide it.
        self._stream = torch.cuda.Stream(local.device, priority=-1)

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
        local, rates = each.local.contiguous(), each.log_decay
        if rates is None:
            rates = local.new_zeros(local.shape[1])
        for tensor in (local, entering):
            if tensor is not None:
                tensor.record_stream(self._stream)
        self._relay(
            local,
            rates.to(torch.float32).contiguous(),
            each.length,
            entering,
            self._boxes[self._rank][box],
            self._boxes[self._rank - step][box] if entering is not None else None,
            self._boxes[self._rank + step][box] if sends else None,
            passes=each.passes,
            programs=FEW_PROGRAMS if few else PROGRAMS,
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
