"""The operator over ranks: every rank, every gradient, against one rank's float64 definition."""

import itertools
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp import shard
from lasp.ops import chunked
from tests.distributed import Pool
from tests.lasp import cases, sharded
from tests.lasp.sharded import METHODS, Problem

SIZES = (1, 2, 3, 4)
# Tokens of every rank: even ones and odd ones (in zigzag twice that), empty ones everywhere.
UNEVEN = {
    1: [(31,)],
    2: [(30, 1), (0, 21)],
    3: [(0, 9, 33), (17, 0, 4)],
    4: [(13, 0, 27, 0), (0, 0, 1, 20)],
    8: [(0, 5, 1, 9, 0, 0, 12, 3)],
}


@pytest.fixture(scope="module")
def eight_ranks():
    pool = Pool({8: tuple(range(8))})
    yield pool
    pool.stop()


def problems(size, layout, packed):
    """Even and uneven cuts, each with every exchange."""
    factor = 2 if layout == "zigzag" else 1
    cuts = [shard.split_lengths(60, size, layout)]
    cuts += [tuple(factor * length for length in lengths) for lengths in UNEVEN[size]]
    for i, lengths in enumerate(cuts):
        meets = ("on", "across", "both") if packed else (None,)
        for meet, method in itertools.product(meets, METHODS):
            documents = sharded.documents_that(meet, lengths, layout) if packed else None
            cut = lengths if i else None
            # Both forms of the operator, in turn.
            split = (METHODS.index(method) + i) % 2 == 0
            # With states from and to the outside; with none, as in training; with one of the two.
            for initial, final in ((True, True), (False, False), (split, not split)):
                yield Problem(
                    sum(lengths),
                    method,
                    layout,
                    cut,
                    documents,
                    initial=initial,
                    split=split,
                    final=final,
                )


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("layout", shard.LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_one_rank(pool, size, layout, packed):
    sharded.check(pool, size, *problems(size, layout, packed))


def test_equals_one_rank_on_eight(eight_ranks):
    every = [p for layout in shard.LAYOUTS for x in (False, True) for p in problems(8, layout, x)]
    sharded.check(eight_ranks, 8, *every, timeout=120)


@pytest.mark.parametrize("total", [1, 2, 3, 63, 1000])
def test_any_length_even_fewer_tokens_than_ranks(pool, total):
    sharded.check(pool, 4, Problem(total, initial=False), Problem(2 * total, layout="zigzag"))


@pytest.mark.parametrize("size", SIZES)
def test_in_float32(pool, size):
    each = [Problem(334, layout=layout, dtype=torch.float32) for layout in shard.LAYOUTS]
    sharded.check(pool, size, *each)


def test_where_all_heads_forget_what_enters(pool):
    # Every rank then sends before it has received.
    each = [Problem(90, m, layout, rates=-60.0) for m in METHODS for layout in shard.LAYOUTS]
    sharded.check(pool, 3, *each)


def final_state_gradients(group):
    """Each rank's own final state in the loss: its gradient reaches all earlier ranks."""
    q, k, v, log_decay, _ = cases.make_inputs(90, state=False)
    rank = dist.get_rank(group)
    here = slice(30 * rank, 30 * (rank + 1))
    leaves = [x[:, here].clone().requires_grad_() for x in (k, v)]
    _, final = lasp.lightning_attention(
        q[:, here], *leaves, log_decay, output_final_state=True, group=group
    )
    ((rank + 1) * final).sum().backward()
    return [x.grad for x in leaves]


def test_gradients_of_every_final_state(pool):
    results = pool.run(final_state_gradients, size=3)
    q, k, v, log_decay, _ = cases.make_inputs(90, state=False)
    k, v = k.requires_grad_(), v.requires_grad_()
    for rank, stop in enumerate((30, 60, 90)):
        _, state = lasp.reference.quadratic(q[:, :stop], k[:, :stop], v[:, :stop], log_decay)
        ((rank + 1) * state).sum().backward()
    for i, whole in enumerate((k, v)):
        joined = torch.cat([grads[i] for grads in results], dim=1)
        assert cases.relative_error(joined, whole.grad) < 1e-12


@pytest.mark.parametrize("layout", shard.LAYOUTS)
def test_final_states_of_documents_that_go_on_elsewhere(pool, layout):
    # Three documents, the second over all four ranks and both places of each.
    problem = Problem(40, layout=layout, documents=(0, 3, 38, 40))
    results = sharded.check(pool, 4, problem)
    q, k, v, log_decay, state, _ = problem.inputs()
    for rank, held in enumerate(problem.positions(4)):
        for n, (start, stop) in enumerate(itertools.pairwise(problem.documents)):
            last = max((t for t in held if start <= t < stop), default=None)
            actual = results[rank][0]["state"][n]
            if last is None:
                assert not actual.any()
                continue
            part = (x[:, start : last + 1] for x in (q, k, v))
            _, expected = lasp.reference.quadratic(
                *part, log_decay, initial_state=state[n : n + 1], scale=0.3
            )
            assert cases.relative_error(actual, expected[0]) < 1e-12


def rows_of_states(group, problem):
    """How many states each step of the arithmetic is given or gives."""
    rows = []

    def noting(name):
        function = getattr(chunked, name)

        def call(*args, initial_state=None, **kwargs):
            if initial_state is not None:
                kwargs["initial_state"] = initial_state
            results = function(*args, **kwargs)
            states = results[1] if name == "chunk_states" else initial_state
            rows.append(0 if states is None else len(states))
            return results

        return mock.patch.object(chunked, name, call)

    with noting("chunk_states"), noting("scan"), noting("scan_dkdv"):
        sharded.run(group, problem)
    return rows


@pytest.mark.parametrize(("layout", "most"), [("contiguous", 2), ("zigzag", 3)])
def test_states_do_not_grow_with_the_documents(pool, layout, most):
    # One across every border between ranks, and many that are whole on one.
    documents = (0, *range(1, 60, 2), 60)
    problem = Problem(60, layout=layout, documents=documents, initial=False, final=False)
    for rows in pool.run(rows_of_states, problem, size=3):
        # Forward and backward: states, o or dq, dk and dv (one after the other).
        assert len(rows) >= 5 and 0 < max(rows) <= most


def infinite_document(group, method):
    """The output of a document that follows one with an infinite state."""
    rank = dist.get_rank(group)
    q, k, v, log_decay, _ = cases.make_inputs(4, state=False)
    if rank == 0:
        v[:] = torch.inf
    cu_seqlens = torch.tensor([0, 6, 12], dtype=torch.int32)
    o = lasp.lightning_attention(
        q, k, v, log_decay, cu_seqlens=cu_seqlens, group=group, exchange=method
    )
    return bool(o[:, 2:].isfinite().all()), bool(o[:, :2].isfinite().any())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_leaks_from_one_document_into_the_next(pool, method):
    # The border lies inside rank 1's part.
    results = pool.run(infinite_document, method, size=3)
    assert results == [(False, False), (True, False), (True, True)]


def compiled(group, layout, documents, split):
    q, k, v, log_decay, _ = cases.make_inputs(20, dtype=torch.float32)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    options = dict(group=group, layout=layout, cu_seqlens=cu_seqlens)

    def layer(q, k, v):
        return lasp.lightning_attention(q * 2, k, v, log_decay, **options).sin()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = function(*leaves)
        o.sum().backward()
        results.append([o, *(x.grad for x in leaves)])
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "layout, documents, split",
    [("contiguous", None, False), ("zigzag", None, True), ("zigzag", (0, 7, 40), False)],
)
def test_compiles_without_a_graph_break(pool, layout, documents, split):
    assert all(pool.run(compiled, layout, documents, split, size=2, timeout=110))


