"""A decay per token in the kernels, in Triton's interpreter: its sums, its gradient, and the states
of tokens that it lets decay to nothing; against float64."""

from unittest import mock

import pytest
import torch

import lasp
from lasp import ops
from lasp.ops import chunked
from lasp.ops import triton as kernels
from lasp.ops.triton import decay
from tests.lasp import cases
from tests.lasp.cases import relative_error
from tests.lasp.ops.triton import interpreter
from tests.lasp.ops.triton.compiler import spilled_bytes
from tests.lasp.ops.triton.launch_constants import launch_constants

PACKED = (0, 0, 1, 70, 150, 150, 200)


def decays(B, T, H, strongest=-0.2, dtype=torch.float32):
    return (strongest * torch.rand(B, T, H)).to(dtype)


def check_sums(log_decay, tokens=decay.DECAY_TOKENS, heads=decay.DECAY_HEADS):
    """The cumulative sums of any strides, computed in tiles of `tokens` and `heads`."""
    B, T, H = log_decay.shape
    decay._cumulate_launches.cache_clear()
    with mock.patch.multiple(decay, DECAY_TOKENS=tokens, DECAY_HEADS=heads):
        sums = kernels.prepare_decay(log_decay)
    decay._cumulate_launches.cache_clear()
    want = torch.zeros(B, H, T + 1, dtype=torch.float64)
    # exp of anything below is zero.
    want[..., 1:] = log_decay.double().clamp_min(-128).cumsum(1).mT
    assert sums.dtype == torch.float64 and sums.is_contiguous()
    torch.testing.assert_close(sums, want, rtol=1e-13, atol=1e-13)


def check_strides():
    B, T, H = 2, 77, 5
    wide = decays(B, T, 3 * H)
    for log_decay in (
        decays(B, H, T).mT,
        decays(T, B, H).transpose(0, 1),
        wide[..., H : 2 * H],
        wide[..., ::3],
        decays(1, 1, H).expand(B, T, H),
        decays(B, T, 1).expand(B, T, H),
        decays(B, T + 9, H)[:, 9:],
    ):
        assert log_decay.shape == (B, T, H)
        check_sums(log_decay)


def check_large_and_infinite_decays():
    """A difference of sums stays right where the sums are large."""
    log_decay = decays(1, 600, 2)
    log_decay[:, ::3] = -100.0
    log_decay[:, 5::7] = -torch.inf
    check_sums(log_decay)
    sums = kernels.prepare_decay(log_decay)
    assert float(sums.min()) < -2e4 and sums.isfinite().all()
    between = sums.diff(dim=-1).mT
    torch.testing.assert_close(between, log_decay.double().clamp_min(-128), rtol=0, atol=1e-10)


def check_refused_values():
    """Values above 0 and NaN are seen in all that follows them, in their head alone."""
    for bad in (1e-30, 0.5, torch.inf, torch.nan):
        log_decay = decays(2, 300, 3)
        good = kernels.prepare_decay(log_decay)
        log_decay[1, 260, 2] = bad
        sums = kernels.prepare_decay(log_decay)
        assert sums[1, 2, 261:].isnan().all()
        good[1, 2, 261:] = sums[1, 2, 261:] = 0
        assert torch.equal(sums, good)


def check_decay_sums():
    """What remains after each row, for a batch, documents, and some of them."""
    dense, packed = decays(3, 90, 4), decays(1, PACKED[-1], 4)
    for log_decay, cu_seqlens, rows in (
        (dense, None, None),
        (packed, PACKED, None),
        (packed, PACKED, (3, 0, 5)),
    ):
        sums = kernels.decay_sums(kernels.prepare_decay(log_decay), cu_seqlens, rows)
        want = chunked.decay_sums(log_decay, cu_seqlens, rows)
        torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12)


