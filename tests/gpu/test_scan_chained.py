"""The chained scan: right against float64, the same bits every time, and it never gets stuck."""

import functools

import pytest
import torch

import lasp
from tests.gpu import test_launch
from tests.gpu.kernel_reference import head_errors, plain_attention
from tests.gpu.test_kernels import BF16, DECAYS, FP16, SCALE, kernels, make_operands  # noqa: F401
from tests.gpu.test_launch import run
from tests.lasp import cases

make_leaves = functools.partial(test_launch.make_leaves, D=128)
poisoned = pytest.mark.usefixtures("poisoned_memory")
# Nothing is left of a token after it, and least of all in float32.
MORE_DECAYS = (*DECAYS, -1e4, -3e38)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The list fills with the launches of the chained scan, which runs on Hopper GPUs alone."""
    from lasp.ops.triton import hopper, scan_chained

    if not hopper.has_gluon(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a Hopper GPU and the Triton that the kernel was tested with")
    seen, launch = [], scan_chained.launch
    monkeypatch.setattr(scan_chained, "launch", lambda *a, **k: (seen.append(1), launch(*a, **k)))
    return seen


def make_more_operands(T, D, E, dtype, B):
    """q, k, v, do and an initial state, with a head per decay."""
    first, second = (make_operands(T, D, E, dtype, B=B, seed=seed)[:5] for seed in range(2))
    heads = (2, 2, 2, 2, 1)
    more = len(MORE_DECAYS) - len(DECAYS)
    return [
        torch.cat([x, y.narrow(dim, 0, more)], dim)
        for x, y, dim in zip(first, second, heads, strict=True)
    ]


@poisoned
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "T, D, E, dtype, B",
    [
        (257, 128, 128, BF16, 2),
        (511, 96, 96, FP16, 4),
        (512, 96, 112, BF16, 1),
        (1000, 128, 128, BF16, 2),
        (1281, 80, 80, BF16, 2),
        (2047, 128, 128, FP16, 2),
        (2048, 128, 128, BF16, 2),
        (2049, 80, 128, BF16, 1),
        (4096, 128, 128, BF16, 1),
    ],
)
def test_against_float64(kernels, T, D, E, dtype, B, with_state, launches):  # noqa: F811
    q, k, v, do, S0 = make_more_operands(T, D, E, dtype, B)
    nothing = torch.zeros_like(S0)
    state = S0 if with_state else nothing
    options = dict(log_decay=torch.tensor(MORE_DECAYS, device="cuda"), scale=SCALE)
    truth = plain_attention(q, k, v, do, state, nothing, **options)
    plain = plain_attention(q, k, v, do, state, nothing, dtype=dtype, **options)
    state = S0 if with_state else None
    state_mT = S0.mT if with_state else None
    actual = dict(
        o=kernels.scan(q, k, v, initial_state=state, **options),
        dq=kernels.scan(do, v, k, initial_state=state_mT, **options),
    )
    gradients = kernels.scan_gradients(q, k, v, do, initial_state=state, **options)
    assert (gradients is None) == (D != E)
    if gradients is not None:
        dq, actual["dk"], actual["dv"] = gradients
        assert torch.equal(dq, actual["dq"])
    assert len(launches) == (2 if gradients is None else 3)
    for name, result in actual.items():
        errors = head_errors(result, truth[name], 2)
        bounds = (2 if name == "o" else 3) * head_errors(plain[name], truth[name], 2) + 1e-6
        # Written so that NaN fails.
        assert bool((errors <= bounds).all()), f"{name}: {errors.tolist()} > {bounds.tolist()}"


# What the caller asks for, and how often the chained scan then runs.
CASES = {
    "initial state": (dict(state=True, state_grad=False), 2),
    "gradient of the initial state": (dict(state=True), 2),
    "final state": (dict(final=True), 1),
    "gradient of the final state": (dict(final=True, final_grad=True), 0),
    "gradient of q alone": (dict(leaves=1), 2),
    "heads of two sizes": (dict(E=96), 2),
    "the gradient of a sum": (dict(expanded=True), 2),
    "one head": (dict(H=1), 2),
}


@poisoned
@pytest.mark.parametrize("name", CASES)
def test_what_a_caller_asks_for(name, launches):
    case, runs = CASES[name]
    E, H = case.get("E", 128), case.get("H", 5)
    q, k, v, log_decay, state = (
        x.cuda() for x in cases.make_inputs(1500, B=2, H=H, D=128, E=E, dtype=BF16)
    )
    q, k = q / 8, k / 8
    do, dfinal = torch.randn_like(v), torch.randn_like(state)

    def evaluate(function, dtype):
        wanted = case.get("leaves", 3)
        inputs = [x.detach().to(dtype).requires_grad_(i < wanted) for i, x in enumerate((q, k, v))]
        leaves = inputs[:wanted]
        wide = torch.float32 if function is lasp.lightning_attention else dtype
        options = dict(scale=0.7)
        if case.get("state"):
            initial = state.to(wide).detach().requires_grad_(case.get("state_grad", True))
            leaves += [initial] if initial.requires_grad else []
            options["initial_state"] = initial
        if function is lasp.lightning_attention:
            options["output_final_state"] = case.get("final", False)
        result = function(*inputs, log_decay.to(wide), **options)
        o, final = result if isinstance(result, tuple) else (result, None)
        loss = o.sum() if case.get("expanded") else (o * do.to(o)).sum()
        results = [o]
        if case.get("final"):
            results.append(final)
            if case.get("final_grad"):
                loss = loss + (final * dfinal.to(final)).sum()
        return [x.detach() for x in (*results, *torch.autograd.grad(loss, leaves))]

    actual = evaluate(lasp.lightning_attention, BF16)
    assert len(launches) == runs
    truth = evaluate(lasp.reference.quadratic, torch.float64)
    plain = evaluate(lasp.reference.quadratic, BF16)
    for i, (got, want, rough) in enumerate(zip(actual, truth, plain, strict=True)):
        error = cases.relative_error(got, want)
        assert error <= 3 * cases.relative_error(rough, want) + 1e-6, (i, error)


@pytest.mark.parametrize("T, H, runs", [(256, 16, 0), (257, 16, 2), (2048, 16, 2), (2048, 17, 0)])
def test_where_it_runs(T, H, runs, launches):
    """One launch forward and one backward; not in more programs than run at once."""
    leaves, do, log_decay = make_leaves(T, H)
    run(leaves, do, log_decay)
    assert len(launches) == runs


def assert_equal(results, want):
    for name, a, b in zip(("o", "dq", "dk", "dv"), results, want, strict=True):
        assert torch.equal(a, b), name


@poisoned
def test_the_same_bits_every_time_beside_other_work(launches):
    """Twenty streams of two priorities, each with grids that want the whole GPU, and a kernel that
    comes and goes and leaves them few multiprocessors."""
    inputs = [make_leaves(T, H) for T, H in ((4096, 8), (2048, 16), (1500, 5), (600, 32))]
    want = [run(*each) for each in inputs]
    busy = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    streams = [torch.cuda.Stream(priority=-(i % 2)) for i in range(20)]
    aside = torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        with torch.cuda.stream(aside):
            busy @ busy
        for i, stream in enumerate(streams):
            i //= len(streams) // len(inputs)
            with torch.cuda.stream(stream):
                results.append((i, run(*inputs[i])))
        torch.cuda.synchronize()
        for i, result in results:
            assert_equal(result, want[i])
    assert launches


def test_a_long_row_of_launches(launches):
    """Other shapes have other flags; a program that started early would read the last launch's."""
    inputs = [make_leaves(2048, 16, seed=seed) for seed in range(3)] + [make_leaves(700, 5)]
    want = [run(*each) for each in inputs]
    for i in range(400):
        i %= len(inputs)
        assert_equal(run(*inputs[i]), want[i])
    assert len(launches) == 2 * 404


