"""The operator over the GPUs of one host: the ring in their memory, other exchanges over NCCL."""

import contextlib
import gc
import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp import replay
from lasp.exchange import comm, hosts, symmetric_memory
from tests.distributed import Pool
from tests.gpu import torchrun
from tests.lasp import cases, sharded, test_previous_tokens
from tests.lasp.exchange import test_consistency, test_messages
from tests.lasp.sharded import LAYOUTS, Problem

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA GPUs of one host"
)


@pytest.mark.parametrize(
    "field, known",
    [("dtype", True), ("heads", False), ("decay", True), ("exchange", True), ("lengths", False)],
)
def test_disagreement_is_a_value_error_on_both(pool, field, known):
    test_consistency.check_disagreement(pool, field, known, size=2)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "kept"])
def test_checkpointing(pool, how):
    sends = {"reentrant": [2, 1], "non-reentrant": [2, 1], "kept": [1, 1]}[how]
    results = pool.run(test_messages.checkpointed, how, size=2)
    assert all(equal for equal, _ in results)
    assert [count for _, count in results] == sends


@pytest.fixture(scope="module")
def everyone():
    """A process on every GPU."""
    size = torch.cuda.device_count()
    pool = Pool((size,), backend="nccl")
    yield pool
    pool.stop()


def by_message(group, problems):
    """The same with messages in place of memory."""
    with mock.patch("lasp.exchange.ring.find_buffer", return_value=None):
        return sharded.run_all(group, problems)


class ByMessage:
    """A pool whose ranks send messages."""

    def __init__(self, pool):
        self._pool = pool

    def run(self, function, problems, **options):
        return self._pool.run(by_message, problems, **options)


