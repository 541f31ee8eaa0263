"""Buffers in peer memory: ranks of one host write states into each other's GPUs.

Between such ranks a state goes without NCCL, by a kernel (`lasp.ops.send_recv_state`): a few
microseconds per hop instead of twenty, over NVLink or PCIe. Every rank of a group has a buffer: for
each direction room for one state (twice its bytes) and counters. It is made at the group's first
exchange of a size, serves states up to the next power of two, and lives as long as the group.

A group uses it if all its ranks are on one host and reach each other's memory, unless any of them
has LASP_PEER_MEMORY=0 in its environment.
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

from lasp import replay
from lasp.exchange import consistency, shared_memory
from lasp.exchange.topology import Transition

__all__ = ["StateBuffer", "find_buffer"]

# Floats of the smallest buffer: it fills whole lines of 128 bytes, as all larger ones do.
_MIN_CAPACITY = 16

# A group's buffers by device and capacity, None where one could not be made. A None value in place
# of the dictionary means that the group must use messages.
_buffers: WeakKeyDictionary[ProcessGroup, dict[tuple, StateBuffer | None] | None]
_buffers = WeakKeyDictionary()
# Rendezvous count of this process. torch numbers them over all groups; ranks with different counts
# would wait for each other forever.
_rendezvous = 0


def find_buffer(
    group: ProcessGroup, local: torch.Tensor, send_recv_state: Callable | None
) -> StateBuffer | None:
    """The buffer for states like `local`, or None if the group has to send messages.

    All ranks of the group call this, with states of one size, and all get one or none does.

    Args:
        send_recv_state: `lasp.ops.send_recv_state`, or None: messages.

    Raises:
        RuntimeError: a CUDA graph is being captured, and there is no buffer of that size yet.
    """
    n = local.numel()
    if not local.is_cuda or local.dtype != torch.float32 or send_recv_state is None:
        return None
    if group.size() == 1 or not 0 < n < 2**31:
        return None
    # Rounded up, so that batches of different sizes share few buffers.
    key = local.device, max(_MIN_CAPACITY, 1 << (n - 1).bit_length())
    made = _buffers.get(group, ())
    if made is not None and key not in made:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot hold a group's first exchange of a size: run it once before "
                "the capture."
            )
        if made == ():
            made = _buffers[group] = {} if _share_a_host(group, local.device) else None
        if made is not None:
            made[key] = _make_buffer(group, *key, send_recv_state)
    buffer = None if made is None else made[key]
    if buffer is not None:
        # A launcher may change the timeout after the first step.
        buffer.timeout = consistency.timeout_of(group)
    return buffer


def _make_buffer(
    group: ProcessGroup, device: torch.device, capacity: int, send_recv_state: Callable
) -> StateBuffer | None:
    """A buffer on every rank, or on none."""
    global _rendezvous
    buffer = problem = None
    try:
        buffer = StateBuffer(device, capacity, send_recv_state)
    except Exception as error:
        problem = error
    # Checked first, so that no rank waits in the rendezvous for one that does not come.
    numbers = consistency.gather_numbers(group, -1 if buffer is None else _rendezvous)
    if min(numbers) >= 0 and len(set(numbers)) == 1:
        _rendezvous += 1
        try:
            buffer.connect(group)
        except Exception as error:
            problem = error
        # No rank writes before all have mapped the memory.
        if all(consistency.gather_numbers(group, int(problem is None))):
            return buffer
    problem = problem or RuntimeError(
        f"it failed on another rank, or the ranks' rendezvous counts differ: {numbers}"
    )
    warnings.warn(
        f"symmetric memory could not be mapped ({type(problem).__name__}: {problem}). States of "
        "this size go through the process group instead. LASP_PEER_MEMORY=0 turns it off.",
        stacklevel=2,
    )
    return None


def _share_a_host(group: ProcessGroup, device: torch.device) -> bool:
    """True if no rank has turned it off, and all are on one host and reach each other's GPUs."""
    wanted = os.environ.get("LASP_PEER_MEMORY", "1") != "0" and torch.version.hip is None
    # Containers of one host have names of their own, and may not see each other's processes.
    host = shared_memory.host_id()
    namespaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt") if host]
    name = f"{socket.gethostname()} {host} {namespaces}"
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    hosts = consistency.gather_numbers(group, number if wanted else -1)
    if min(hosts) < 0 or len(set(hosts)) > 1:
        return False
    devices = consistency.gather_numbers(group, device.index)
    # With one visible GPU per process, every device index is 0 and other GPUs cannot be named.
    reached = len(set(devices)) == len(devices) and all(
        other == device.index
        or (
            other < torch.cuda.device_count()
            and torch.cuda.can_device_access_peer(device.index, other)
        )
        for other in devices
    )
    return all(consistency.gather_numbers(group, int(reached)))


