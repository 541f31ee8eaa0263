"""Softmax attention over ranks: every rank, every gradient, against the definition on one."""

import pytest
import torch
import torch.distributed as dist

import lasp
from parallel import activation_checkpoint
from tests.lasp.cases import assert_close, relative_error
from tests.lasp.sharded import positions_of
from tests.operator.variants import cut

DOCUMENTS = {
    None: None,
    "inside": (0, 0.13, 0.4, 0.55, 0.9, 1),
    "on boundaries": (0, 0.25, 0.5, 0.5, 0.75, 1),
    "across": (0, 0.05, 0.97, 1),
}


def make_inputs(T, *, B=2, H=4, G=2, D=6, dtype=torch.float64, past=0):
    """(q, k, v, do), random; k and v hold `past` tokens more."""
    generator = torch.Generator().manual_seed(T)
    shapes = (B, T, H, D), (B, past + T, G, D), (B, past + T, G, D), (B, T, H, D)
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def make_offsets(T, documents):
    where = DOCUMENTS[documents]
    return None if where is None else torch.tensor([round(x * T) for x in where], dtype=torch.int32)


def results(function, q, k, v, do, **options):
    """o and all gradients of an implementation, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = function(*leaves, **options)
    grads = torch.autograd.grad(o, leaves, do)
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *grads), strict=True))


def definition(inputs, **options):
    return results(lasp.reference.softmax, *(x.double() for x in inputs), **options)


def assert_close_or_zero(actual, truth, bound, what=""):
    """`assert_close`, but where the truth is zero, as the gradient of q with one key, kernels of
    some machines leave rounding of its terms."""
    scale = max((x.double().norm() for x in truth.values()), default=0)
    for name, x in truth.items():
        if not x.any():
            assert actual[name].double().norm() <= bound * scale, f"{what} {name}"
    rest = [name for name, x in truth.items() if x.any()]
    pairs = ({name: each[name] for name in rest} for each in (actual, truth))
    assert actual.keys() == truth.keys()
    assert_close(*pairs, bound, what)


def positions(lengths, layout):
    return [torch.tensor(each, dtype=torch.long) for each in positions_of(lengths, layout)]


def sharded(group, cases, dtype):
    """This rank's part of each case: (layout, lengths, documents, whether lengths are told)."""
    rank = dist.get_rank(group)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    outcomes = []
    for layout, lengths, documents, told in cases:
        T = sum(lengths)
        here = positions(lengths, layout)[rank]
        inputs = make_inputs(T, B=1 if documents else 2, dtype=dtype)
        mine = results(
            lasp.softmax_attention,
            *(x[:, here].to(device) for x in inputs),
            cu_seqlens=make_offsets(T, documents),
            group=group,
            layout=layout,
            shard_lengths=lengths if told else None,
        )
        outcomes.append({name: x.cpu() for name, x in mine.items()})
    return outcomes


