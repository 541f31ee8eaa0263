"""A state from rank to rank: in Triton's interpreter, and compiled for Hopper.

The interpreter runs one rank after the other, in the order in which they receive the state.
"""

import math
from datetime import timedelta

import pytest
import torch

from lasp.exchange import Transition
from lasp.exchange.symmetric_memory import StateBuffer
from lasp.ops.triton import send_recv_state
from lasp.ops.triton.launch_config import SEND_CHUNK
from tests.lasp.ops.triton import interpreter
from tests.lasp.ops.triton.compiler import spilled_bytes


class Chain:
    """Ranks one after another, and the memory that they share."""

    def __init__(self, ranks, shape):
        n = shape[0] * shape[1] * shape[2] * shape[3]
        self.shape = shape
        counters = torch.zeros(n // 1024 + 3, dtype=torch.int32)
        # Zero: nothing has arrived.
        self.buffers = [(torch.zeros(n, dtype=torch.int64), counters.clone()) for _ in range(ranks)]

    def exchange(self, factor, linked=None):
        """Random states through the chain: (the states received, what they should be)."""
        ranks = len(self.buffers)
        linked = linked or [True] * (ranks - 1)
        found, wanted, state = [], [], None
        for rank in range(ranks):
            local = torch.randn(self.shape)
            receives = rank > 0 and linked[rank - 1]
            sends = rank < ranks - 1 and linked[rank]
            state_in = torch.full(self.shape, float("nan")) if receives else None
            send_recv_state(
                *(local, factor, state_in, self.buffers[rank]),
                self.buffers[rank - 1] if receives else None,
                self.buffers[rank + 1] if sends else None,
                overlapped=rank % 2 == 0,
            )
            if receives:
                found.append(state_in)
                wanted.append(state)
            state = local.double()
            if receives and factor is not None:
                state += factor.double() * wanted[-1]
        return found, wanted


def check(ranks=4, shape=(1, 3, 80, 100), exchanges=3, factor="heads", linked=None):
    chain = Chain(ranks, shape)
    for _ in range(exchanges):
        kinds = {"heads": (shape[1], 1, 1), "rows": (*shape[:2], 1, 1)}
        values = torch.rand(kinds[factor]) if factor else None
        for found, wanted in zip(*chain.exchange(values, linked), strict=True):
            assert (found.double() - wanted).norm() < 1e-6 * wanted.norm()


def check_counters():
    """Every chunk is counted once per exchange, on both sides."""
    chain = Chain(3, (1, 2, 64, 100))
    chunks = -(-12800 // SEND_CHUNK)
    chain.exchange(torch.ones(2, 1, 1))
    chain.exchange(torch.ones(2, 1, 1), linked=[True, False])
    received, sent, consumed = (
        [counters[i * chunks : (i + 1) * chunks].tolist() for _, counters in chain.buffers]
        for i in range(3)
    )
    assert received == [[0] * chunks, [2] * chunks, [1] * chunks]
    assert sent == consumed == [[2] * chunks, [1] * chunks, [0] * chunks]


def buffers_of(places, shape):
    """A `StateBuffer` per rank, as connected among the neighbours on each host."""
    n = math.prod(shape)
    counters = torch.zeros(n // 1024 + 3, dtype=torch.int32)
    memory = [
        tuple((torch.zeros(n, dtype=torch.int64), counters.clone()) for _ in range(2))
        for _ in places
    ]
    made = []
    for rank, place in enumerate(places):
        buffer = StateBuffer.__new__(StateBuffer)
        neighbours = [r for r in (rank - 1, rank, rank + 1) if 0 <= r < len(places)]
        buffer._rank, buffer.timeout = rank, timedelta(60)
        buffer._buffers = {r: memory[r] for r in neighbours if places[r] == place}
        buffer._send_recv_state = send_recv_state
        made.append(buffer)
    return made


def up_and_down(places, shape, exchanges):
    """What every rank received: from rank to rank, and back, with messages between hosts."""
    buffers, generator = buffers_of(places, shape), torch.Generator().manual_seed(5)
    found, last = [], len(places) - 1
    for _ in range(exchanges):
        for upward in (True, False):
            message = None
            for rank in range(last + 1) if upward else range(last, -1, -1):
                local = torch.randn(shape, generator=generator)
                factor = torch.rand(shape[1], 1, 1, generator=generator)
                step = 1 if upward else -1
                receives, sends = 0 <= rank - step <= last, 0 <= rank + step <= last
                leaves = sends and places[rank] != places[rank + step]
                arrived = message is not None
                state_in = torch.full(shape, float("nan")) if receives else None
                if arrived:
                    state_in.copy_(message)
                state_out = torch.full(shape, float("nan")) if leaves and receives else None
                if sends or not arrived:
                    buffers[rank].put(
                        Transition(local, factor),
                        state_in,
                        upward=upward,
                        sends=sends and not leaves,
                        overlapped=False,
                        arrived=arrived,
                        state_out=state_out,
                    )
                message = None
                if leaves:
                    message = local if state_out is None else state_out
                found.append(state_in)
    chunks = -(-math.prod(shape) // SEND_CHUNK)
    for rank, buffer in enumerate(buffers):
        for _, counters in buffer._buffers[rank]:
            sent, consumed = (counters[i * chunks : (i + 1) * chunks].tolist() for i in (1, 2))
            # Otherwise the next state would overwrite this one, or never be sent, on a GPU.
            assert sent == consumed, (rank, sent, consumed)
    return [state for state in found if state is not None]


def check_hosts(places, shape=(1, 3, 50, 60)):
    """The bits are those of one host, in many exchanges over the same memory."""
    one, several = (up_and_down(each, shape, 4) for each in ((0,) * len(places), places))
    assert len(one) == 8 * (len(places) - 1)
    for wanted, state in zip(one, several, strict=True):
        assert torch.equal(state, wanted) and state.any()


CASES = {
    "two hosts": lambda: check_hosts((0, 0, 1, 1)),
    "three hosts, several chunks": lambda: check_hosts((0, 0, 1, 1, 1, 2, 2), (2, 2, 40, 60)),
    "several chunks, the last one short": check,
    "less than a chunk": lambda: check(shape=(2, 1, 5, 7)),
    "whole chunks": lambda: check(shape=(1, 2, 64, 64)),
    "a factor per row and head": lambda: check(shape=(3, 2, 40, 50), factor="rows"),
    "more chunks than programs": lambda: check(ranks=3, shape=(1, 2, 256, 300), exchanges=1),
    "two ranks": lambda: check(ranks=2),
    "no factor: nothing passes through": lambda: check(factor=None),
    "documents end at boundaries": lambda: check(linked=[True, False, True]),
    "counters": check_counters,
}


@pytest.mark.timeout(interpreter.TIMEOUT + 100)
@pytest.mark.parametrize("case", CASES)
def test_states_arrive(case):
    error = interpreter.errors(__name__)[case]
    assert error is None, error


@pytest.mark.parametrize("receives, sends", [(True, True), (True, False), (False, True)])
def test_compiles_to_packets_that_are_written_whole(receives, sends, compiled):
    chain = Chain(3, (1, 16, 128, 128))
    previous, own, following = chain.buffers
    state_in = torch.zeros(chain.shape) if receives else None
    send_recv_state(
        *(torch.zeros(chain.shape), torch.ones(16), state_in, own),
        previous if receives else None,
        following if sends else None,
    )
    (kernel,) = compiled
    assert spilled_bytes(kernel) == 0
    ptx = kernel.asm["ptx"]
    # Never less than eight bytes at once: half a packet could be taken for a whole one.
    if sends:
        assert "st.global.v2.b64" in ptx
        assert "ld.global.sys.acquire" in ptx, "an inbox is written to before it was read"
    if receives:
        assert "ld.volatile.global.v2.b64" in ptx
        assert "st.release.sys.global.u32" in ptx
    assert "globaltimer" in ptx and "trap" in ptx


if __name__ == "__main__":
    interpreter.report(CASES)
