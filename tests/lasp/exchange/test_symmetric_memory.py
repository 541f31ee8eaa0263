"""The ring in peer memory: the order of chunks, with messages for the kernel; and the choice."""

import contextlib
import os
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp import exchange, shard
from lasp.exchange import ChunkChain, Transition, consistency, symmetric_memory
from tests.lasp import sharded
from tests.lasp.sharded import Problem


class Messages:
    """What `StateBuffer` does, without memory to share: rank by rank, and waiting for each."""

    def __init__(self, group):
        self._group, self._works = group, []

    def on_stream(self, *tensors):
        return contextlib.nullcontext()

    def put(self, transition, state_in, *, upward, sends, overlapped):
        rank, step = dist.get_rank(self._group), 1 if upward else -1
        receives, passes = state_in is not None, transition.factor is not None
        if sends and not (receives and passes):
            self._send(transition.local, rank + step)
        if receives:
            source = dist.get_global_rank(self._group, rank - step)
            dist.recv(state_in, src=source, group=self._group)
            if sends and passes:
                self._send(transition.apply(state_in), rank + step)

    def _send(self, state, rank):
        target = dist.get_global_rank(self._group, rank)
        state = state.contiguous()
        self._works.append((dist.isend(state, dst=target, group=self._group), state))

    def record_stream(self, tensor):
        return tensor

    def join(self):
        pass


def run_in_memory(group, problems):
    """The results, how often a buffer was asked for, and how many states were sent."""
    made = Messages(group)
    with mock.patch("lasp.exchange.ring.find_buffer", return_value=made) as asked:
        results = [sharded.run(group, problem) for problem in problems]
    for work, _ in made._works:
        work.wait()
    return results, asked.call_count, len(made._works)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", shard.LAYOUTS)
def test_chunks_pass_on_the_right_states(pool, size, layout):
    total = 48
    uneven = {2: (46, 2), 3: (2, 0, 46), 4: (0, 46, 0, 2)}[size]
    even = tuple(shard.split_lengths(total, size, layout))
    problems = [
        Problem(total, "ring", layout, lengths, documents)
        for lengths in (None, uneven)
        for documents in (
            None,
            sharded.documents_that("across", lengths or even, layout),
            sharded.documents_that("on", lengths or even, layout),
        )
    ]
    problems.append(Problem(total, "ring", layout, rates=-800.0))
    outcomes = pool.run(run_in_memory, problems, size=size)
    for _, asked, _ in outcomes:
        assert asked == 2 * len(problems)
    assert sum(sent for *_, sent in outcomes) > 0

    class Done:
        def run(self, *args, **options):
            return [results for results, *_ in outcomes]

    sharded.check(Done(), size, *problems)