def check(pool, size, cases, dtype=torch.float64, bound=1e-13):
    outcomes = pool.run(sharded, cases, dtype, size=size)
    for number, (layout, lengths, documents, _) in enumerate(cases):
        T = sum(lengths)
        inputs = make_inputs(T, B=1 if documents else 2, dtype=dtype)
        truth = definition(inputs, cu_seqlens=make_offsets(T, documents))
        for rank, here in enumerate(positions(lengths, layout)):
            wanted = {name: x[:, here] for name, x in truth.items()}
            what = f"{layout} {lengths} {documents}, rank {rank}"
            assert_close_or_zero(outcomes[rank][number], wanted, bound, what)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_ranks_equal_the_definition(pool, layout, size):
    cases = [
        (layout, cut(how, T, size, layout), None, (how == "even") == (layout == "contiguous"))
        for how in ("even", "uneven", "empty")
        for T in ((1, 2, 63, 100) if layout == "contiguous" else (2, 4, 100))
    ]
    check(pool, size, cases)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_packed_documents_over_ranks_equal_the_definition(pool, layout, size):
    lengths = [cut(how, 100, size, layout) for how in ("even", "uneven", "empty")]
    cases = [(layout, each, kind, False) for each in lengths for kind in DOCUMENTS if kind]
    check(pool, size, cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(pool, dtype):
    cases = [(layout, [64, 64, 64], None, False) for layout in ("contiguous", "zigzag")]
    inputs = make_inputs(192, dtype=dtype)
    # What plain torch loses in the same dtype, times three.
    plain, truth = results(lasp.reference.softmax, *inputs), definition(inputs)
    bound = 3 * max(relative_error(plain[name], truth[name]) for name in truth)
    check(pool, 3, cases, dtype, bound)


@pytest.mark.parametrize("T", [0, 1, 63, 100])
@pytest.mark.parametrize("past", [0, 1, 40])
def test_on_one_device(T, past, poisoned_memory):
    inputs = make_inputs(T, past=past)
    actual = results(lasp.softmax_attention, *inputs, scale=0.3)
    assert_close_or_zero(actual, definition(inputs, scale=0.3), 1e-13, f"{T} after {past}")


@pytest.mark.parametrize("documents", [kind for kind in DOCUMENTS if kind])
def test_documents_on_one_device(documents, poisoned_memory):
    offsets = make_offsets(100, documents)
    inputs = make_inputs(100, B=1)
    actual = results(lasp.softmax_attention, *inputs, cu_seqlens=offsets)
    assert_close_or_zero(actual, definition(inputs, cu_seqlens=offsets), 1e-13, documents)


def test_any_strides():
    q, k, v, do = make_inputs(30)
    strided = [x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v)]
    actual = results(lasp.softmax_attention, *strided, do.mean().expand_as(do))
    truth = definition((q, k, v, do.mean().expand_as(do)))
    assert_close_or_zero(actual, truth, 1e-13, "strided")


def test_scores_far_apart_join():
    """A part whose weights underflow beside the other's adds nothing, and no NaN."""
    q, k, v, do = make_inputs(40, past=25)
    k[:, :25] *= 200
    assert_close_or_zero(
        results(lasp.softmax_attention, q, k, v, do), definition((q, k, v, do)), 1e-11, ""
    )


def test_parts_of_long_sequences_join():
    """More tokens than are joined at a time; a few of them are compared."""
    past, T = 10, 16400
    q, k, v, _ = make_inputs(T, B=1, H=1, G=1, past=past)
    o = lasp.softmax_attention(q, k, v)
    for stop in (10, 16390, T):
        few = (q[:, stop - 10 : stop], k[:, : past + stop], v[:, : past + stop])
        assert relative_error(o[:, stop - 10 : stop], lasp.reference.softmax(*few)) < 1e-13


def with_a_past(group):
    """The first rank also holds keys and values of tokens answered before."""
    rank, lengths = dist.get_rank(group), [4, 0, 9]
    q, k, v, do = make_inputs(13, past=20)
    here = positions(lengths, "contiguous")[rank]
    keys = torch.arange(24) if rank == 0 else here + 20
    return results(
        lasp.softmax_attention, q[:, here], k[:, keys], v[:, keys], do[:, here], group=group
    )


def test_a_past_on_the_first_rank(pool):
    outcomes = pool.run(with_a_past, size=3)
    joined = {name: torch.cat([of[name] for of in outcomes], 1) for name in outcomes[0]}
    assert_close_or_zero(joined, definition(make_inputs(13, past=20)), 1e-13, "past")


class Attend(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, q, k, v):
        return lasp.softmax_attention(q, k, v, group=self.group, shard_lengths=(32, 32))


