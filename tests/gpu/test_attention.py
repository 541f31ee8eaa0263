"""The operator on a GPU: synchronisation, compilation, and the same bits every time."""

import pytest
import torch

import lasp
from tests.gpu.precision import to_gpu, with_state
from tests.lasp import cases


def test_host_offsets_need_no_synchronisation():
    q, k, v, log_decay, _ = to_gpu(
        cases.make_inputs(3000, D=64, E=64, dtype=torch.bfloat16, state=False)[:4] + (None,)
    )
    offsets = torch.tensor([0, 100, 3000], dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(offsets):
        o = lasp.lightning_attention(*leaves, log_decay, cu_seqlens=offsets)
        o.sum().backward()
        return o

    run(offsets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(offsets)
        o = run(torch.tensor([0, 64, 2000, 3000], dtype=torch.int32))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert o.isfinite().all()


def test_offsets_on_the_gpu_are_refused_like_those_on_the_host():
    q, k, v, log_decay, _ = to_gpu(cases.make_inputs(30, dtype=torch.float32))
    offsets = torch.tensor([0, 20, 10, 30], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="descends from 20 to 10"):
        lasp.lightning_attention(q, k, v, log_decay, cu_seqlens=offsets)


def test_a_changed_decay_is_checked_again():
    q, k, v, log_decay, _ = to_gpu(cases.make_inputs(30, dtype=torch.float32))
    lasp.lightning_attention(q, k, v, log_decay)
    log_decay.neg_()
    with pytest.raises(ValueError, match="must be <= 0"):
        lasp.lightning_attention(q, k, v, log_decay)


@pytest.mark.parametrize("packed", [False, True])
def test_inductor_compiles_it(packed):
    q, k, v, log_decay, _ = to_gpu(
        cases.make_inputs(3000, D=64, E=64, dtype=torch.bfloat16, state=False)[:4] + (None,)
    )
    offsets = torch.tensor([0, 100, 3000], dtype=torch.int32) if packed else None

    def layer(q, k, v):
        return lasp.lightning_attention(q * 2, k, v, log_decay, cu_seqlens=offsets).sin()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = function(*leaves)
        o.float().sum().backward()
        results.append([o.detach(), *(x.grad for x in leaves)])
    for name, eager, compiled in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert cases.relative_error(compiled, eager) < 1e-2, name


def test_lengths_may_vary_under_the_compiler():
    def layer(q, k, v):
        return lasp.lightning_attention(q * 2, k, v, log_decay).sin()

    compiled = torch.compile(layer, dynamic=True)
    for T in (1500, 700, 5000):
        q, k, v, log_decay, _ = to_gpu(
            cases.make_inputs(T, D=128, E=128, dtype=torch.bfloat16, state=False)[:4] + (None,)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        results = []
        for function in (layer, compiled):
            o = function(*leaves)
            results.append([o, *torch.autograd.grad(o.float().sum(), leaves)])
        for name, eager, traced in zip(("o", "dq", "dk", "dv"), *results, strict=True):
            assert cases.relative_error(traced, eager) < 1e-2, (T, name)


def test_the_same_bits_every_time():
    inputs = to_gpu(cases.make_inputs(5000, B=2, H=4, D=128, E=128, dtype=torch.bfloat16))
    first = cases.forward_and_gradients(with_state, *inputs)
    for _ in range(10):
        again = cases.forward_and_gradients(with_state, *inputs)
        assert all(torch.equal(again[name], first[name]) for name in first)
