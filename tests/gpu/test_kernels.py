"""The kernels on a GPU: every dtype, odd sizes, packing, strides, repeats, very long sequences.

The error may be twice that of plain torch in the same dtype against float64, three times for
gradients.
"""

import pytest
import torch

from tests.gpu.kernel_reference import head_errors, plain_attention, plain_scan

DECAYS = (0.0, -1e-4, -0.03, -1.0, -50.0)
H = len(DECAYS)
SCALE = 0.3
HEAD_DIM = dict(o=2, dq=2, dk=2, dv=2, final=1, dS0=1)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def kernels():
    # Imported late, so that collecting these tests needs neither a GPU nor triton.
    from lasp.ops import triton

    return triton


def make_operands(T, D, E, dtype, B=1, N=None, seed=0):
    """(q, k, v, do, S0, dS), q, k, v as slices of one projection, S0 transposed in memory."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    q, k, v = (normal(B, T, H, 2 * D + E) / D**0.25).to(dtype).split([D, D, E], dim=-1)
    do = normal(B, T, H, E).to(dtype)
    S0, dS = normal(N or B, H, E, D).mT, normal(N or B, H, D, E)
    return q, k, v, do, S0, dS


def run_kernels(kernels, q, k, v, do, S0, dS, log_decay, cu_seqlens=None):
    """All results by name, from the kernels as lightning_attention calls them."""
    common = dict(cu_seqlens=cu_seqlens)
    states, local = kernels.chunk_states(k, v, log_decay, **common)
    grads, local_grad = kernels.chunk_states(q, do, log_decay, reverse=True, scale=SCALE, **common)
    # Per document: the decay over all of it.
    ends = (0, q.shape[1]) if cu_seqlens is None else cu_seqlens
    lengths = torch.tensor(ends, device="cuda").diff()
    kept = torch.exp(log_decay[None, :] * lengths[:, None])[..., None, None]
    common["scale"] = SCALE

    back = dict(initial_state=dS, segment_states=grads, **common)
    dk, dv, _ = kernels.scan_dkdv(q, k, v, do, log_decay, **back)
    return dict(
        o=kernels.scan(q, k, v, log_decay, initial_state=S0, segment_states=states, **common),
        dq=kernels.scan(
            do, v, k, log_decay, initial_state=S0.mT, segment_states=_mT(states), **common
        ),
        dk=dk,
        dv=dv,
        final=local + kept * S0,
        dS0=local_grad + kept * dS,
    )


def _mT(states):
    return None if states is None else states.mT


def check(kernels, operands, dtype, cu_seqlens=None):
    log_decay = torch.tensor(DECAYS, device="cuda")
    actual = run_kernels(kernels, *operands, log_decay, cu_seqlens)
    options = dict(log_decay=log_decay, scale=SCALE, cu_seqlens=cu_seqlens)
    truth = plain_attention(*operands, **options)
    plain = plain_attention(*operands, dtype=dtype, **options)
    for name, head_dim in HEAD_DIM.items():
        errors = head_errors(actual[name], truth[name], head_dim)
        if dtype == FP32:
            bounds = torch.full_like(errors, 1e-5)
        else:
            allowance = 2 if name in ("o", "final") else 3
            # A single token's products can be exact in plain torch, never the float32 exponentials.
            bounds = allowance * head_errors(plain[name], truth[name], head_dim) + 1e-6
        # Written so that NaN fails.
        assert bool((errors <= bounds).all()), f"{name}: {errors.tolist()} > {bounds.tolist()}"


@pytest.mark.parametrize(
    ("T", "D", "E", "dtype"),
    [
        (1, 16, 16, BF16),
        (63, 64, 64, BF16),
        (4097, 64, 64, BF16),
        (1000, 33, 64, FP16),
        (100, 48, 80, BF16),
        (1000, 96, 96, BF16),
        (4097, 128, 128, BF16),
        (100, 100, 200, BF16),
        (1000, 256, 128, BF16),
        (1000, 128, 128, FP16),
        (100, 96, 48, FP16),
        (1000, 64, 80, FP32),
        (63, 256, 128, FP32),
    ],
)
def test_dense_matches_float64(kernels, T, D, E, dtype):
    # One token has few roundings to average over.
    check(kernels, make_operands(T, D, E, dtype, B=16 if T == 1 else 2), dtype)


@pytest.mark.parametrize(("D", "E", "dtype"), [(128, 128, BF16), (64, 64, FP16)])
def test_packed_matches_float64(kernels, D, E, dtype):
    # Empty, single-token and odd documents, and one that is cut into segments.
    lengths = (0, 1, 15, 16, 17, 63, 64, 65, 0, 100, 1500, 7, 0)
    cu_seqlens = (0, *torch.tensor(lengths).cumsum(0).tolist())
    operands = make_operands(cu_seqlens[-1], D, E, dtype, N=len(lengths))
    check(kernels, operands, dtype, cu_seqlens)


def test_strides(kernels):
    """Expanded batch, heads before tokens, tokens before batch, and a gradient without strides."""
    B, T, D = 3, 1000, 64
    q, k, v, _, S0, dS = make_operands(T, D, D, BF16, B=B)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    v = v[:1].expand(B, T, H, D)
    do = torch.ones((), dtype=BF16, device="cuda").expand(B, T, H, D)
    check(kernels, (q, k, v, do, S0, dS), BF16)


def test_no_decay_gives_the_bits_of_decay_0(kernels):
    q, k, v, *_ = make_operands(1000, 128, 128, BF16)
    results = []
    for log_decay in (None, torch.zeros(H, device="cuda")):
        states, total = kernels.chunk_states(k, v, log_decay)
        o = kernels.scan(q, k, v, log_decay, scale=SCALE, segment_states=states)
        results.append((states, total, o))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("D", "E"), [(64, 64), (128, 128), (256, 128)])
def test_repeats_give_equal_bits(kernels, D, E):
    operands = make_operands(1000, D, E, BF16, B=2)
    log_decay = torch.tensor(DECAYS, device="cuda")
    first = run_kernels(kernels, *operands, log_decay)
    for _ in range(20):
        again = run_kernels(kernels, *operands, log_decay)
        for name in first:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize(("D", "E", "dtype"), [(128, 128, BF16), (96, 200, FP16), (16, 48, FP32)])
def test_step_matches_float64(kernels, D, E, dtype):
    B = 3
    q, k, v, _, state, _ = make_operands(B, D, E, dtype)
    q, k, v, state = q[0], k[0], v[0], state.expand(B, -1, -1, -1)
    log_decay = torch.tensor(DECAYS, device="cuda")
    o, new_state = kernels.step(q, k, v, state, log_decay, scale=SCALE)
    factor = log_decay.double().exp()[:, None, None]
    want = factor * state.double() + k.double()[..., None] * v.double()[..., None, :]
    want_o = SCALE * torch.einsum("bhd,bhde->bhe", q.double(), want)
    assert bool((head_errors(new_state, want, 1) <= 1e-6).all())
    # The output is rounded once.
    assert bool((head_errors(o, want_o, 1) <= torch.finfo(dtype).eps + 1e-6).all())


def test_a_million_tokens(kernels):
    """Weak decays over 2**20 tokens: rounding errors must not accumulate over segments."""
    T, D = 2**20, 64
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1, T, 2, D, generator=generator, device="cuda").to(BF16).unbind()
    log_decay = torch.tensor([0.0, -1e-5], device="cuda")
    zero = torch.zeros(2, D, D, device="cuda")
    for reverse in (False, True):
        states, total = kernels.chunk_states(
            k, v, log_decay, reverse=reverse, scale=SCALE if reverse else 1.0
        )
        assert states is not None
        y = kernels.scan(q, k, v, log_decay, scale=SCALE, segment_states=states, reverse=reverse)
        flipped = [operand[0].flip(0) if reverse else operand[0] for operand in (q, k, v)]
        options = dict(log_decay=log_decay, scale=SCALE, reverse=reverse, block=1024)
        want_y, want_total = plain_scan(*flipped, zero, dtype=torch.float64, **options)
        plain_y, _ = plain_scan(*flipped, zero, dtype=BF16, **options)
        y = y[0].flip(0) if reverse else y[0]
        bounds = 2 * head_errors(plain_y, want_y, 1)
        assert bool((head_errors(y, want_y, 1) <= bounds).all())
        assert bool((head_errors(total[0], want_total, 0) <= 4e-3).all())


def test_tensors_of_more_than_2_to_31_elements(kernels):
    """One operand in all roles: 2**31 elements and some rows, 4.3 GB, and as much of output."""
    heads, D, near = 32, 64, 512
    T = 2**20 + 65
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    x = torch.empty(1, T, heads, D, dtype=BF16, device="cuda").normal_()
    # Strong enough that tokens further away than `near` have no part in the results looked at.
    log_decay = torch.linspace(-0.1, -2.0, heads, device="cuda")
    zero = torch.zeros(heads, D, D, device="cuda")
    for reverse in (False, True):
        states, total = kernels.chunk_states(x, x, log_decay, reverse=reverse)
        y = kernels.scan(x, x, x, log_decay, scale=1.0, segment_states=states, reverse=reverse)
        # The tokens scanned last: the end of the tensor forward, its beginning in reverse.
        part = x[0, :near].flip(0) if reverse else x[0, -near:]
        tail = y[0, :64].flip(0) if reverse else y[0, -64:]
        options = dict(log_decay=log_decay, scale=1.0, reverse=reverse, block=64)
        want_y, want_total = plain_scan(*[part] * 3, zero, dtype=torch.float64, **options)
        plain_y, plain_total = plain_scan(*[part] * 3, zero, dtype=BF16, **options)
        bounds = 2 * head_errors(plain_y[-64:], want_y[-64:], 1)
        assert bool((head_errors(tail, want_y[-64:], 1) <= bounds).all())
        bounds = 2 * head_errors(plain_total, want_total, 0)
        assert bool((head_errors(total[0], want_total, 0) <= bounds).all())
        # Every element is written.
        assert not any(bool(rows.isnan().any()) for rows in y[0].split(2**16))
        del y


def test_float64_is_refused(kernels):
    q = torch.zeros(1, 4, 1, 16, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match="float64.*bfloat16.*float16.*float32"):
        kernels.scan(q, q, q, None, scale=1.0)