def found(group, wanted, reached, allocated, met, mapped):
    """(True if this rank has a buffer, warnings, calls of the rendezvous).

    The arguments are the ranks that want one, reach the others, can allocate it, have the same
    count of rendezvous as the others, and can map the others' memory.
    """
    rank, connected = dist.get_rank(group), []
    local = mock.Mock(spec=torch.Tensor)
    local.is_cuda, local.dtype, local.device = True, torch.float32, mock.Mock(index=rank)
    local.numel.return_value = 10

    class Made:
        def __init__(self, device, capacity, send_recv_state):
            assert capacity == 16
            if rank not in allocated:
                raise torch.OutOfMemoryError

        def connect(self, group):
            connected.append(rank)
            if rank not in mapped:
                raise RuntimeError("no such memory")

    environment = {"LASP_PEER_MEMORY": "1" if rank in wanted else "0"}
    with (
        mock.patch.object(symmetric_memory, "StateBuffer", Made),
        mock.patch.object(symmetric_memory, "_buffers", {}),
        mock.patch.object(symmetric_memory, "_rendezvous", int(rank not in met)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(torch.cuda, "device_count", return_value=dist.get_world_size(group)),
        mock.patch.object(
            torch.cuda, "can_device_access_peer", side_effect=lambda *_: rank in reached
        ),
        mock.patch.object(symmetric_memory.warnings, "warn") as warned,
        mock.patch.object(consistency, "timeout_of", return_value=timedelta(seconds=90)),
    ):
        buffers = [symmetric_memory.find_buffer(group, local, lambda: None) for _ in range(2)]
        without = symmetric_memory.find_buffer(group, local, None)
    assert buffers[0] is buffers[1] and without is None
    assert buffers[0] is None or buffers[0].timeout == timedelta(seconds=90)
    return buffers[0] is not None, warned.call_count, len(connected)


@pytest.mark.parametrize("unable", ["nobody", "wanted", "reached", "allocated", "met", "mapped"])
def test_all_ranks_have_a_buffer_or_none(pool, unable):
    able = {name: {0, 1, 2} for name in ("wanted", "reached", "allocated", "met", "mapped")}
    if unable != "nobody":
        able[unable] = {0, 2}
    warned = unable in ("allocated", "met", "mapped")
    connected = unable in ("nobody", "mapped")
    outcomes = pool.run(found, *able.values(), size=3)
    assert outcomes == [(unable == "nobody", int(warned), int(connected))] * 3


def test_an_exchange_that_was_never_waited_for_ends_before_its_tensors_are_freed():
    """On the stream whose memory they are, whichever stream the next exchange is called on."""
    buffer = symmetric_memory.StateBuffer.__new__(symmetric_memory.StateBuffer)
    buffer._stream, buffer._queued, buffer._done = mock.Mock(), mock.Mock(), mock.Mock()
    buffer._in_use = ()
    first, second = mock.Mock(), mock.Mock()
    for stream in (first, second):
        with mock.patch("torch.cuda.current_stream", return_value=stream):
            buffer._fork(torch.zeros(1))
    assert first.wait_event.call_count == 1 and second.wait_event.call_count == 0
    with mock.patch("torch.cuda.current_stream", return_value=second):
        buffer._join()
        buffer._join()
    assert first.wait_event.call_count == second.wait_event.call_count == 1


def missed(group):
    """The error of the next call after rank 1 has raised midway and the others have gone on."""
    rank = dist.get_rank(group)
    q = torch.ones(1, 4, 2, 3)
    consistency._exchanges[group] = 0
    lasp.lightning_attention(q, q, q, None, group=group, exchange="all_gather")
    with contextlib.suppress(RuntimeError):
        if rank == 1:
            # As if it had taken part and then raised.
            with mock.patch.object(exchange, "record_exchange", side_effect=RuntimeError):
                lasp.lightning_attention(q, q, q, None, group=group, exchange="all_gather")
        else:
            lasp.lightning_attention(q, q, q, None, group=group, exchange="all_gather")
    try:
        lasp.lightning_attention(q, q, q, None, group=group, exchange="all_gather")
    except ValueError as error:
        return str(error)
    finally:
        # The tests to come use the same group.
        consistency._exchanges[group] = 0


def test_a_rank_that_missed_an_exchange_is_found(pool):
    for text in pool.run(missed, size=3):
        assert "exchanges so far (rank 0: 2, rank 1: 1, rank 2: 2)" in text


def test_cpu_tensors_go_by_messages():
    assert symmetric_memory.find_buffer(None, torch.zeros(1), lambda: None) is None


def chosen(group, in_memory):
    called = []

    def noting(name):
        def method(chain, transitions, **options):
            called.append(name)
            yield
            return [None] * len(transitions)

        return method

    patches = [
        mock.patch.object(exchange, n, noting(n)) for n in ("ring", "all_gather", "doubling")
    ]
    patches.append(mock.patch.object(exchange, "find_buffer", return_value=in_memory or None))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        transitions = [Transition(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1))]
        for layout in shard.LAYOUTS:
            chain = ChunkChain(group, layout)
            own = transitions * len(chain.local_chunks)
            exchange.start(own, chain, method="auto").wait()
            limits = {"_RING_UP_TO": 2, "_ALL_GATHER_UP_TO": 2}
            with mock.patch.multiple(exchange, **limits):
                exchange.start(own, chain, method="auto").wait()
    return called


def test_auto_chooses_by_ranks_memory_and_layout(pool):
    # Contiguous with the limits as they are and of two ranks, then zigzag.
    assert pool.run(chosen, False, size=2) == [["ring"] * 4] * 2
    few_and_many = ["ring", "doubling", "all_gather", "doubling"]
    assert pool.run(chosen, False, size=3) == [few_and_many] * 3
    assert pool.run(chosen, True, size=3) == [["ring", "doubling", "ring", "ring"]] * 3


def test_auto_is_right(pool):
    for size in (2, 3):
        sharded.check(pool, size, *(Problem(20, "auto", layout) for layout in shard.LAYOUTS))
