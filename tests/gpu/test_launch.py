"""Cached launches and CUDA graphs on a GPU give the bits of the first, plain launch."""

import pytest
import torch

import lasp
from lasp.ops import chunked
from lasp.ops.triton.launch_config import LARGE_VALUES
from tests.lasp import cases
from tests.lasp.ops.triton.launch_constants import launch_constants

BF16 = torch.bfloat16


def make_leaves(T=1500, H=5, D=64, dtype=BF16, seed=0):
    """q, k, v that need gradients, do and log_decay, on the GPU."""
    q, k, v, log_decay, _ = cases.make_inputs(T, H=H, D=D, E=D, dtype=dtype, state=False, seed=seed)
    leaves = [(x / 8).cuda().requires_grad_() for x in (q, k, v)]
    return leaves, torch.randn_like(leaves[2]), log_decay.cuda()


def run(leaves, do, log_decay):
    o = lasp.lightning_attention(*leaves, log_decay)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.fixture
def plain_launches(monkeypatch):
    """The kernels that Triton had to look up a compiled variant of."""
    from triton.runtime.jit import JITFunction

    seen, launch = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *a, **k: (seen.append(a[0]), launch(*a, **k))[1])
    return seen


# The second with the Hopper scan, if the GPU is one.
@pytest.mark.parametrize("D, large_values", [(64, LARGE_VALUES), (128, 0)])
def test_only_the_first_call_is_looked_up(D, large_values, plain_launches):
    inputs = make_leaves(D=D)
    with launch_constants(LARGE_VALUES=large_values):
        run(*inputs)
        del plain_launches[:]
        run(*inputs)
    assert not plain_launches


def test_unaligned_addresses_give_the_same_bits(plain_launches):
    """Tensors of the same shape and strides, but with addresses that allow no vector loads."""
    leaves, do, log_decay = make_leaves()
    want = run(leaves, do, log_decay)

    def moved(x):
        whole = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        copy = whole[1:].view(x.shape).copy_(x.detach())
        assert copy.data_ptr() % 16 == 2 and copy.stride() == x.stride()
        return copy

    odd = [moved(x).requires_grad_() for x in leaves]
    del plain_launches[:]
    for mixed in (odd, leaves, [odd[0], *leaves[1:]], odd):
        got = run(mixed, do, log_decay)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert plain_launches


def test_strides_not_divisible_by_16_give_the_same_bits():
    leaves, do, log_decay = make_leaves()
    want = run(leaves, do, log_decay)
    for width in (65, 72):
        wide = [x.new_zeros(*x.shape[:3], width) for x in leaves]
        sliced = [
            w[..., :64].copy_(x.detach()).detach().requires_grad_()
            for w, x in zip(wide, leaves, strict=True)
        ]
        assert sliced[0].stride(2) == width
        for _ in range(2):
            got = run(sliced, do, log_decay)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_hooks_see_cached_launches():
    import triton

    inputs = make_leaves()
    want = run(*inputs)
    hooks, names = triton.knobs.runtime.launch_enter_hook, []

    def hook(metadata):
        names.append(metadata.get()["name"])

    hooks.add(hook)
    try:
        got = run(*inputs)
    finally:
        hooks.remove(hook)
    assert {"state_kernel", "scan_kernel"} <= set(names)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_steps_at_other_addresses_give_the_same_bits():
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 128, device="cuda", generator=generator).to(BF16)
    state = torch.randn(2, 4, 128, 128, device="cuda", generator=generator)
    first = lasp.lightning_attention_step(q, k, v, state)
    for x in (q, torch.cat([q.flatten()[:1], q.flatten()])[1:].view(q.shape)):
        again = lasp.lightning_attention_step(x, k, v, state)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_steps_of_another_dtype_run_their_own_kernel():
    """The same shapes and strides: a cached float32 kernel must not run on bfloat16 memory."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(3, 2, 4, 128, device="cuda", generator=generator)
    state = torch.randn(2, 4, 128, 128, device="cuda", generator=generator)
    for dtype in (torch.float32, BF16, torch.float16, torch.float32):
        inputs = [x.to(dtype) for x in qkv]
        got = lasp.lightning_attention_step(*inputs, state)
        want = chunked.step(*(x.double() for x in inputs), state.double(), None, scale=1.0)
        for a, b in zip(got, want, strict=True):
            assert cases.relative_error(a, b) < torch.finfo(a.dtype).eps + 1e-6, dtype


# Folded, combined, and one segment.
@pytest.mark.parametrize("T, H", [(1500, 5), (9000, 16), (100, 2)])
def test_cuda_graphs_replay_with_new_inputs(T, H):
    leaves, do, log_decay = make_leaves(T, H)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(leaves, do, log_decay)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, do, log_decay)
    for seed in (1, 2):
        new_leaves, new_do, _ = make_leaves(T, H, seed=seed)
        with torch.no_grad():
            for old, new in zip((*leaves, do), (*new_leaves, new_do), strict=True):
                old.copy_(new)
        want = run(new_leaves, new_do, log_decay)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