def misfit(group, what):
    T = {"odd": 3, "length": 11}.get(what, 10)
    q, k, v, log_decay, state = cases.make_inputs(T)
    documents = {"short": (0, 8, 19), "length": (0, 8, 20)}.get(what)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    lengths = {"ranks": (10, 10, 10), "short": (10, 10), "number": (1.5, 2)}.get(what)
    layout = {"odd": "zigzag", "spiral": "spiral"}.get(what, "contiguous")
    options = dict(cu_seqlens=cu_seqlens, shard_lengths=lengths, layout=layout)
    if what == "gradient" and dist.get_rank(group) == 0:
        options["initial_state"] = state.requires_grad_()
    lasp.lightning_attention(q, k, v, log_decay, group=group, **options)


@pytest.mark.parametrize(
    "what, message",
    [
        ("odd", "holds 3 tokens in zigzag"),
        ("length", "holds 11 tokens, but its shard is 10"),
        ("ranks", "shard_lengths has 3 entries, the group 2 ranks"),
        ("short", "are 20 tokens together, but cu_seqlens ends at 19"),
        ("number", r"shard_lengths is \(1.5, 2\): give the tokens"),
        ("spiral", "layout is 'spiral': choose one of contiguous, zigzag"),
        ("gradient", "neither k nor v does"),
    ],
)
def test_cuts_that_do_not_fit(pool, what, message):
    for outcome in pool.outcomes(misfit, what, size=2):
        with pytest.raises(ValueError, match=message):
            raise outcome


def not_a_member(group):
    q, k, v, log_decay, _ = cases.make_inputs(5, state=False)
    # What `new_group` returns to ranks that are not in it.
    lasp.lightning_attention(q, k, v, log_decay, group=dist.GroupMember.NON_GROUP_MEMBER)


def test_a_group_that_this_rank_is_not_in(pool):
    (outcome,) = pool.outcomes(not_a_member, size=1)
    with pytest.raises(ValueError, match="not a member of `group`"):
        raise outcome


