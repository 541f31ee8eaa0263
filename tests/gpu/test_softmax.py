"""Softmax attention on GPUs: every kernel behind it, merged blocks, over two GPUs."""

import pytest
import torch

import lasp
from lasp.ops import sdpa
from tests.lasp.cases import relative_error
from tests.operator import test_softmax as on_cpu

LOW = [torch.bfloat16, torch.float16]


def check(inputs, **options):
    """At most 2x (gradients 3x) the error that plain torch makes in the same dtype."""
    inputs = [x.cuda() for x in inputs]
    truth = on_cpu.definition(inputs, **options)
    plain = on_cpu.results(lasp.reference.softmax, *inputs, **options)
    actual = on_cpu.results(lasp.softmax_attention, *inputs, **options)
    # In float16, 1e-9 of it would be zero.
    size = inputs[3].double().norm()
    for name, wanted in truth.items():
        if wanted.norm() < 1e-9 * size:
            # The weight of an only key does not depend on the scores.
            assert actual[name].double().norm() < 1e-2 * size
            continue
        slack = 2 if name == "o" else 3
        allowed = slack * relative_error(plain[name], wanted) + 1e-6
        error = relative_error(actual[name], wanted)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def backends(monkeypatch):
    """The kernels that calls from now on take."""
    taken, choose = [], sdpa._backend

    def noting(*args):
        taken.append(choose(*args))
        return taken[-1]

    monkeypatch.setattr(sdpa, "_backend", noting)
    return taken


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("past", [0, 1, 700])
@pytest.mark.parametrize("T", [1, 63, 1000])
def test_matches_the_definition(T, past, dtype):
    check(on_cpu.make_inputs(T, H=6, G=2, D=64, dtype=dtype, past=past))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("D", "G"), [(128, 4), (128, 1), (96, 2), (256, 2), (20, 4), (7, 1)])
def test_head_sizes(D, G, dtype):
    check(on_cpu.make_inputs(300, H=4, G=G, D=D, dtype=dtype))
    check(on_cpu.make_inputs(300, H=4, G=G, D=D, dtype=dtype, past=50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_documents(dtype):
    offsets = torch.tensor([0, 1, 16, 16, 500, 900, 1000], dtype=torch.int32)
    check(on_cpu.make_inputs(1000, B=1, D=64, dtype=dtype), cu_seqlens=offsets)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_every_kernel_merges_score_blocks(backend, monkeypatch):
    """One problem in one block and in three, whichever kernel torch would choose."""
    monkeypatch.setattr(sdpa, "_backend", lambda *args: backend)
    q, k, v, do = (x.cuda() for x in on_cpu.make_inputs(500, D=64, dtype=torch.bfloat16))
    truth = on_cpu.definition((q, k, v, do))
    plain = on_cpu.results(lasp.reference.softmax, q, k, v, do)
    cut = [
        sdpa.ScoreBlock((0, 200), (0, 200), True),
        sdpa.ScoreBlock((200, 500), (200, 500), True),
        sdpa.ScoreBlock((200, 500), (0, 200), False),
    ]
    options = dict(scale=1 / 8, repeats=True)
    # As they come from other ranks: a token's key and value lie together, tokens first.
    gathered = torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1)
    together = [x.transpose(0, 1) for x in gathered.unbind(1)]
    whole = [sdpa.ScoreBlock((0, 500), (0, 500), True)]
    for parts, keys_values in ((whole, (k, v)), (cut, (k, v)), (cut, together)):
        o, lse = sdpa.attn_fwd(q, *keys_values, parts, **options)
        grads = sdpa.attn_bwd(do, q, *keys_values, o, lse, parts, **options)
        for (name, wanted), actual in zip(truth.items(), (o, *grads), strict=True):
            allowed = 3 * relative_error(plain[name], wanted)
            error = relative_error(actual, wanted)
            assert error <= allowed, f"{backend} {len(parts)} {name}: {error:.3g} > {allowed:.3g}"


def test_the_kernel_is_the_one_that_torch_would_take(monkeypatch):
    taken = backends(monkeypatch)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        check(on_cpu.make_inputs(100, D=64, dtype=torch.bfloat16))
    assert set(taken) == {"flash"}
    taken.clear()
    # Lengths that change with every call are no work for a kernel that plans for each.
    check(on_cpu.make_inputs(100, D=64, dtype=torch.bfloat16, past=3))
    assert "cudnn" not in taken


def test_memory_grows_with_the_tokens():
    """No T x T matrix: 2 GiB at 32,768 tokens, in bfloat16 and for one head."""
    size = dict(device="cuda", dtype=torch.bfloat16)
    q, k, v, do = (torch.randn(1, 32768, 1, 64, **size) for _ in range(4))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    on_cpu.results(lasp.softmax_attention, q, k, v, do)
    assert torch.cuda.max_memory_allocated() - before < 40 * q.nbytes


def test_lengths_that_are_told_need_no_synchronisation():
    inputs = [x.cuda() for x in on_cpu.make_inputs(1000, B=1, D=64, dtype=torch.bfloat16)]
    offsets = torch.tensor([0, 100, 1000], dtype=torch.int32)
    for options in ({}, {"cu_seqlens": offsets}):
        on_cpu.results(lasp.softmax_attention, *inputs, **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = on_cpu.results(lasp.softmax_attention, *inputs, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert results["o"].isfinite().all()


def test_inductor_compiles_it():
    inputs = [x.cuda() for x in on_cpu.make_inputs(300, D=64, dtype=torch.bfloat16)]

    def layer(q, k, v):
        return lasp.softmax_attention(q * 2, k, v).sin()

    eager = on_cpu.results(layer, *inputs)
    compiled = on_cpu.results(torch.compile(layer, fullgraph=True), *inputs)
    for name, wanted in eager.items():
        assert relative_error(compiled[name], wanted) < 2e-2, name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs of one host")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1.5e-2)])
def test_over_two_gpus(pool, dtype, bound):
    cases = [
        (layout, lengths, documents, told)
        for layout, lengths in (("contiguous", [1000, 300]), ("zigzag", [640, 640]))
        for documents, told in ((None, True), (None, False), ("across", True))
    ]
    # Of a single token dq would be rounding alone.
    on_cpu.check(pool, 2, [*cases, ("contiguous", [2, 0], None, False)], dtype, bound)