@poisoned
def test_odd_addresses_and_strides_give_the_same_bits(launches):
    leaves, do, log_decay = make_leaves()
    want = run(leaves, do, log_decay)
    whole = torch.full((leaves[0].numel() + 1,), float("nan"), device="cuda", dtype=BF16)
    moved = whole[1:].view(leaves[0].shape).copy_(leaves[0].detach())
    assert moved.data_ptr() % 16 == 2
    wide = torch.full((*leaves[1].shape[:3], 3 * 128 + 8), float("nan"), device="cuda", dtype=BF16)
    sliced = [wide[..., i * 128 : (i + 1) * 128] for i in (0, 2)]
    for part, leaf in zip(sliced, leaves[1:], strict=True):
        part.copy_(leaf.detach())
    odd = [x.detach().requires_grad_() for x in (moved, *sliced)]
    assert_equal(run(odd, do, log_decay), want)
    fused = torch.cat([x.detach() for x in leaves], dim=-1)
    assert_equal(run([x.requires_grad_() for x in fused.split(128, dim=-1)], do, log_decay), want)
    assert len(launches) == 6


@poisoned
def test_graphs_replay_at_the_same_time(launches):
    """Two graphs and plain calls, each on a stream of its own.

    The graphs hold the poison too: a program that does not wait in a replay finds NaN, and not what
    the replay before has left.
    """
    inputs = [make_leaves(2048, 8, seed=seed) for seed in range(3)]
    want = [run(*each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    graphs, captured = [], []
    for each in inputs[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(run(*each))
    torch.cuda.synchronize()
    for _ in range(50):
        for results in captured:
            for x in results:
                x.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams[:2], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                graph.replay()
        with torch.cuda.stream(streams[2]):
            plain = run(*inputs[2])
        torch.cuda.synchronize()
        for results, expected in zip((*captured, plain), want, strict=True):
            assert_equal(results, expected)
    assert launches


def test_who_watches_sees_the_same_bits(launches):
    """The way of the operators, which torch.compile and profilers take."""
    leaves, do, log_decay = make_leaves()
    want = run(leaves, do, log_decay)
    with torch.profiler.profile() as profile:
        assert_equal(run(leaves, do, log_decay), want)
    assert {"lasp::attend", "lasp::attend_backward"} <= {e.key for e in profile.key_averages()}
    compiled = torch.compile(lasp.lightning_attention, fullgraph=True)
    o = compiled(*leaves, log_decay)
    assert_equal([o.detach(), *torch.autograd.grad(o, leaves, do)], want)
    assert len(launches) == 6
