"""The tokens before a rank's own, and their gradient, against indexing the whole sequence."""

import functools

import pytest
import torch
import torch.distributed as dist

import lasp
from parallel import activation_checkpoint
from tests.lasp.cases import assert_close, relative_error
from tests.lasp.exchange.test_messages import Sent
from tests.lasp.sharded import LAYOUTS, chunks_of, device_of, documents_that, even, positions_of
from tests.operator.test_tracing import Recorder, detached
from tests.poison import poison

COUNTS = (0, 1, 3, 5)


def make_inputs(total, count, num_chunks, dtype=torch.float64, batch=2):
    """(x of the whole sequence, gradients of the halos of all chunks), random."""
    generator = torch.Generator().manual_seed(total)
    shapes = (batch, total, 2, 3), (num_chunks, batch, count, 2, 3)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def definition(x, dhalos, count, chunks, documents=None):
    """(halos of all chunks, dx): the tokens that stand before each chunk in the whole sequence."""
    x = x.clone().requires_grad_()
    padded = torch.cat([x.new_zeros(x.shape[0], count, *x.shape[2:]), x], 1)
    halos = []
    for start, _ in chunks:
        first = max(d for d in documents or (0,) if d <= start)
        inside = torch.arange(start - count, start) >= first
        halos.append(padded[:, start : start + count] * inside[:, None, None])
    (dx,) = torch.autograd.grad(halos, x, list(dhalos))
    return torch.stack(halos).detach(), dx


def sharded(group, problems, dtype=torch.float64):
    """[(halo, dx)] of this rank, one per problem: (layout, lengths, documents, count)."""
    rank, outcomes = dist.get_rank(group), []
    device = device_of(group)
    for layout, lengths, documents, count in problems:
        chunks = chunks_of(lengths, layout)
        x, dhalos = make_inputs(
            sum(lengths), count, len(sum(chunks, [])), dtype, 1 if documents else 2
        )
        here = torch.tensor(positions_of(lengths, layout)[rank], dtype=torch.long)
        x = x[:, here].to(device).requires_grad_()
        dhalo = torch.cat(list(dhalos.chunk(len(lengths))[rank]), 1).to(device)
        with poison():
            halo = lasp.exchange_previous_tokens(
                x,
                count,
                group=group,
                layout=layout,
                cu_seqlens=None if documents is None else torch.tensor(documents),
                shard_lengths=None if documents is None else lengths,
            )
            halo.backward(dhalo)
        outcomes.append((halo.detach().cpu(), x.grad.cpu()))
    return outcomes


def check(pool, size, problems, dtype=torch.float64, bound=1e-15):
    outcomes = pool.run(sharded, problems, dtype, size=size)
    for number, (layout, lengths, documents, count) in enumerate(problems):
        chunks = sum(chunks_of(lengths, layout), [])
        inputs = make_inputs(sum(lengths), count, len(chunks), dtype, 1 if documents else 2)
        halos, dx = definition(*(x.double() for x in inputs), count, chunks, documents)
        for rank, positions in enumerate(positions_of(lengths, layout)):
            halo, grad = outcomes[rank][number]
            mine = torch.cat(list(halos.chunk(size)[rank]), 1)
            what = f"{layout} {lengths} {documents}, {count} before rank {rank}"
            assert torch.equal(halo.double(), mine), what
            wanted = dx[:, torch.tensor(positions, dtype=torch.long)]
            assert_close(dict(dx=grad), dict(dx=wanted), bound, what)


