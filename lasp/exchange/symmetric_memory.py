"""Buffers in peer memory: ranks of one host write states into each other's GPUs.

Between such ranks a state goes without NCCL, by a kernel (`lasp.ops.send_recv_state`): a few
microseconds per hop instead of twenty, over NVLink or PCIe. Every rank has a buffer: for each
direction room for one state (twice its bytes) and counters. It is made at the group's first
exchange of a size, serves states up to the next power of two, and lives as long as the group.

Neighbours in a group's order that share a host and reach each other's memory, a part of the group
(`lasp.exchange.hosts`), have their buffers among themselves. A group on one host is one part. A
group that spans hosts has a part on each, and states cross from part to part by messages.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from lasp import replay
from lasp.exchange import consistency
from lasp.exchange.hosts import HostRanks, split_by_host
from lasp.exchange.topology import Transition

__all__ = ["StateBuffer", "find_buffer"]

# Floats of the smallest buffer: it fills whole lines of 128 bytes, as all larger ones do.
_MIN_CAPACITY = 16

# The parts of each group.
_parts: WeakKeyDictionary[ProcessGroup, tuple[HostRanks, ...]] = WeakKeyDictionary()
# A group's buffers by device and capacity, None where this rank has none.
_buffers: WeakKeyDictionary[ProcessGroup, dict[tuple, StateBuffer | None]] = WeakKeyDictionary()
# Rendezvous count of this process. torch numbers them over all groups; ranks with different counts
# would wait for each other forever.
_rendezvous = 0


def find_buffer(
    group: ProcessGroup, local: torch.Tensor, send_recv_state: Callable | None
) -> StateBuffer | None:
    """The buffer for states like `local`, or None if this rank has to send messages.

    All ranks of the group call this, with states of one size. All ranks of a part get a buffer, or
    none does.

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
    made = _buffers.get(group)
    if made is None or (key not in made and _has_memory(group)):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot hold a group's first exchange of a size: run it once before "
                "the capture."
            )
        if made is None:
            _parts[group] = split_by_host(group, local.device)
            made = _buffers[group] = {}
        if _has_memory(group):
            made[key] = _make_buffer(group, *key, send_recv_state)
    buffer = made.get(key)
    if buffer is not None:
        # A launcher may change the timeout after the first step.
        buffer.timeout = consistency.timeout_of(group)
    return buffer


def _has_memory(group: ProcessGroup) -> bool:
    """True if any part of the group has more than one rank."""
    return len(_parts[group]) < group.size()


def _make_buffer(
    group: ProcessGroup, device: torch.device, capacity: int, send_recv_state: Callable
) -> StateBuffer | None:
    """A buffer on every rank of a part, or on none. All ranks of the group call this."""
    global _rendezvous
    part = next(part for part in _parts[group] if group.rank() in part.ranks)
    of_part = slice(part.ranks.start, part.ranks.stop)
    buffer = problem = None
    if len(part.ranks) > 1:
        try:
            buffer = StateBuffer(device, capacity, send_recv_state)
        except Exception as error:
            problem = error
    # Checked first, so that no rank waits in the rendezvous for one that does not come.
    number = -1 if buffer is None else _rendezvous
    numbers = consistency.gather_numbers(group, number)[of_part]
    meets = min(numbers) >= 0 and len(set(numbers)) == 1
    if meets:
        _rendezvous += 1
        try:
            buffer.connect(group, part, number)
        except Exception as error:
            problem = error
    # No rank writes before all of its part have mapped the memory.
    mapped = consistency.gather_numbers(group, int(meets and problem is None))[of_part]
    if len(part.ranks) == 1 or all(mapped):
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


