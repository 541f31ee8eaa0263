"""The ring in peer memory: the order of chunks, with messages for the kernel; and the choice."""

import contextlib
import itertools
import os
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import lasp
from lasp import exchange, shard
from lasp.exchange import ChunkChain, Transition, consistency, symmetric_memory
from tests.lasp import sharded
from tests.lasp.exchange.peer_memory import Messages, pretended_hosts
from tests.lasp.sharded import Problem


def run_in_memory(group, problems):
    """The results, how often a buffer was asked for, and how many states were sent."""
    made = Messages(group, range(dist.get_world_size(group)))
    with mock.patch("lasp.exchange.ring.find_buffer", return_value=made) as asked:
        results = [sharded.run(group, problem) for problem in problems]
    made.finish()
    return results, asked.call_count, made.sent


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


def found(group, hosts, wanted, reached, allocated, met, mapped):
    """(ranks of this rank's buffer, warnings, calls of the rendezvous).

    `hosts` has the host of every rank. The other arguments are the ranks that want a buffer, reach
    the others, can allocate it, have the same count of rendezvous as the others, and can map the
    others' memory.
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

        def connect(self, group, part, number):
            assert part.indices_differ
            connected.append(number)
            self.ranks = part.ranks
            if rank not in mapped:
                raise RuntimeError("no such memory")

    environment = {"LASP_PEER_MEMORY": "1" if rank in wanted else "0"}
    with (
        pretended_hosts(group, hosts, reached=rank in reached),
        mock.patch.object(symmetric_memory, "StateBuffer", Made),
        mock.patch.object(symmetric_memory, "_buffers", {}),
        mock.patch.object(symmetric_memory, "_parts", {}),
        mock.patch.object(symmetric_memory, "_rendezvous", int(rank not in met)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(symmetric_memory.warnings, "warn") as warned,
        mock.patch.object(consistency, "timeout_of", return_value=timedelta(seconds=90)),
    ):
        buffers = [symmetric_memory.find_buffer(group, local, lambda: None) for _ in range(2)]
        without = symmetric_memory.find_buffer(group, local, None)
    assert buffers[0] is buffers[1] and without is None
    assert buffers[0] is None or buffers[0].timeout == timedelta(seconds=90)
    return buffers[0] and tuple(buffers[0].ranks), warned.call_count, len(connected)


ABLE = ("wanted", "reached", "allocated", "met", "mapped")


def found_by_all(pool, hosts, unable, rank):
    able = {name: set(range(len(hosts))) for name in ABLE}
    if unable != "nobody":
        able[unable].remove(rank)
    return pool.run(found, hosts, *able.values(), size=len(hosts))


@pytest.mark.parametrize("unable", ["nobody", *ABLE])
def test_all_ranks_of_a_host_have_a_buffer_or_none(pool, unable):
    warned = unable in ("allocated", "met", "mapped")
    connected = unable in ("nobody", "mapped")
    ranks = (0, 1, 2) if unable == "nobody" else None
    outcomes = found_by_all(pool, (0, 0, 0), unable, 1)
    assert outcomes == [(ranks, int(warned), int(connected))] * 3


@pytest.mark.parametrize("unable", ["nobody", *ABLE])
def test_what_one_host_cannot_do_leaves_the_other_its_memory(pool, unable):
    """Unless a rank has turned it off: then the whole group sends messages."""
    warned = unable in ("allocated", "met", "mapped")
    one, other = found_by_all(pool, (0, 0, 1, 1), unable, 3)[1:3]
    assert one == (None, 0, 0) if unable == "wanted" else ((0, 1), 0, 1)
    mapped = unable in ("nobody", "mapped")
    assert other == ((2, 3) if unable == "nobody" else None, int(warned), int(mapped))


@pytest.mark.parametrize(
    "hosts, runs",
    [
        ((0, 1, 0, 1), [None] * 4),
        ((0, 1, 1, 0), [None, (1, 2), (1, 2), None]),
        ((5, 5, 5, 2), [(0, 1, 2)] * 3 + [None]),
    ],
)
def test_neighbours_on_one_host_share_memory(pool, hosts, runs):
    outcomes = found_by_all(pool, hosts, "nobody", None)
    assert outcomes == [(run, 0, int(run is not None)) for run in runs]


def test_torch_finds_the_ranks_of_a_host_by_name(pool):
    """With rank, size and store of their own, and only as long as they map their memory."""
    outcomes = pool.run(named, size=4)
    assert [outcome[:2] for outcome in outcomes] == [(0, 1), (0, 3), (1, 3), (2, 3)]
    names = [name for *_, name, _ in outcomes]
    assert len(set(names)) == 2 and len(set(names[1:])) == 1
    assert [seen for *_, seen in outcomes] == [[0], *[[1, 2, 3]] * 3]


def named(group):
    from torch._C import _distributed_c10d as c10d

    rank = dist.get_rank(group)
    ranks = range(1) if rank == 0 else range(1, 4)
    # Every name is used once: torch keeps some.
    numbers = consistency.gather_numbers(group, next(_numbers))
    with symmetric_memory._group_of(group, ranks, max(numbers)) as name:
        found = c10d._resolve_process_group(name)
        store = distributed_c10d._get_process_group_store(group)
        store = dist.PrefixStore(f"lasp.symmetric_memory.{ranks[0]}", store)
        key = f"rank {max(numbers)} "
        store.set(key + str(found.rank()), str(rank))
        seen = [int(store.get(key + str(r))) for r in range(found.size())]
    with pytest.raises(RuntimeError, match="Could not resolve"):
        c10d._resolve_process_group(name)
    return found.rank(), found.size(), name, seen


_numbers = itertools.count(1000)


@pytest.mark.parametrize("before", [None, "0"])
def test_torch_is_told_that_equal_indices_are_different_gpus(before):
    name = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
    with mock.patch.dict(os.environ, {} if before is None else {name: before}):
        with contextlib.suppress(KeyError), symmetric_memory._equal_indices():
            assert os.environ[name] == "1"
            raise KeyError
        assert os.environ.get(name) == before


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
    """The methods for few and for many ranks; in_memory: how many of the ranks share memory."""
    called = []
    buffer = mock.Mock(ranks=range(in_memory)) if in_memory else None

    def noting(name):
        def method(chain, transitions, **options):
            called.append(name)
            yield
            return [None] * len(transitions)

        return method

    patches = [
        mock.patch.object(exchange, n, noting(n)) for n in ("ring", "all_gather", "doubling")
    ]
    patches.append(mock.patch.object(exchange, "find_buffer", return_value=buffer))
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
    assert pool.run(chosen, 0, size=2) == [["ring"] * 4] * 2
    few_and_many = ["ring", "doubling", "all_gather", "doubling"]
    assert pool.run(chosen, 0, size=3) == [few_and_many] * 3
    assert pool.run(chosen, 2, size=3) == [few_and_many] * 3
    assert pool.run(chosen, 3, size=3) == [["ring", "doubling", "ring", "ring"]] * 3


def test_auto_is_right(pool):
    for size in (2, 3):
        sharded.check(pool, size, *(Problem(20, "auto", layout) for layout in shard.LAYOUTS))
