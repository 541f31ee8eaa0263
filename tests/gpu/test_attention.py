"""The whole operator on a GPU: precision, packed documents, strides, compilation, memory."""

import functools

import pytest
import torch

import lasp
from tests.lasp import cases

with_state = functools.partial(lasp.lightning_attention, output_final_state=True)


def to_gpu(inputs):
    return [None if x is None else x.cuda() for x in inputs]


def check(inputs, slack_forward=2.0, slack_backward=3.0, **kwargs):
    """The operator on the GPU errs at most 2x (gradients 3x) as much as plain torch there."""
    on_gpu = to_gpu(inputs)
    kwargs = {n: x.cuda() if torch.is_tensor(x) else x for n, x in kwargs.items()}
    truth = cases.expected(*on_gpu, **kwargs)
    low = [None if x is None else x.to(inputs[0].dtype) for x in on_gpu]
    plain = cases.forward_and_gradients(lasp.reference.quadratic, *low, **kwargs)
    actual = cases.forward_and_gradients(with_state, *on_gpu, **kwargs)
    for name, value in truth.items():
        slack = slack_forward if name in ("o", "state") else slack_backward
        allowed = slack * cases.relative_error(plain[name], value) + 1e-6
        error = cases.relative_error(actual[name], value)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 63, 1000, 4097])
def test_matches_the_definition(T, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    q, k, v, log_decay, state = cases.make_inputs(T, B=2, H=5, D=128, E=128, dtype=dtype)
    check((q / 8, k / 8, v, log_decay, state), scale=0.7)


@pytest.mark.parametrize("D, E", [(64, 64), (256, 128), (96, 80)])
def test_head_sizes(D, E):
    q, k, v, log_decay, state = cases.make_inputs(1500, H=5, D=D, E=E, dtype=torch.bfloat16)
    check((q / 8, k / 8, v, log_decay, state))


def test_packed_documents():
    offsets = torch.tensor([0, 1, 16, 16, 500, 3000, 3063], dtype=torch.int32)
    q, k, v, log_decay, state = cases.make_inputs(3063, H=5, D=64, E=64, dtype=torch.float16, N=6)
    check((q / 8, k / 8, v, log_decay, state), cu_seqlens=offsets)


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


def test_steps_equal_one_pass():
    q, k, v, log_decay, state = to_gpu(
        cases.make_inputs(50, B=3, H=5, D=128, E=96, dtype=torch.bfloat16)
    )
    q, k = q / 8, k / 8
    o, final = with_state(q, k, v, log_decay, initial_state=state)
    for t in range(50):
        o_t, state = lasp.lightning_attention_step(q[:, t], k[:, t], v[:, t], state, log_decay)
        assert cases.relative_error(o_t, o[:, t]) < 1e-2
    assert cases.relative_error(state, final) < 1e-2


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