def cuts(size, layout):
    """Lengths of the ranks: even, uneven, empty ones, and shorter than what is looked back."""
    unit = 2 if layout == "zigzag" else 1
    short = [[1, 1, 1, 1], [0, 1, 0, 2], [2, 0, 0, 7], [0, 0, 0, 0], [9, 0, 1, 0], [4, 1, 0, 3]]
    return [
        even(unit * 20, size, layout),
        *(tuple(unit * length for length in lengths[:size]) for lengths in short),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_get_the_tokens_before_theirs_and_return_the_gradient(pool, layout, size):
    check(pool, size, [(layout, cut, None, n) for cut in cuts(size, layout) for n in COUNTS])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_crosses_the_start_of_a_document(pool, layout, size):
    problems = [
        (layout, cut, documents_that(meet, cut, layout), count)
        for cut in cuts(size, layout)
        for meet in ("on", "across", "both")
        for count in (1, 3)
    ]
    check(pool, size, problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_travel_in_their_dtype(pool, dtype):
    check(pool, 3, [("contiguous", (9, 8, 7), None, 3)], dtype, bound=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_device_has_the_result_of_one_rank(layout):
    chunks = chunks_of((10,), layout)[0]
    for documents in (None, (0, 3, 10), (0, 5, 10)):
        x, dhalos = make_inputs(10, 3, len(chunks), batch=1)
        x.requires_grad_()
        cu_seqlens = None if documents is None else torch.tensor(documents)
        halo = lasp.exchange_previous_tokens(x, 3, layout=layout, cu_seqlens=cu_seqlens)
        halo.backward(torch.cat(list(dhalos), 1))
        halos, dx = definition(x.detach(), dhalos, 3, chunks, documents)
        assert torch.equal(halo, torch.cat(list(halos), 1))
        assert torch.equal(x.grad, dx)


def convolve(x, group, count=3, again=True):
    """Two causal convolutions, one after the other, the second over twice as many tokens."""
    before = lasp.exchange_previous_tokens(x, count, group=group)
    y = torch.cat([before, x], 1).unfold(1, count + 1, 1).mean(-1).sin()
    return convolve(y, group, 2 * count, again=False) + x if again else y


def convolved(group, how):
    """(relative errors of y and dx, messages of this rank) of several uses in one graph."""
    size = 1 if group is None else dist.get_world_size(group)
    whole, _ = make_inputs(10 * size, 0, 0)
    whole.requires_grad_()
    truth = convolve(whole, None).chunk(size, 1)
    sum(x.square().sum() for x in truth).backward()
    rank = dist.get_rank(group)
    x = whole.detach().chunk(size, 1)[rank].clone().requires_grad_()
    layer = functools.partial(convolve, group=group)
    if "kept" in how:
        layer = activation_checkpoint.checkpointed(Convolve(group))
    elif "reentrant" in how:
        layer = functools.partial(
            torch.utils.checkpoint.checkpoint, layer, use_reentrant=how == "reentrant"
        )
    if "compiled" in how:
        eager = layer
        layer = torch.compile(lambda x: eager(x), backend="aot_eager", fullgraph=True)
    with Sent() as sent:
        y = layer(x)
        y.square().sum().backward()
    errors = (
        relative_error(y.detach(), truth[rank].detach()),
        relative_error(x.grad, whole.grad.chunk(size, 1)[rank]),
    )
    return max(errors), len(sent.bytes)


class Convolve(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, x):
        return convolve(x, self.group)


@pytest.mark.parametrize(
    "how, sent",
    [
        # Two calls: all but the last rank send in each, all but the first return a gradient.
        ("plain", [2, 4, 2]),
        ("compiled", [2, 4, 2]),
        ("kept", [2, 4, 2]),
        ("kept compiled", [2, 4, 2]),
        # Plain checkpointing repeats the messages of the forward, on every rank alike.
        ("reentrant", [4, 6, 2]),
        ("non-reentrant", [4, 6, 2]),
    ],
)
def test_two_uses_in_one_graph(pool, how, sent):
    results = pool.run(convolved, how, size=3)
    assert max(error for error, _ in results) <= 1e-14
    assert [count for _, count in results] == sent


def messages(group, length, documents):
    x = torch.ones(1, length, 5, dtype=torch.float32, requires_grad=True)
    cu_seqlens = None if documents is None else length * torch.tensor(documents)
    with Sent() as forward:
        halo = lasp.exchange_previous_tokens(x, 3, group=group, cu_seqlens=cu_seqlens)
    with Sent() as backward:
        halo.sum().backward()
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("length", [4, 300])
def test_one_small_message_crosses_each_boundary(pool, length):
    message = 3 * 5 * 4
    results = pool.run(messages, length, None, size=3)
    assert results == [([message], []), ([message], [message]), ([], [message])]
    # One document over ranks 1 and 2; the other boundaries are those of documents.
    results = pool.run(messages, length, (0, 1, 3, 4), size=4)
    assert results == [([], []), ([message], []), ([], [message]), ([], [])]


def delayed(group, problems, trials):
    with Sent(delay=0.001, seed=dist.get_rank(group)):
        return [sharded(group, problems) for _ in range(trials)]


def test_random_delays_change_no_bit(pool):
    problems = [
        ("contiguous", (1, 0, 2, 5), None, 3),
        ("zigzag", (2, 0, 2, 4), None, 3),
        ("zigzag", (4, 4, 4, 4), (0, 7, 16), 3),
    ]
    for trials in pool.run(delayed, problems, 30, size=4):
        for trial in trials[1:]:
            for now, before in zip(trial, trials[0], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def strided_without_gradient(group):
    """Tokens in any strides, under no_grad; and a gradient that is expanded."""
    rank = dist.get_rank(group)
    whole = torch.arange(2.0 * 8 * 3).view(2, 3, 8).transpose(1, 2)
    x = whole.chunk(2, 1)[rank]
    with torch.no_grad():
        halo = lasp.exchange_previous_tokens(x, 3, group=group)
    wanted = whole[:, 1:4] if rank else torch.zeros(2, 3, 3)
    leaf = x.clone().requires_grad_()
    lasp.exchange_previous_tokens(leaf, 3, group=group).sum().backward()
    dx = torch.zeros(2, 4, 3)
    dx[:, 1:] = 1 - rank
    return torch.equal(halo, wanted) and torch.equal(leaf.grad, dx)


def test_any_strides_and_no_gradient(pool):
    assert pool.run(strided_without_gradient, size=2) == [True, True]


def test_the_operators_are_registered_soundly():
    x = torch.randn(2, 10, 4).requires_grad_()
    with Recorder() as recorder:
        lasp.exchange_previous_tokens(x, 3, layout="zigzag").sum().backward()
    assert recorder.names == ["lasp::halo_fwd", "lasp::halo_bwd"]
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, *torch.utils._pytree.tree_map(detached, (args, kwargs)))


def call(**changes):
    return lasp.exchange_previous_tokens(**(dict(x=torch.zeros(2, 9, 4), count=3) | changes))


BAD = {
    "list": (dict(x=[1]), "x is list"),
    "integers": (dict(x=torch.ones(2, 9, dtype=torch.int64)), "int64 .* floating point"),
    "no tokens": (dict(x=torch.ones(9)), r"\[9\]: it must be .*\[batch, tokens"),
    "no channels": (dict(x=torch.ones(2, 9, 0)), "no size but that of the tokens may be 0"),
    "negative": (dict(count=-1), "count is -1"),
    "fraction": (dict(count=1.5), "count is 1.5"),
    "layout": (dict(layout="spiral"), "'spiral'"),
    "odd": (dict(layout="zigzag"), "9 tokens in zigzag"),
    "packed batch": (dict(cu_seqlens=torch.tensor([0, 9])), "packed documents need batch 1"),
    "end": (dict(x=torch.ones(1, 9), cu_seqlens=torch.tensor([0, 8])), "ends at 8"),
    "lengths": (dict(shard_lengths=[1.5]), "shard_lengths is"),
    "group": (dict(group="ranks"), "group is str"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def bad_on_one_rank(group, what):
    rank = dist.get_rank(group)
    options = {
        "count": dict(count=3 + rank),
        "negative": dict(count=3 - 4 * rank),
        "dtype": dict(x=torch.ones(1, 9, 4, dtype=torch.float64 if rank else torch.float32)),
        "size": dict(x=torch.ones(1, 9, 4 + rank)),
        "layout": dict(x=torch.ones(1, 8, 4), layout=LAYOUTS[rank]),
        "odd": dict(x=torch.ones(1, 8 + rank, 4), layout="zigzag"),
        "documents": dict(cu_seqlens=torch.tensor([0, 17 + rank, 18])),
        "end": dict(cu_seqlens=torch.tensor([0, 17])),
        "lengths": dict(shard_lengths=(9, 9 + rank)),
        "gradient": dict(x=torch.ones(1, 9, 4).requires_grad_(rank == 0)),
    }[what]
    call(**(dict(x=torch.ones(1, 9, 4), group=group) | options))


@pytest.mark.parametrize(
    "what, message",
    [
        ("count", r"disagree on number of previous tokens \(rank 0: 3, rank 1: 4\)"),
        ("negative", "count is -1"),
        ("dtype", "disagree on dtype"),
        ("size", "disagree on sizes of x"),
        ("layout", "disagree on layout"),
        ("odd", "9 tokens in zigzag"),
        ("documents", "disagree on cu_seqlens"),
        ("end", "holds 9 tokens, but its shard is 8"),
        ("lengths", "disagree on shard_lengths|its shard is 10"),
        ("gradient", "disagree on whether a gradient is needed"),
    ],
)
def test_bad_input_of_one_rank_is_an_error_on_all(pool, what, message):
    for outcome in pool.outcomes(bad_on_one_rank, what, size=2):
        with pytest.raises(ValueError, match=message):
            raise outcome