@pytest.mark.parametrize("pool_of", [ByMessage, lambda pool: pool], ids=["messages", "memory"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ring_of_all_gpus(everyone, layout, pool_of):
    size = torch.cuda.device_count()
    uneven = (5000 - 2 * (size - 1), *(2,) * (size - 1))
    empty = (*(0,) * (size - 1), 5000)
    documents = (0, 1700, 1700, 5000)
    on_boundaries = sharded.documents_that("on", sharded.even(5000, size, layout), layout)
    cuts = [(None, None), (uneven, documents), (empty, None), (None, on_boundaries)]
    problems = [Problem(5000, "ring", layout, *cut, dtype=torch.float32) for cut in cuts]
    as_in_training = dict(initial=False, final=False, dtype=torch.float32)
    problems.append(Problem(5000, "ring", layout, documents=documents, **as_in_training))
    # One hop: nothing passes.
    problems.append(Problem(5000, "ring", layout, dtype=torch.float32, rates=-1.0))
    sharded.check(pool_of(everyone), size, *problems, device="cuda")


def delayed_bits(group, layout, trials):
    """Whether all trials give the same bits, host and GPU late at random; and if by peer memory."""
    rank, cuda = dist.get_rank(group), torch.device("cuda")
    q, k, v, _, _ = (
        None if x is None else x.to(cuda)
        for x in cases.make_inputs(512, B=1, H=16, D=128, E=128, dtype=torch.float32)
    )
    log_decay = -torch.logspace(-5, -2, 16, device=cuda)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    chance = torch.Generator().manual_seed(rank)

    def be_late():
        torch.cuda._sleep(int(torch.randint(0, 300_000, (), generator=chance)))

    first = None
    for _ in range(trials):
        be_late()
        o = lasp.lightning_attention(*leaves, log_decay, group=group, layout=layout)
        be_late()
        found = [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]
        first = first or found
        if not all(torch.equal(now, before) for now, before in zip(found, first, strict=True)):
            return False, True
    return True, bool(symmetric_memory._buffers[group])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_delays_change_no_bit(everyone, layout):
    size = torch.cuda.device_count()
    assert everyone.run(delayed_bits, layout, 200, size=size) == [(True, True)] * size


@contextlib.contextmanager
def pretended_hosts(group, places):
    """The ranks are on these hosts; gives the ranks to which this one sends messages."""
    rank, targets = dist.get_rank(group), []

    def counting(state, target, group):
        targets.append(dist.get_group_rank(group, target))
        return comm.send(state, target, group)

    # What was recorded before is of one host.
    replay.forget(group)
    with (
        mock.patch.object(hosts, "_host_number", return_value=places[rank]),
        mock.patch.object(symmetric_memory, "_buffers", {}),
        mock.patch.object(symmetric_memory, "_parts", {}),
        mock.patch("lasp.exchange.ring.send", counting),
    ):
        yield targets
        torch.cuda.synchronize()
    replay.forget(group)


def over_hosts(group, places, layout):
    """Whether results have the bits of one host's memory; ranks to which messages went; ranks of
    this one's buffers."""
    size = len(places)
    cuts = [None, (5000 - 2 * (size - 1), *(2,) * (size - 1)), (*(0,) * (size - 1), 5000)]
    documents = (0, 1700, 1700, 5000)
    problems = [
        Problem(5000, "ring", layout, cut, each, dtype=torch.float32)
        for cut in cuts
        for each in (None, documents)
    ]
    problems.append(Problem(5000, "ring", layout, dtype=torch.float32, rates=-1.0))
    # As large as in training: several programs, and chunks of the state.
    problems.append(Problem(2048, "ring", layout, dtype=torch.float32, heads=(16, 128, 128)))
    one = sharded.run_all(group, problems)
    with pretended_hosts(group, places) as targets:
        several = sharded.run_all(group, problems)
        ranks = {
            tuple(buffer.ranks) for buffer in symmetric_memory._buffers[group].values() if buffer
        }
    equal = all(
        torch.equal(now[name], before[name])
        for now, before in zip(several, one, strict=True)
        for name in before
    )
    return equal, sorted(set(targets)), sorted(ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hosts_of_several_gpus_change_no_bit(everyone, layout):
    size = torch.cuda.device_count()
    if size < 4:
        pytest.skip("needs four CUDA GPUs of one host")
    half = size // 2
    outcomes = everyone.run(over_hosts, (0,) * half + (1,) * (size - half), layout, size=size)
    sides = [tuple(range(half)), tuple(range(half, size))]
    for rank, (equal, targets, ranks) in enumerate(outcomes):
        assert equal, rank
        assert targets == {half - 1: [half], half: [half - 1]}.get(rank, [])
        assert ranks == [sides[rank >= half]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hosts_of_one_gpu_send_messages(everyone, layout):
    """On two ranks no state is multiplied by messages or the kernel, so the bits are equal."""
    size = torch.cuda.device_count()
    outcomes = everyone.run(over_hosts, tuple(range(size)), layout, size=size)
    for rank, (equal, targets, ranks) in enumerate(outcomes):
        assert equal or size > 2
        assert targets == [r for r in (rank - 1, rank + 1) if 0 <= r < size]
        assert ranks == []


def delayed_bits_over_hosts(group, places, layout, trials):
    with pretended_hosts(group, places):
        return delayed_bits(group, layout, trials)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_delays_change_no_bit_over_hosts(everyone, layout):
    size = torch.cuda.device_count()
    places = tuple(2 * rank // size for rank in range(size))
    outcomes = everyone.run(delayed_bits_over_hosts, places, layout, 100, size=size)
    assert outcomes == [(True, size > 2)] * size


@pytest.mark.parametrize("hosts_of", ["one host", "two hosts"])
def test_processes_that_see_one_gpu_each_use_its_neighbours_memory(hosts_of):
    """Where the GPUs reach each other; else they send messages."""
    size = torch.cuda.device_count()
    half = size // 2 if hosts_of == "two hosts" else size
    out, _ = torchrun.run(size, "tests/gpu/run_one_gpu_each.py", "0" * half + "1" * (size - half))
    lines = [each.split("report: ")[1] for each in out.splitlines() if "report: " in each]
    reports = {report["rank"]: report for report in map(json.loads, lines)}
    assert sorted(reports) == list(range(size))
    for rank, report in reports.items():
        assert report["error"] < 2e-6, report
        side = list(range(half)) if rank < half else list(range(half, size))
        reached = all(torch.cuda.can_device_access_peer(a, b) for a in side for b in side if a != b)
        wanted = [side] if reached and len(side) > 1 else []
        assert report["ranks"] == wanted * len(report["ranks"]) and bool(report["ranks"]) == bool(
            wanted
        ), report


def replayed(group):
    """Whether a captured forward and backward gives on new inputs what a plain one does."""
    inputs = cases.make_inputs(300, B=1, H=4, D=64, E=64, dtype=torch.float32, state=False)[:4]
    q, k, v, log_decay = (x.cuda() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both():
        o = lasp.lightning_attention(*leaves, log_decay, group=group)
        return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog looks at events of its own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = both()
    with torch.no_grad():
        for x in leaves:
            x.mul_(1 + dist.get_rank(group))
    for _ in range(3):
        graph.replay()
    return all(torch.equal(now, after) for now, after in zip(found, both(), strict=True))


def test_a_cuda_graph_holds_the_exchange(everyone):
    size = torch.cuda.device_count()
    assert everyone.run(replayed, size=size) == [True] * size


def memory_of_an_exchange(group, H):
    """States of [1, H, 128, 128] that a group's first exchange leaves allocated."""
    k = torch.randn(1, 256, H, 128, device="cuda")
    log_decay = torch.full((H,), -1e-3, device="cuda")
    lasp.lightning_attention(k, k, k, log_decay)
    torch.cuda.synchronize()
    # What earlier tests left in reference cycles must not be freed in between.
    gc.collect()
    free_before = torch.cuda.mem_get_info()[0]
    before = torch.cuda.memory_allocated()
    lasp.lightning_attention(k, k, k, log_decay, group=group)
    torch.cuda.synchronize()
    mapped = symmetric_memory._buffers[group][k.device, H * 128 * 128]
    assert free_before >= torch.cuda.mem_get_info()[0]
    kept = mapped._memory.numel() * 8 + torch.cuda.memory_allocated() - before
    return kept / (H * 128 * 128 * 4)


def test_a_buffer_is_four_states_for_any_number_of_ranks(everyone):
    size = torch.cuda.device_count()
    for states in everyone.run(memory_of_an_exchange, 8, size=size):
        assert 4 <= states < 4.1


def in_two_groups(group):
    """Exchanges of two sizes and in both directions, queued without waiting for any."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    total = 0.0
    for H in (2, 16, 2, 16):
        k = torch.ones(1, 64, H, 128, device="cuda").requires_grad_()
        o = lasp.lightning_attention(k, k, k, None, group=group, scale=1 / 128)
        (grad,) = torch.autograd.grad(o[0, -1, 0, 0] if rank == size - 1 else o.sum() * 0, k)
        total += float(o[0, -1, 0, 0].detach()) + 0 * float(grad.sum())
    return total / 4


def test_sizes_do_not_disturb_each_other(everyone):
    size = torch.cuda.device_count()
    found = everyone.run(in_two_groups, size=size)
    assert found == pytest.approx([64.0 * (rank + 1) for rank in range(size)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_previous_tokens_over_nccl(everyone, layout):
    size = torch.cuda.device_count()
    lengths = [sharded.even(40 * size, size, layout), (8, *(0, 2) * size)[:size]]
    problems = [(layout, cut, None, count) for cut in lengths for count in (1, 3)]
    problems += [
        (layout, cut, sharded.documents_that(meet, cut, layout), 3)
        for cut in lengths
        for meet in ("on", "across", "both")
    ]
    test_previous_tokens.check(everyone, size, problems, torch.float32, bound=1e-6)
    test_previous_tokens.check(everyone, size, problems[:2], torch.bfloat16, bound=1e-2)