def collectives(call):
    """What `call` returns, and the names of the collectives that it runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    return result, sorted(e.name for e in profile.events() if e.name.startswith("c10d::"))


def collectives_of(group, how):
    """Those of the forward, those of the backward, and whether gradients are the plain ones."""
    q, k, v, do = (x.chunk(2, 1)[dist.get_rank(group)] for x in make_inputs(64))
    plain = results(lasp.softmax_attention, q, k, v, do, group=group)
    attend = Attend(group)
    if how == "kept":
        attend = activation_checkpoint.checkpointed(attend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, forward = collectives(lambda: attend(*leaves))
    grads, backward = collectives(lambda: torch.autograd.grad(o, leaves, do))
    same = all(
        torch.equal(a, plain[name]) for a, name in zip(grads, ("dq", "dk", "dv"), strict=True)
    )
    return forward, backward, same


@pytest.mark.parametrize("how", ["plain", "kept"])
def test_keys_and_values_travel_once_and_recomputation_adds_nothing(pool, how):
    gather, swap = "c10d::_allgather_base_", "c10d::alltoall_base_"
    expected = ([gather], [gather, swap], True)
    assert pool.run(collectives_of, how, size=2) == [expected] * 2


def within_ranks(group):
    """Documents that end at the boundaries of ranks: no rank needs another's keys."""
    cases = [("contiguous", [25] * 4, "on boundaries", True)]
    return collectives(lambda: sharded(group, cases, torch.float64))


def test_documents_within_ranks_send_nothing(pool):
    inputs = make_inputs(100, B=1)
    truth = definition(inputs, cu_seqlens=make_offsets(100, "on boundaries"))
    for rank, (outcome, names) in enumerate(pool.run(within_ranks, size=4)):
        assert names == []
        wanted = {name: x[:, 25 * rank : 25 * rank + 25] for name, x in truth.items()}
        assert_close_or_zero(outcome[0], wanted, 1e-13, f"rank {rank}")


def test_compiles_without_a_graph_break():
    compiled = torch.compile(lasp.softmax_attention, backend="aot_eager", fullgraph=True)
    inputs = make_inputs(30)
    assert_close_or_zero(results(compiled, *inputs), definition(inputs), 1e-13, "compiled")


def call(**changes):
    q, k, v, _ = make_inputs(10)
    return lasp.softmax_attention(**(dict(q=q, k=k, v=v) | changes))


x = torch.zeros
BAD = {
    "heads": (dict(q=x(2, 10, 3, 6)), "multiple of those of k"),
    "k shorter than q": (dict(q=x(2, 11, 4, 6)), "S >= T"),
    "v of another size": (dict(v=x(2, 10, 2, 7)), "do not fit"),
    "dtypes": (dict(q=x(2, 10, 4, 6)), "share one dtype"),
    "layout": (dict(layout="spiral"), "'spiral'"),
    "scale": (dict(scale="1"), "scale is '1'"),
    "packed batch": (dict(cu_seqlens=torch.tensor([0, 10])), "packed documents need batch 1"),
    "list": (dict(k=[1]), "k is list"),
    "past in zigzag": (dict(q=x(2, 8, 4, 6).double(), layout="zigzag"), "neither"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def bad_on_one_rank(group, what):
    rank = dist.get_rank(group)
    q, k, v, _ = make_inputs(10, B=1)
    options = {
        "layout": dict(layout="zigzag" if rank else "contiguous"),
        "odd": dict(layout="zigzag"),
        "lengths": dict(shard_lengths=(10, 11)),
        "documents": dict(cu_seqlens=torch.tensor([0, 20 if rank else 19, 20])),
        "end": dict(cu_seqlens=torch.tensor([0, 21])),
        "gradient": {},
    }[what]
    if what == "odd" and rank:
        q, k, v = (x[:, :9] for x in (q, k, v))
    q.requires_grad_(what == "gradient" and rank == 0)
    lasp.softmax_attention(q, k, v, group=group, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layout", "disagree on layout"),
        ("odd", "holds 9 tokens: the zigzag layout is two equal chunks"),
        ("lengths", r"shard_lengths is \[10, 11\]"),
        ("documents", "disagree on cu_seqlens"),
        ("end", "ends at 21"),
        ("gradient", "disagree on whether a gradient"),
    ],
)
def test_bad_input_of_one_rank_is_an_error_on_all(pool, what, message):
    for outcome in pool.outcomes(bad_on_one_rank, what, size=2):
        with pytest.raises(ValueError, match=message):
            raise outcome