def check_operator(*, T=200, B=1, D=16, E=24, cu_seqlens=None, dtype=torch.float32, **given):
    """The operator, whose documents are of several segments, and every gradient."""
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    q, k, v, _, state = cases.make_inputs(T, B=B, D=D, E=E, dtype=dtype, N=N)
    log_decay = decays(B, T, 3)
    log_decay[:, T // 2, 1] = -torch.inf
    options = dict(scale=0.3)
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
    with_initial, with_final = given["initial"], given["final"]
    inputs = q, k, v, log_decay, state if with_initial else None

    def operator(*args, **kwargs):
        return lasp.lightning_attention(*args, **kwargs, output_final_state=True)

    truth = cases.expected(*inputs, **options, with_final=with_final)
    with (
        launch_constants(segment_length=64),
        mock.patch.object(ops, "backend", lambda x: kernels),
        mock.patch.object(kernels, "decay_gradient", wraps=kernels.decay_gradient) as gradient,
    ):
        if with_final:
            found = cases.forward_and_gradients(operator, *inputs, **options)
        else:
            found = cases.forward_and_gradients(
                lambda *args, **kwargs: (lasp.lightning_attention(*args, **kwargs),
                                         torch.zeros(N, 3, D, E).requires_grad_()),
                *inputs, **options, with_final=False,
            )  # fmt: skip
    # More than one segment, and the gradient starts anew between them.
    (call,) = gradient.call_args_list
    assert all(each is not None for each in call.kwargs["segment_states"])
    bound = 5e-6
    if dtype != torch.float32:
        low = [None if x is None else x.to(dtype) for x in inputs]
        plain = cases.forward_and_gradients(
            lasp.reference.quadratic, *low, **options, with_final=with_final
        )
        bound = {
            name: (2 if name in ("o", "state") else 3) * relative_error(plain[name], x)
            for name, x in truth.items()
        }
    cases.assert_close(found, truth, bound)


def check_gradient_does_not_drift():
    """What each token's dots are off by does not add up over the tokens."""
    B, T, H, D = 2, 256, 2, 16
    q, k, v, do = torch.randn(4, B, T, H, D).unbind()
    log_decay = decays(B, T, H)
    leaf = log_decay.double().requires_grad_()
    o, _ = lasp.reference.quadratic(*(x.double() for x in (q, k, v)), leaf)
    (want,) = torch.autograd.grad(o, leaf, do.double())
    _, q_dots = chunked.scan(do, v, k, log_decay, scale=1.0, dot_with=q)
    *_, k_dots = chunked.scan_dkdv(q, k, v, do, log_decay, scale=1.0, with_dots=True)
    q_dots, k_dots = (x.mT[:, :, None].float().contiguous() for x in (q_dots, k_dots))
    sums = kernels.prepare_decay(log_decay)
    for blocks in (1, 2):
        # Off by a part of the largest term, and in two blocks of columns.
        off = 1e-3 * q_dots.abs().max()
        halves = ((q_dots + off) / blocks).expand(-1, -1, blocks, -1).contiguous()
        with launch_constants(segment_length=64):
            states, _ = kernels.chunk_states(k, v, sums)
            grads, _ = kernels.chunk_states(q, do, sums, reverse=True)
            found = kernels.decay_gradient(
                halves, k_dots, sums, start=None, segment_states=(states, grads),
                entering=((None, None), (None, None)),
            )  # fmt: skip
        drifted = (want - off * torch.arange(T)[None, :, None]).float()
        assert relative_error(drifted, want) > 1e-2
        assert relative_error(found, want) < 1e-5
        assert found.shape == (B, T, H) and found.dtype == torch.float32


def check_far_tokens(*, reverse, cu_seqlens=None, T=600):
    """Tokens of which nothing is left are not read, all others are."""
    H, D, E = 3, 16, 24
    k, v = torch.randn(1, T, H, D), torch.randn(1, T, H, E)
    log_decay = decays(1, T, H)
    # Nothing is left after 26 tokens; 0.36 * T tokens in the last head; all in the second.
    log_decay[..., 0] = -4.0
    log_decay[..., 1] = -1e-3
    reset = int(0.6 * T)
    log_decay[:, reset, 2] = -torch.inf
    documents = (0, T) if cu_seqlens is None else cu_seqlens
    want = chunked.chunk_states(
        k.double(), v.double(), log_decay.double(), cu_seqlens=cu_seqlens, reverse=reverse
    )[1]
    bad_k = k.clone()
    for start, stop in zip(documents, documents[1:], strict=False):
        # A chunk and more from where the state leaves.
        far = slice(start + 128, stop) if reverse else slice(start, max(stop - 128, start))
        bad_k[:, far, 0] = torch.nan
    if cu_seqlens is None:
        far = slice(reset + 64, T) if reverse else slice(0, reset - 64)
        bad_k[:, far, 2] = torch.nan
    assert bad_k.isnan().any()
    sums = kernels.prepare_decay(log_decay)
    options = dict(cu_seqlens=cu_seqlens, reverse=reverse)
    with launch_constants(segment_length=T):
        states, local = kernels.chunk_states(bad_k, v, sums, **options)
        _, clean = kernels.chunk_states(k, v, sums, **options)
    assert torch.equal(local, clean)
    for h in range(H):
        assert relative_error(clean[:, h], want[:, h]) < 1e-5


def check_step():
    B, H, D, E = 3, 5, 40, 72
    q, k, v = torch.randn(B, H, D), torch.randn(B, H, D), torch.randn(B, H, E)
    state = torch.randn(B, H, D, E)
    # Of one token among others.
    log_decay = decays(B, 4, H, -3.0)[:, 2]
    log_decay[0, 0] = -torch.inf
    found = kernels.step(q, k, v, state, log_decay, scale=0.4)
    doubled = (x.double() for x in (q, k, v, state, log_decay))
    for x, want in zip(found, chunked.step(*doubled, scale=0.4), strict=True):
        assert relative_error(x, want) < 1e-6


BOTH = dict(initial=True, final=True)
NEITHER = dict(initial=False, final=False)
CASES = {
    "sums of one token": lambda: check_sums(decays(1, 1, 1)),
    "sums of no token": lambda: check_sums(decays(2, 0, 3)),
    "sums of 63 tokens": lambda: check_sums(decays(2, 63, 16)),
    "sums of 257 tokens and 17 heads": lambda: check_sums(decays(2, 257, 17)),
    "sums of float64": lambda: check_sums(decays(1, 300, 3).double()),
    "more blocks than are summed at once": lambda: check_sums(decays(2, 301, 3), tokens=8, heads=2),
    "strides": check_strides,
    "large and infinite decays": check_large_and_infinite_decays,
    "values above 0": check_refused_values,
    "sums of rows": check_decay_sums,
    "segments, both states": lambda: check_operator(B=2, **BOTH),
    "segments, no states": lambda: check_operator(T=193, **NEITHER),
    "segments, initial states": lambda: check_operator(initial=True, final=False),
    "segments, final states": lambda: check_operator(T=257, initial=False, final=True),
    "segments, float16": lambda: check_operator(dtype=torch.float16, **BOTH),
    "segments, odd sizes": lambda: check_operator(D=7, E=33, **BOTH),
    "packed segments, both states": lambda: check_operator(cu_seqlens=PACKED, **BOTH),
    "packed segments, no states": lambda: check_operator(cu_seqlens=PACKED, **NEITHER),
    "the gradient does not drift": check_gradient_does_not_drift,
    "far tokens": lambda: check_far_tokens(reverse=False),
    "far tokens, reverse": lambda: check_far_tokens(reverse=True),
    "far tokens, packed": lambda: check_far_tokens(reverse=False, cu_seqlens=(0, 20, 250, 600)),
    "far tokens, packed, reverse": lambda: check_far_tokens(
        reverse=True, cu_seqlens=(0, 20, 250, 600)
    ),
    "step": check_step,
}


@pytest.mark.timeout(interpreter.TIMEOUT + 100)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case):
    error = interpreter.errors(__name__)[case]
    assert error is None, error


def test_the_sums_compile_without_spills(compiled):
    kernels.prepare_decay(torch.zeros(1, 4096, 16))
    assert [kernel.name for kernel in compiled] == ["block_sums_kernel", "cumulate_kernel"]
    assert [spilled_bytes(kernel) for kernel in compiled] == [0, 0]


if __name__ == "__main__":
    interpreter.report(CASES)
