"""A decay per token on a GPU: long sequences against float64, equal bits, graphs, recordings."""

import itertools

import pytest
import torch

import lasp
from lasp import replay
from lasp.ops import chunked
from lasp.ops.triton.scan import ScanPlan
from tests.lasp import cases
from tests.lasp.ops.triton.launch_constants import launch_constants

NAMES = ("o", "dq", "dk", "dv", "dlog_decay")
# With Triton's scan, and with the Hopper scan where the GPU is one.
LENGTHS = [1024, 8192]


def make_inputs(T, H=16, seed=0, weakest=-1e-5, strongest=-0.05, D=128):
    """(q, k, v, log_decay) that need gradients, and do; decays of every token between these two."""
    generator = torch.Generator("cuda").manual_seed(seed)
    options = dict(device="cuda", generator=generator)
    q, k, v, do = (torch.randn(1, T, H, D, **options).div(8).bfloat16() for _ in range(4))
    spread = torch.rand(1, T, H, **options)
    log_decay = -((-weakest) ** (1 - spread)) * (-strongest) ** spread
    return [x.requires_grad_() for x in (q, k, v, log_decay)], do


def run(leaves, do, **options):
    o = lasp.lightning_attention(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def in_float64(leaves, do, **options):
    """The same in chunks of plain torch, whose memory grows with the tokens alone."""
    q, k, v, log_decay = (x.detach().double() for x in leaves)
    do = do.double()
    o = chunked.scan(q, k, v, log_decay, scale=1.0, **options)
    dq, q_dots = chunked.scan(do, v, k, log_decay, scale=1.0, dot_with=q, **options)
    options |= dict(with_dots=True)
    dk, dv, k_dots = chunked.scan_dkdv(q, k, v, do, log_decay, scale=1.0, **options)
    options.pop("with_dots")
    return [o, dq, dk, dv, chunked.decay_gradient(q_dots, k_dots, log_decay, **options)]


def check(found, wanted, bound):
    for name, x, want in zip(NAMES, found, wanted, strict=True):
        # By head: one of large values would hide the others.
        for h in range(x.shape[2]):
            error = cases.relative_error(x[:, :, h], want[:, :, h])
            assert error <= bound, f"{name}, head {h}: {error:.3g}, allowed {bound:.3g}"


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def hopper_launches(monkeypatch):
    """An entry for every launch of the Hopper scan."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    seen, arguments = [], ScanPlan.arguments

    def noting(plan, *args):
        seen.extend([1] * plan.describes)
        return arguments(plan, *args)

    monkeypatch.setattr(ScanPlan, "arguments", noting)
    replay.forget()
    yield seen
    replay.forget()


@pytest.mark.parametrize("weakest", [-1e-6, -1e-2], ids=["weak", "strong"])
def test_131072_tokens_equal_float64(weakest, hopper_launches):
    leaves, do = make_inputs(131072, H=4, weakest=weakest, strongest=200 * weakest)
    found = run(leaves, do)
    # o; dq; dk with dv.
    assert len(hopper_launches) == 3
    check(found, in_float64(leaves, do), 0.03)


def test_packed_documents_equal_float64(hopper_launches):
    boundaries = (0, 1, 65, 65, 700, 20000, 32768)
    leaves, do = make_inputs(32768, H=8)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    found = run(leaves, do, cu_seqlens=cu_seqlens)
    assert len(hopper_launches) == 3
    check(found, in_float64(leaves, do, cu_seqlens=boundaries), 0.03)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 4097])
def test_short_sequences_equal_float64_in_the_hopper_scan(T, hopper_launches):
    with launch_constants(LARGE_VALUES=0):
        leaves, do = make_inputs(T, H=5, strongest=-2.0)
        found = run(leaves, do)
    assert len(hopper_launches) == 3
    truth = in_float64(leaves, do)
    if T == 1:
        # Nothing comes before the token: what is left of its terms is rounding.
        assert not truth.pop().any() and found.pop().abs().max() < 1e-3
        for name, x, want in zip(NAMES[:4], found, truth, strict=True):
            assert cases.relative_error(x, want) <= 0.03, name
    else:
        check(found, truth, 0.03)


@pytest.mark.parametrize("boundaries", [None, (0, 1, 65, 65, 700, 20000, 32768)])
def test_heads_of_64_equal_float64(boundaries):
    leaves, do = make_inputs(32768, H=8, D=64, strongest=-2.0)
    options = {}
    if boundaries is not None:
        options["cu_seqlens"] = torch.tensor(boundaries, dtype=torch.int32)
    found = run(leaves, do, **options)
    assert equal(found, run(leaves, do, **options))
    check(found, in_float64(leaves, do, **options | dict(cu_seqlens=boundaries)), 0.03)


def test_heads_may_share_keys_and_queries():
    leaves, do = make_inputs(2000)
    shared = [x.detach()[:, :, :1].clone().requires_grad_() for x in leaves[:2]]
    wide = [x.expand(-1, -1, 16, -1) for x in shared]
    o = lasp.lightning_attention(*wide, *leaves[2:])
    found = torch.autograd.grad(o, [*shared, *leaves[2:]], do)
    want = in_float64([*wide, *leaves[2:]], do)
    want = [want[0], *(x.sum(2, keepdim=True) for x in want[1:3]), *want[3:]]
    for name, x, truth in zip(NAMES, [o, *found], want, strict=True):
        assert x.shape == truth.shape
        assert cases.relative_error(x.detach(), truth) <= 0.03, name


@pytest.mark.parametrize("T", [*LENGTHS, 131072])
def test_the_same_bits_every_time(T):
    leaves, do = make_inputs(T)
    wanted = run(leaves, do)
    for _ in range(20):
        assert equal(run(leaves, do), wanted)


@pytest.mark.parametrize("T", LENGTHS)
def test_repeated_calls_read_the_decays_of_their_own(T):
    """In new memory, and in the same memory changed in place: nothing holds old sums."""
    sets = [make_inputs(T, seed=seed) for seed in range(3)]
    wanted = []
    for each in sets:
        replay.forget()
        wanted.append(run(*each))
    for (*_, before), (*_, after) in itertools.pairwise(wanted):
        assert not torch.equal(before, after)
    replay.forget()
    for _ in range(3):
        for each, of_each in zip(sets, wanted, strict=True):
            assert equal(run(*each), of_each)
    (*qkv, log_decay), do = sets[0]
    others = [log_decay.detach() * factor for factor in (1.0, 3.0, 0.1)]
    replay.forget()
    wanted = [run([*qkv, other.requires_grad_()], do) for other in others]
    held = log_decay.detach().clone().requires_grad_()
    for _ in range(3):
        for other, of_other in zip(others, wanted, strict=True):
            with torch.no_grad():
                held.copy_(other)
            assert equal(run([*qkv, held], do), of_other)


@pytest.mark.parametrize("T", LENGTHS)
def test_a_graph_computes_with_the_decays_of_its_replay(T):
    leaves, do = make_inputs(T)
    *qkv, log_decay = leaves
    others = [log_decay.detach() * factor for factor in (1.0, 5.0, 0.2)]
    replay.forget()
    wanted = [run([*qkv, other.requires_grad_()], do) for other in others]
    assert not torch.equal(wanted[0][0], wanted[1][0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            run(leaves, do)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(leaves, do)
    replay.forget()
    torch.cuda.empty_cache()
    for other, of_other in zip(others, wanted, strict=True):
        with torch.no_grad():
            log_decay.copy_(other)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        assert equal(captured, of_other)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("bad", [1e-30, 0.5, float("inf"), float("nan")])
def test_values_above_0_give_nan_from_there_on(T, bad):
    """The host does not wait for the values of a GPU, so a call cannot refuse them."""
    (q, k, v, log_decay), _ = make_inputs(T, seed=1)
    log_decay = log_decay.detach().clone()
    good = lasp.lightning_attention(q, k, v, log_decay)
    place = T // 2 + 7
    log_decay[0, place, 3] = bad
    o, state = lasp.lightning_attention(q, k, v, log_decay, output_final_state=True)
    assert o[0, place:, 3].isnan().all() and state[0, 3].isnan().all()
    good, o = (torch.cat([x[:, :, :3], x[:, :, 4:]], dim=2) for x in (good, o))
    assert torch.equal(o, good)


@pytest.mark.parametrize("T", LENGTHS)
def test_a_reset_is_the_start_of_a_document(T):
    (q, k, v, log_decay), do = make_inputs(T)
    starts = [T // 3, T // 2, T // 2 + 1]
    reset = log_decay.detach().clone()
    reset[:, starts] = -torch.inf
    cu_seqlens = torch.tensor([0, *starts, T], dtype=torch.int32)
    found = run([q, k, v, reset.requires_grad_()], do)
    wanted = run([q, k, v, log_decay], do, cu_seqlens=cu_seqlens)
    assert all(x.isfinite().all() for x in found)
    largest = wanted[4].abs().max()
    assert (found[4][:, starts].abs() <= 0.01 * largest).all()
    check(found, wanted, 0.03)