class StateBuffer:
    """A rank's buffers, those of its neighbours, and the stream of the kernels that use them.

    All exchanges of a group run on one stream, in the order of the calls: only the counters tell
    one state from the next. A CUDA graph has its own order: replay it in place of the eager call,
    not beside other calls of the group.

    Attributes:
        timeout: how long a kernel waits for a neighbour before it ends the process.
    """

    def __init__(self, device: torch.device, capacity: int, send_recv_state: Callable) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._capacity, self._send_recv_state = capacity, send_recv_state
        # Two directions, each a buffer and its counters, on whole lines of 128 bytes.
        self._size = capacity + (capacity // 1024 + 3 + 31) // 32 * 16
        # High priority, so that its kernels are scheduled before the compute they overlap with.
        self._stream = torch.cuda.Stream(device, priority=-1)
        # What the caller queued before an exchange, and the exchange; its tensors until then.
        self._queued, self._done = torch.cuda.Event(), torch.cuda.Event()
        self._in_use: tuple[torch.Tensor | None, ...] = ()
        options = dict(dtype=torch.int64, device=device)
        try:
            self._memory = symmetric_memory.empty(2 * self._size, **options)
        except RuntimeError:
            # This bypasses torch's caching allocator, which may hold the free memory.
            torch.cuda.empty_cache()
            self._memory = symmetric_memory.empty(2 * self._size, **options)
        self._memory.zero_()
        torch.cuda.synchronize(device)

    def connect(self, group: ProcessGroup) -> None:
        """Map the neighbours' memory. All ranks of the group call this, and may wait here."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self._handle = symmetric_memory.rendezvous(self._memory, group)
        self._rank, size = group.rank(), self._size

        def directions(rank):
            memory = self._memory
            if rank != self._rank:
                memory = self._handle.get_buffer(rank, (2 * size,), torch.int64)
            for start in (0, size):
                counters = memory[start + self._capacity : start + size].view(torch.int32)
                yield memory[start : start + self._capacity], counters

        self._buffers = {
            rank: tuple(directions(rank))
            for rank in (self._rank - 1, self._rank, self._rank + 1)
            if 0 <= rank < group.size()
        }

    @contextlib.contextmanager
    def on_stream(self, *tensors: torch.Tensor | None):
        """Run kernels on `tensors` after all that is queued now, beside what will be."""
        replay.note_call(self._fork, *tensors)
        with torch.cuda.stream(self._stream):
            yield

    def _fork(self, *tensors):
        # An exchange may be started and, after an exception, never waited for.
        self._join()
        self._in_use, self._caller = tensors, torch.cuda.current_stream(self._stream.device)
        self._caller.record_event(self._queued)
        self._stream.wait_event(self._queued)

    def put(
        self,
        transition: Transition,
        state_in: torch.Tensor | None,
        *,
        upward: bool,
        sends: bool,
        overlapped: bool,
    ) -> None:
        """Queue one chunk's part of the ring on the stream.

        Args:
            transition: the chunk's.
            state_in: gets the state that the previous neighbour sends; None: nothing is received.
            upward: the previous neighbour is the rank below, the following one the rank above.
            sends: the outgoing state goes to the following neighbour.
            overlapped: run beside other kernels, on few multiprocessors.
        """
        step, direction = (1, 0) if upward else (-1, 1)
        local = transition.local.contiguous()
        previous, following = self._rank - step, self._rank + step
        own = self._buffers[self._rank][direction]
        sender = self._buffers[previous][direction] if state_in is not None else None
        receiver = self._buffers[following][direction] if sends else None
        replay.note_constants(*own, *(sender or ()), *(receiver or ()))
        self._send_recv_state(
            local,
            transition.factor,
            state_in,
            own,
            sender,
            receiver,
            overlapped=overlapped,
            limit_seconds=math.ceil(self.timeout.total_seconds()),
        )

    def record_stream(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which was made on the stream and will be read on the caller's."""
        tensor.record_stream(self._caller)
        return tensor

    def join(self) -> None:
        """What the caller queues from now on waits for all that is queued on the stream.

        It waits for sends too: the caller's next kernel would take the multiprocessors they need.
        """
        replay.note_call(self._join)

    def _join(self):
        if self._in_use:
            self._done.record(self._stream)
            # The caller of the exchange, which owns the tensors: after an exception another stream
            # may be the current one.
            self._caller.wait_event(self._done)
        self._in_use = ()