@contextlib.contextmanager
def _group_of(group: ProcessGroup, ranks: range, number: int) -> Iterator[str]:
    """The name of a group of these ranks, with which torch's symmetric memory maps theirs.

    Not by `new_group`, which all ranks of the job would have to call. Symmetric memory asks a group
    for a rank, a size and a store, so this one has no backend.
    """
    from torch._C import _distributed_c10d as c10d

    rank, size = group.rank() - ranks[0], len(ranks)
    store = dist.PrefixStore(
        f"lasp.symmetric_memory.{ranks[0]}", distributed_c10d._get_process_group_store(group)
    )
    # The same in all processes of the part, and new in each.
    name = f"lasp.{dist.get_global_rank(group, ranks[0])}.{number}"
    of_ranks = dist.ProcessGroup(store, rank, size)
    of_ranks._set_group_name(name)
    c10d._register_process_group(name, of_ranks)
    try:
        if hasattr(c10d._SymmetricMemory, "set_group_info"):
            # Some versions of torch look here, and not among the registered groups.
            c10d._SymmetricMemory.set_group_info(name, rank, size, store)
        yield name
    finally:
        c10d._unregister_process_group(name)


@contextlib.contextmanager
def _equal_indices() -> Iterator[None]:
    """Let torch map memory of processes that each call their GPU number 0.

    It takes them to be on one GPU, and refuses that unless told otherwise.
    """
    name = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class StateBuffer:
    """A rank's buffers, those of its neighbours, and the stream of the kernels that use them.

    All exchanges of a group run on one stream, in the order of the calls: only the counters tell
    one state from the next. A CUDA graph has its own order: replay it in place of the eager call,
    not beside other calls of the group.

    Attributes:
        ranks: those of the group whose buffers these are, this one among them.
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

    def connect(self, group: ProcessGroup, part: HostRanks, number: int) -> None:
        """Map the neighbours' memory. All ranks of the part call this, and may wait here.

        Args:
            number: of this rendezvous, equal on all ranks of the part.
        """
        import torch.distributed._symmetric_memory as symmetric_memory

        with contextlib.ExitStack() as stack:
            if not part.indices_differ:
                stack.enter_context(_equal_indices())
            if len(part.ranks) == group.size():
                self._handle = symmetric_memory.rendezvous(self._memory, group)
            else:
                name = stack.enter_context(_group_of(group, part.ranks, number))
                handle = symmetric_memory._SymmetricMemory.rendezvous(self._memory, name)
                self._handle = handle
        self.ranks, self._rank, size = part.ranks, group.rank(), self._size

        def directions(rank):
            memory = self._memory
            if rank != self._rank:
                memory = self._handle.get_buffer(rank - part.ranks[0], (2 * size,), torch.int64)
            for start in (0, size):
                counters = memory[start + self._capacity : start + size].view(torch.int32)
                yield memory[start : start + self._capacity], counters

        self._buffers = {
            rank: tuple(directions(rank))
            for rank in (self._rank - 1, self._rank, self._rank + 1)
            if rank in part.ranks
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
        arrived: bool = False,
        state_out: torch.Tensor | None = None,
    ) -> None:
        """Queue one chunk's part of the ring on the stream.

        Args:
            transition: the chunk's.
            state_in: gets the state that the previous neighbour sends; None: nothing is received.
            upward: the previous neighbour is the rank below, the following one the rank above.
            sends: the outgoing state goes to the following neighbour.
            overlapped: run beside other kernels, on few multiprocessors.
            arrived: no neighbour sends: `state_in` has come by a message.
            state_out: no neighbour receives: this gets the outgoing state, for a message.
        """
        step, direction = (1, 0) if upward else (-1, 1)
        own, sender, receiver = self._buffers[self._rank][direction], None, None
        # At the end of a part, this rank takes the place of the neighbour that has no buffer here,
        # so that the same kernel multiplies, and all hops give the same bits. It sends with the
        # counters of the one direction, in which it sends to no other rank, into its inbox of the
        # other, in which no other rank writes.
        other = self._buffers[self._rank][1 - direction]
        if arrived:
            self._launch(Transition(state_in, None), None, other, None, own, overlapped)
            sender = other
        elif state_in is not None:
            sender = self._buffers[self._rank - step][direction]
        if state_out is not None:
            receiver = other
        elif sends:
            receiver = self._buffers[self._rank + step][direction]
        self._launch(transition, state_in, own, sender, receiver, overlapped)
        if state_out is not None:
            self._launch(transition, state_out, other, own, None, overlapped)

    def _launch(self, transition, state_in, own, sender, receiver, overlapped):
        replay.note_constants(*own, *(sender or ()), *(receiver or ()))
        self._send_recv_state(
            transition.local.contiguous(),
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
