"""The Hopper scan at small shapes against float64; every test asserts that it is what runs."""

import functools

import pytest
import torch

import lasp
from lasp.ops.triton import chunk_states, scan, scan_dkdv
from lasp.ops.triton.scan import ScanPlan
from tests.gpu.precision import check, to_gpu
from tests.lasp import cases
from tests.lasp.ops.triton.launch_constants import launch_constants

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Every shape goes to the Hopper kernel; the list has an entry per launch."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    seen, arguments = [], ScanPlan.arguments

    def noting(plan, *args):
        seen.extend([1] * (plan.describes))
        return arguments(plan, *args)

    monkeypatch.setattr(ScanPlan, "arguments", noting)
    with launch_constants(LARGE_VALUES=0):
        yield seen


@pytest.mark.parametrize("T", [1, 63, 64, 65, 300, 1000, 4097])
def test_matches_the_definition(T, launches):
    q, k, v, log_decay, state = cases.make_inputs(T, B=2, H=5, D=128, E=128, dtype=BF16)
    check((q / 8, k / 8, v, log_decay, state), scale=0.7)
    # o, dq, dv with dk.
    assert len(launches) == 3


@pytest.mark.parametrize(
    "D, E, dtype",
    [
        (96, 96, BF16),
        (128, 200, torch.float16),
        (200, 72, torch.float16),
        (256, 256, BF16),
    ],
)
def test_head_sizes(D, E, dtype, launches):
    q, k, v, log_decay, state = cases.make_inputs(1500, H=5, D=D, E=E, dtype=dtype)
    check((q / 8, k / 8, v, log_decay, state))
    assert launches


@pytest.mark.parametrize("D, num_launches", [(128, 3), (256, 4)])
def test_packed_documents(D, num_launches, launches):
    cu_seqlens = torch.tensor([0, 1, 16, 16, 500, 3000, 3063], dtype=torch.int32)
    q, k, v, log_decay, state = cases.make_inputs(3063, H=5, D=D, E=128, dtype=BF16, N=6)
    check((q / 8, k / 8, v, log_decay, state), cu_seqlens=cu_seqlens)
    assert len(launches) == num_launches


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("D", [128, 256])
def test_states_of_some_documents_are_those_of_all(D, reverse, launches):
    cu_seqlens, rows = (0, 1, 16, 16, 500, 3000, 3063), (4, 0)
    q, k, v, log_decay, state = to_gpu(
        cases.make_inputs(3063, H=5, D=D, E=128, dtype=BF16, N=len(cu_seqlens) - 1)
    )
    common = dict(cu_seqlens=cu_seqlens, reverse=reverse)
    states, total = chunk_states(k, v, log_decay, **common)
    again, some = chunk_states(k, v, log_decay, state_rows=rows, **common)
    none, _ = chunk_states(k, v, log_decay, with_total=False, **common)
    assert torch.equal(some, total[list(rows)])
    entering = torch.zeros_like(state)
    entering[list(rows)] = state[list(rows)]
    initial = torch.cat([state[list(rows)], torch.zeros_like(state[:1])])
    options = dict(scale=0.7, **common)
    y = scan(q, k, v, log_decay, initial_state=entering, segment_states=states, **options)
    for each in (again, none):
        inputs = dict(initial_state=initial, state_rows=rows, segment_states=each)
        assert torch.equal(y, scan(q, k, v, log_decay, **inputs, **options))
    assert len(launches) == 3


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 4097])
def test_wide_keys(T, launches):
    q, k, v, log_decay, state = cases.make_inputs(T, B=2, H=5, D=256, E=128, dtype=BF16)
    check((q / 8, k / 8, v, log_decay, state), scale=0.7)
    # o, dq, dv, dk.
    assert len(launches) == 4


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 65, 65, 900, 1000)])
@pytest.mark.parametrize("D, E", [(128, 128), (72, 104)])
def test_dv_and_dk_in_one_launch_are_those_of_two_scans(D, E, cu_seqlens, launches):
    """dv has the same bits; dk's state sums do * decay times q, not do times (q * decay)."""
    T, N = 1000, 1 if cu_seqlens is None else len(cu_seqlens) - 1
    q, k, v, log_decay, _ = to_gpu(cases.make_inputs(T, H=5, D=D, E=E, dtype=BF16, state=False))
    do, grad = torch.randn_like(v), torch.randn(N, 5, E, D, device="cuda").mT
    common = dict(scale=0.7, cu_seqlens=cu_seqlens)
    states, _ = chunk_states(q, do, log_decay, reverse=True, with_total=False, **common)
    entering = dict(initial_state=grad, segment_states=states)
    dk, dv, _ = scan_dkdv(q, k, v, do, log_decay, **entering, **common)
    entering = dict(initial_state=grad.mT, segment_states=states.mT)
    common["reverse"] = True
    want_dk = scan(v, do, q, log_decay, **entering, **common)
    entering = dict(initial_state=grad, segment_states=states)
    assert len(launches) == 2
    # One block of columns per warpgroup instead of two: the products are the same.
    assert torch.equal(dv, scan(k, q, do, log_decay, **entering, **common))
    assert cases.relative_error(dk, want_dk.double()) < 5e-3


def test_strided_operands_give_the_same_bits(launches):
    q, k, v, log_decay, _ = to_gpu(cases.make_inputs(700, B=2, D=128, E=128, dtype=BF16))
    fused = torch.cat([q, k, v], dim=-1)
    o = lasp.lightning_attention(q, k, v, log_decay)
    assert torch.equal(o, lasp.lightning_attention(*fused.split(128, dim=-1), log_decay))
    assert len(launches) == 2


@pytest.mark.parametrize("D", [128, 256])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_documents_do_not_see_nan_or_inf_of_others(bad, D, launches):
    q, k, v, log_decay, _ = to_gpu(cases.make_inputs(1000, D=D, E=128, dtype=BF16))
    cu_seqlens = torch.tensor([0, 300, 301, 640, 1000], dtype=torch.int32)

    def run(q, k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = lasp.lightning_attention(*leaves, log_decay, cu_seqlens=cu_seqlens)
        o.backward(torch.ones_like(o))
        return [o, *(x.grad for x in leaves)]

    spoilt = [x.clone() for x in (q, k, v)]
    for x in spoilt:
        x[:, 300:301] = bad
        x[:, 640:] = bad
    for clean, seen in zip(run(q, k, v), run(*spoilt), strict=True):
        assert torch.equal(clean[:, :300], seen[:, :300])
        assert torch.equal(clean[:, 301:640], seen[:, 301:640])
    assert launches


@pytest.mark.parametrize("D, num_launches", [(128, 3), (256, 4)])
def test_the_same_bits_every_time(D, num_launches, launches):
    inputs = to_gpu(cases.make_inputs(5001, B=2, H=8, D=D, E=128, dtype=BF16))
    run = functools.partial(lasp.lightning_attention, output_final_state=True)
    first = cases.forward_and_gradients(run, *inputs)
    for _ in range(100):
        again = cases.forward_and_gradients(run, *inputs)
        assert all(torch.equal(again[name], first[name]) for name in first)
    assert len(launches) == num_launches * 101
