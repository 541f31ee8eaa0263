"""The scan, state, combine and step kernels in Triton's interpreter, against a loop over tokens in
float64; and the scan and step kernels compiled for Hopper.

The interpreter multiplies bf16 bit patterns, so bf16 is checked on a GPU only.
"""

import sys

import pytest
import torch

from lasp.ops import triton as kernels
from lasp.ops.triton.launch_config import MAX_FOLD, ScanShape, choose_scan
from tests.lasp.cases import relative_error
from tests.lasp.ops.triton import interpreter
from tests.lasp.ops.triton.compiler import assert_tensor_cores_used_well, spilled_bytes
from tests.lasp.ops.triton.launch_constants import launch_constants

DECAYS = (0.0, -0.03, -1.0, -50.0)
FP32_BOUND = 1e-5


def documents_of(T, cu_seqlens, batch):
    """[(batch row, first token, end)] of every document."""
    if cu_seqlens is None:
        return [(row, 0, T) for row in range(batch)]
    return [(0, start, stop) for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False)]


def token_loop(a, b, x, log_decay, scale, initial, documents, reverse, dtype):
    """(y, total without the initial state), token after token, the matrix products in `dtype`.

    In float64 this is the definition. In fp16 it is the plain low-precision version: products see
    fp16 operands and round to fp16, the state stays in float32.
    log_decay: [H], or [B, T, H].
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, x = a.to(dtype), b.to(dtype), x.to(dtype)
    factors = log_decay.double().exp().to(wide).expand(a.shape[:3])[..., None, None]
    y = torch.zeros(x.shape, dtype=dtype)
    totals = []
    for n, (row, start, stop) in enumerate(documents):
        total = torch.zeros(a.shape[2], a.shape[3], x.shape[3], dtype=wide)
        carried = initial[n].to(wide).clone()
        order = range(stop - 1, start - 1, -1) if reverse else range(start, stop)
        for t in order:
            factor = factors[row, t]
            outer = (b[row, t, :, :, None] * x[row, t, :, None, :]).to(wide)
            if reverse:
                # The carried gradient is that of the state after token t: it already holds `scale`.
                carried = carried + scale * outer
                y[row, t] = torch.einsum("hd,hde->he", a[row, t], carried.to(dtype))
                carried = factor * carried
                total = factor * (total + scale * outer)
            else:
                carried = factor * carried + outer
                y[row, t] = scale * torch.einsum("hd,hde->he", a[row, t], carried.to(dtype))
                total = factor * total + outer
        totals.append(total)
    return y, torch.stack(totals)


def check_scan(
    *, T, D, E, B=1, cu_seqlens=None, dtype=torch.float32, segment=None, reverse=False, fused=True,
    scale=0.3, initial=True, fold=MAX_FOLD,
):  # fmt: skip
    """`chunk_states` and `scan` on random operands with every decay, one head each."""
    H = len(DECAYS)
    log_decay = torch.tensor(DECAYS)
    generator = torch.Generator().manual_seed(T + D)
    if fused:
        # q, k, v as slices of one projection.
        whole = torch.randn(B, T, H, 2 * D + E, generator=generator).to(dtype)
        a, b, x = whole.split([D, D, E], dim=-1)
    else:
        a = torch.randn(T, B, H, D, generator=generator).to(dtype).transpose(0, 1)
        b = torch.randn(1, T, H, D, generator=generator).to(dtype).expand(B, T, H, D)
        x = torch.randn(B, H, T, E, generator=generator).to(dtype).transpose(1, 2)
    documents = documents_of(T, cu_seqlens, B)
    # Transposed in memory, as the states of the backward are.
    state = torch.randn(len(documents), H, E, D, generator=generator).transpose(-1, -2)
    if not initial:
        state = torch.zeros_like(state)
    common = dict(cu_seqlens=cu_seqlens, reverse=reverse)
    scale_of_states = scale if reverse else 1.0

    with launch_constants(segment_length=segment, MAX_FOLD=fold):
        segment_states, total = kernels.chunk_states(
            b, x, log_decay, scale=scale_of_states, **common
        )
        shape = kernels.segment_states_shape(b.shape, E, cu_seqlens is not None, b.device)
        assert shape == ((0,) if segment_states is None else segment_states.shape)
        alone, no_total = kernels.chunk_states(
            b, x, log_decay, scale=scale_of_states, with_total=False, **common
        )
        assert no_total is None
        assert (alone is not None) == (segment is not None)
        assert_equal(alone, segment_states)
        y = kernels.scan(
            a,
            b,
            x,
            log_decay,
            scale=scale,
            initial_state=state if initial else None,
            segment_states=segment_states,
            **common,
        )
        if cu_seqlens is not None:
            check_state_rows(a, b, x, log_decay, state, segment_states, total, scale, common)
    assert y.dtype == dtype and y.is_contiguous() and total.dtype == torch.float32

    arguments = (a, b, x, log_decay, scale, state, documents, reverse)
    want_y, want_total = token_loop(*arguments, torch.float64)
    if dtype == torch.float32:
        bound_y = bound_total = FP32_BOUND
    else:
        plain_y, plain_total = token_loop(*arguments, dtype)
        allowance = 3 if reverse else 2
        bound_y = allowance * relative_error(plain_y, want_y)
        # The plain version rounds no product of the state; the kernel rounds decayed operands once.
        bound_total = max(allowance * relative_error(plain_total, want_total), 1e-3)
    for h in range(H):
        for name, got, want, bound in (
            ("y", y[:, :, h], want_y[:, :, h], bound_y),
            ("total", total[:, h], want_total[:, h], bound_total),
        ):
            error = relative_error(got, want)
            assert error <= bound, f"{name}, decay {DECAYS[h]}: {error:.3g}, allowed {bound:.3g}"


def assert_equal(states, others):
    """The same bits, with NaN where the poison was left, or both None."""
    if others is None:
        assert states is None
    else:
        torch.testing.assert_close(states, others, rtol=0, atol=0, equal_nan=True)


def check_state_rows(a, b, x, log_decay, state, segment_states, total, scale, common):
    """States of some packed documents alone are those of all, bit for bit."""
    num_documents = len(common["cu_seqlens"]) - 1
    scale_of_total = scale if common["reverse"] else 1.0
    for rows in ((num_documents - 1, 2), (3,), ()):
        states, some = kernels.chunk_states(
            b, x, log_decay, scale=scale_of_total, state_rows=rows, **common
        )
        assert_equal(states, segment_states)
        torch.testing.assert_close(some, total[list(rows)], rtol=0, atol=0)
        entering = torch.zeros_like(state)
        entering[list(rows)] = state[list(rows)]
        initial = torch.cat([state[list(rows)], torch.zeros_like(state[:1])])
        got, want = (
            kernels.scan(
                a, b, x, log_decay, scale=scale, segment_states=segment_states,
                initial_state=given, **options, **common,
            )
            for given, options in ((initial, {"state_rows": rows}), (entering, {}))
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def check_no_decay_same_bits():
    """log_decay None gives the bits of log_decay = 0."""
    a, b, x = torch.randn(3, 1, 100, 2, 16).unbind()
    results = []
    with launch_constants(segment_length=64):
        for log_decay in (None, torch.zeros(2)):
            states, total = kernels.chunk_states(b, x, log_decay)
            y = kernels.scan(a, b, x, log_decay, scale=0.5, segment_states=states)
            results.append((states, total, y))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def check_gradients():
    """Scans in exchanged roles are the gradients that autograd computes for the definition."""
    T, H, D, E, scale = 70, 2, 24, 40, 0.7
    log_decay = torch.tensor([-0.02, -2.0], dtype=torch.float64)
    q, k = torch.randn(2, 1, T, H, D, dtype=torch.float64).unbind()
    v, do = torch.randn(2, 1, T, H, E, dtype=torch.float64).unbind()
    S0, dS = torch.randn(2, 1, H, D, E, dtype=torch.float64).unbind()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, S0)]
    state, rows = S0, []
    for t in range(T):
        state = log_decay.exp()[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        rows.append(scale * torch.einsum("bhd,bhde->bhe", q[:, t], state))
    want = torch.autograd.grad((torch.stack(rows, 1), state), leaves, (do, dS))

    q, k, v, do, S0, dS, log_decay = (
        tensor.detach().float() for tensor in (q, k, v, do, S0, dS, log_decay)
    )
    with launch_constants(segment_length=32):
        forward, _ = kernels.chunk_states(k, v, log_decay)
        backward, dS0 = kernels.chunk_states(q, do, log_decay, reverse=True, scale=scale)
        states = dict(initial_state=S0.mT, segment_states=forward.mT)
        dq = kernels.scan(do, v, k, log_decay, scale=scale, **states)
        states = dict(initial_state=dS, segment_states=backward)
        dk, dv, _ = kernels.scan_dkdv(q, k, v, do, log_decay, scale=scale, **states)
    dS0 = dS0 + (log_decay * T).exp()[:, None, None] * dS
    for name, got, truth in zip(("dq", "dk", "dv", "dS0"), (dq, dk, dv, dS0), want, strict=True):
        error = relative_error(got, truth)
        assert error < FP32_BOUND, f"{name}: {error:.3g}"


def check_dkdv(*, T, D, E, B=1, cu_seqlens=None, segment=None, by_token=False, initial=False):
    """Both results of one launch in fp16, against the definition; dk . k too."""
    H = len(DECAYS)
    generator = torch.Generator().manual_seed(T)
    # q and k, v and do as slices of one projection; a batch of one is expanded.
    qk = torch.randn(B, T, H, 2 * D, generator=generator).half()
    vo = torch.randn(1, T, H, 2 * E, generator=generator).half().expand(B, T, H, 2 * E)
    (q, k), (v, do) = qk.split(D, -1), vo.split(E, -1)
    decay = rates = torch.tensor(DECAYS)
    if by_token:
        rates = -2 * torch.rand(B, T, H, generator=generator) * torch.tensor([0.0, 0.03, 1, 50])
        decay = kernels.prepare_decay(rates)
    documents = documents_of(T, cu_seqlens, B)
    G = torch.randn(len(documents), H, E, D, generator=generator).mT if initial else None
    common = dict(scale=0.3, cu_seqlens=cu_seqlens)
    with launch_constants(segment_length=segment, MAX_FOLD=MAX_FOLD):
        states, _ = kernels.chunk_states(q, do, decay, reverse=True, **common)
        options = dict(initial_state=G, segment_states=states, **common)
        results = kernels.scan_dkdv(q, k, v, do, decay, with_dots=True, **options)
        without = kernels.scan_dkdv(q, k, v, do, decay, **options)
        launched = choose_scan(
            ScanShape(*q.shape, E, cu_seqlens is not None), half, q.device, 2, by_token=by_token
        )
    assert (launched.kernel, launched.num_results) == ("triton", 2)
    dk, dv, dots = results
    assert torch.equal(dk, without[0]) and torch.equal(dv, without[1]) and without[2] is None

    G = torch.zeros(len(documents), H, D, E) if G is None else G
    about = documents, True, torch.float64
    want_dv, _ = token_loop(k, q, do, rates, 0.3, G, *about)
    want_dk, _ = token_loop(v, do, q, rates, 0.3, G.mT, *about)
    want_dots = (want_dk * k.double()).sum(-1).transpose(1, 2)
    for h in range(H):
        for name, got, want, bound in (
            ("dk", dk[:, :, h], want_dk[:, :, h], 1e-3),
            ("dv", dv[:, :, h], want_dv[:, :, h], 1e-3),
            ("dots", dots[:, h, 0], want_dots[:, h], 2e-3),
        ):
            error = relative_error(got, want)
            assert error <= bound, f"{name}, head {h}: {error:.3g}, allowed {bound:.3g}"


def check_empty():
    """No tokens: totals are zero and nothing is launched on an empty grid."""
    for cu_seqlens, documents in ((None, 2), ((0, 0, 0, 0), 3)):
        empty = torch.empty(1 if cu_seqlens else 2, 0, 3, 16)
        segment_states, total = kernels.chunk_states(empty, empty, None, cu_seqlens=cu_seqlens)
        assert segment_states is None
        assert total.shape == (documents, 3, 16, 16) and bool((total == 0).all())
        y = kernels.scan(
            empty, empty, empty, None, scale=1.0, initial_state=total, cu_seqlens=cu_seqlens
        )
        assert y.shape == empty.shape
    no_batch = torch.empty(0, 5, 3, 16)
    assert kernels.chunk_states(no_batch, no_batch, None)[1].shape == (0, 3, 16, 16)


def check_step(D=40, E=72, dtype=torch.float32):
    """One token against the definition, with a transposed state."""
    B, H = 3, len(DECAYS)
    q, k = torch.randn(2, B, 1, H, D).to(dtype).unbind()
    v = torch.randn(B, H, E, 1).to(dtype).squeeze(-1)
    q, k = q[:, 0], k[:, 0]
    state = torch.randn(B, H, E, D).mT
    before = state.clone()
    log_decay = torch.tensor(DECAYS)
    o, new_state = kernels.step(q, k, v, state, log_decay, scale=0.4)
    factor = log_decay.double().exp()[:, None, None]
    want_state = factor * state.double() + k.double()[..., None] * v.double()[..., None, :]
    want = 0.4 * torch.einsum("bhd,bhde->bhe", q.double(), want_state)
    assert o.dtype == dtype
    assert relative_error(new_state, want_state) < 1e-6
    assert relative_error(o, want) < (1e-6 if dtype == torch.float32 else 5e-4)
    assert torch.equal(state, before), "the caller's state was overwritten"


def check_float64_refused():
    """The message names the dtype seen and those allowed."""
    q = torch.zeros(1, 4, 1, 16, dtype=torch.float64)
    for call in (
        lambda: kernels.chunk_states(q, q, None),
        lambda: kernels.scan(q, q, q, None, scale=1.0),
        lambda: kernels.step(q[:, 0], q[:, 0], q[:, 0], torch.zeros(1, 1, 16, 16), None),
    ):
        try:
            call()
        except ValueError as error:
            message = str(error)
        else:
            raise AssertionError("float64 was accepted")
        for word in ("float64", "bfloat16", "float16", "float32"):
            assert word in message, message


PACKED = (0, 1, 1, 16, 32, 49, 149)
LONG_PACKED = (0, 0, 70, 75, 203, 203)
half = torch.float16


def scan_case(**options):
    return lambda: check_scan(**options)


GROUPS = {
    "dense": {
        "one token": scan_case(T=1, D=16, E=16),
        "63 tokens, fused q k v": scan_case(T=63, D=48, E=16),
        "65 tokens, reverse, expanded batch": scan_case(
            T=65, D=16, E=40, B=2, reverse=True, fused=False
        ),
        "100 tokens in segments of 64": scan_case(T=100, D=80, E=96, segment=64),
        "200 tokens in segments of 64, reverse": scan_case(
            T=200, D=16, E=33, B=2, segment=64, reverse=True
        ),
        "200 tokens, more segments than the scan adds up": scan_case(
            T=200, D=16, E=33, B=2, segment=64, fold=1
        ),
        "200 tokens, more segments than the scan adds up, reverse": scan_case(
            T=200, D=16, E=33, B=2, segment=64, reverse=True, fold=1
        ),
        "head dims 200 and 100": scan_case(T=33, D=200, E=100, initial=False),
        "head dims 100 and 200, reverse": scan_case(T=33, D=100, E=200, reverse=True),
        "no decay is decay 0, bit for bit": check_no_decay_same_bits,
        "no tokens": check_empty,
        "float64 is refused": check_float64_refused,
    },
    "packed": {
        "short documents": scan_case(T=149, D=16, E=32, cu_seqlens=PACKED),
        "short documents, reverse": scan_case(T=149, D=32, E=16, cu_seqlens=PACKED, reverse=True),
        "documents in segments of 64": scan_case(
            T=203, D=16, E=32, cu_seqlens=LONG_PACKED, segment=64
        ),
        "documents in segments of 64, reverse": scan_case(
            T=203, D=32, E=16, cu_seqlens=LONG_PACKED, segment=64, reverse=True
        ),
        "documents of up to four segments": scan_case(
            T=203, D=16, E=32, cu_seqlens=LONG_PACKED, segment=32
        ),
        "documents of up to four segments, reverse": scan_case(
            T=203, D=32, E=16, cu_seqlens=LONG_PACKED, segment=32, reverse=True
        ),
        "segments that no document fills": scan_case(
            T=149, D=16, E=32, cu_seqlens=PACKED, segment=128
        ),
    },
    "fp16": {
        "100 tokens, four segments": scan_case(T=200, D=48, E=64, dtype=half, segment=64),
        "100 tokens, four segments, reverse": scan_case(
            T=200, D=64, E=48, dtype=half, segment=64, reverse=True, fused=False, B=2
        ),
        "packed": scan_case(T=149, D=16, E=80, dtype=half, cu_seqlens=PACKED),
        "packed, reverse": scan_case(
            T=149, D=80, E=16, dtype=half, cu_seqlens=PACKED, reverse=True
        ),
        "head dims 256 and 128": scan_case(T=70, D=256, E=128, dtype=half),
        "step": lambda: check_step(dtype=half),
    },
    "dk and dv in one launch": {
        "63 tokens, a state enters": lambda: check_dkdv(T=63, D=64, E=40, B=2, initial=True),
        "200 tokens, segments added up": lambda: check_dkdv(T=200, D=33, E=64, B=2, segment=128),
        "packed": lambda: check_dkdv(
            T=203, D=64, E=64, cu_seqlens=LONG_PACKED, segment=128, initial=True
        ),
        "decay per token": lambda: check_dkdv(
            T=200, D=64, E=33, B=2, segment=128, by_token=True, initial=True
        ),
        "packed, decay per token": lambda: check_dkdv(
            T=203, D=16, E=64, cu_seqlens=LONG_PACKED, segment=64, by_token=True
        ),
    },
    "gradients and step": {
        "dq, dk, dv and the state's gradient": check_gradients,
        "step": check_step,
    },
}


@pytest.mark.timeout(interpreter.TIMEOUT + 100)
@pytest.mark.parametrize(
    ("group", "case"),
    [pytest.param(group, case, id=case) for group, cases in GROUPS.items() for case in cases],
)
def test_matches_token_loop(group, case):
    error = interpreter.errors(__name__, group, groups=tuple(GROUPS))[case]
    assert error is None, error


# Bytes a thread spills in the scan. A state of 256 x 64 alone takes half of all registers, and no
# other tile is better without leaving four warps or tiles of 64; see the launch table.
SPILL_LIMIT = {64: 0, 96: 80, 128: 80, 256: 640}


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (128, 128), (96, 96), (256, 128), (128, 256)]
)
@pytest.mark.parametrize(
    ("reverse", "packed"), [(False, False), (True, True)], ids=["dense", "reverse, packed"]
)
def test_scan_compiles_to_tensor_cores(key_dim, value_dim, reverse, packed, compiled):
    H = 16
    a = torch.zeros(1, 512, H, key_dim, dtype=torch.bfloat16)
    x = torch.zeros(1, 512, H, value_dim, dtype=torch.bfloat16)
    options = dict(cu_seqlens=(0, 300, 512) if packed else None, reverse=reverse)
    states = dict(initial_state=torch.zeros(1 + packed, H, key_dim, value_dim))
    states["segment_states"] = torch.zeros(3, H, key_dim, value_dim)
    with launch_constants(segment_length=128):
        kernels.scan(a, a, x, None, scale=0.3, **states, **options)
    (kernel,) = compiled
    assert_tensor_cores_used_well(kernel)
    assert spilled_bytes(kernel) <= SPILL_LIMIT[key_dim]


@pytest.mark.parametrize(("by_token", "limit"), [(False, 64), (True, 96)])
def test_one_launch_for_dk_and_dv_compiles_to_tensor_cores(by_token, limit, compiled):
    x = torch.zeros(1, 512, 16, 64, dtype=torch.bfloat16)
    decay = torch.zeros(1, 16, 513, dtype=torch.float64) if by_token else None
    states = dict(initial_state=torch.zeros(1, 16, 64, 64))
    states["segment_states"] = torch.zeros(3, 16, 64, 64)
    with launch_constants(segment_length=128):
        kernels.scan_dkdv(x, x, x, x, decay, scale=0.3, with_dots=by_token, **states)
    (kernel,) = compiled
    # Sums of a decay per token are float64.
    assert_tensor_cores_used_well(kernel, frozenset({8, 16} if by_token else {16}))
    assert spilled_bytes(kernel) <= limit


def test_step_does_not_spill(compiled):
    q, v = torch.zeros(1, 4, 256), torch.zeros(1, 4, 128)
    kernels.step(*(x.bfloat16() for x in (q, q, v)), torch.zeros(1, 4, 256, 128))
    (kernel,) = compiled
    assert spilled_bytes(kernel) == 0


if __name__ == "__main__":
    interpreter.report(GROUPS[sys.argv[1]])
