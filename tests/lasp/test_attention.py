"""The operator on one device: against the float64 definition, every gradient, odd sizes."""

import functools

import pytest
import torch

import lasp
from tests.lasp import cases

with_state = functools.partial(lasp.lightning_attention, output_final_state=True)
LENGTHS = (1, 2, 63, 64, 65, 100, 128, 129, 1000)


@pytest.mark.parametrize("T", LENGTHS)
def test_matches_the_definition(T, poisoned_memory):
    inputs = cases.make_inputs(T, B=2, H=5)
    truth = cases.expected(*inputs, scale=0.3)
    actual = cases.forward_and_gradients(with_state, *inputs, scale=0.3)
    cases.assert_close(actual, truth, 1e-12, f"T={T}")


def test_the_two_definitions_agree():
    inputs = cases.make_inputs(37, B=2, H=5)
    truth = cases.forward_and_gradients(lasp.reference.recurrent, *inputs, scale=0.3)
    cases.assert_close(cases.expected(*inputs, scale=0.3), truth, 1e-13)


@pytest.mark.parametrize("D, E", [(1, 1), (16, 16), (33, 80), (256, 128), (96, 200)])
def test_any_head_sizes(D, E, poisoned_memory):
    inputs = cases.make_inputs(150, H=2, D=D, E=E, state=False)
    actual = cases.forward_and_gradients(with_state, *inputs)
    cases.assert_close(actual, cases.expected(*inputs), 1e-12, f"D={D} E={E}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_as_good_as_plain_torch(dtype):
    q, k, v, log_decay, state = cases.make_inputs(300, H=5, D=32, E=32, dtype=dtype)
    q, k = q / 4, k / 4
    truth = cases.expected(q, k, v, log_decay, state)
    plain = cases.forward_and_gradients(
        lasp.reference.quadratic, q, k, v, log_decay, state.to(dtype)
    )
    actual = cases.forward_and_gradients(with_state, q, k, v, log_decay, state)
    assert actual["o"].dtype == dtype and actual["state"].dtype == torch.float32
    for name, value in truth.items():
        slack = 2 if name in ("o", "state") else 3
        allowed = slack * cases.relative_error(plain[name], value)
        assert cases.relative_error(actual[name], value) <= allowed, name


def test_autocast_changes_no_bit():
    inputs = cases.make_inputs(70, dtype=torch.float32)
    q, k, v, log_decay, state = inputs
    token = (q[:, 0], k[:, 0], v[:, 0], state, log_decay)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o = lasp.lightning_attention(*inputs[:4], initial_state=state)
            both = cases.forward_and_gradients(with_state, *inputs)
            step = lasp.lightning_attention_step(*token)
            learning = lasp.lightning_attention_step(*token[:3], state.requires_grad_(), log_decay)
        results.append([o, *both.values(), *step, *learning])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "offsets", [[0, 100], [0, 1, 16, 33, 50, 150, 199], [0, 0, 64, 64, 128, 130, 130]], ids=str
)
def test_packed_documents(offsets, poisoned_memory):
    inputs = cases.make_inputs(offsets[-1], N=len(offsets) - 1)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    truth = cases.expected(*inputs, cu_seqlens=cu_seqlens)
    actual = cases.forward_and_gradients(with_state, *inputs, cu_seqlens=cu_seqlens)
    cases.assert_close(actual, truth, 1e-12)


def test_packed_documents_equal_separate_ones():
    q, k, v, log_decay, _ = cases.make_inputs(120, state=False)
    cu_seqlens = torch.tensor([0, 50, 120], dtype=torch.int32)
    packed = lasp.lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens)
    parts = [
        lasp.lightning_attention(q[:, s], k[:, s], v[:, s], log_decay)
        for s in (slice(0, 50), slice(50, 120))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=0, atol=1e-13)


def test_a_split_sequence_continues_from_the_state():
    q, k, v, log_decay, state = cases.make_inputs(500)
    whole, whole_state = with_state(q, k, v, log_decay, initial_state=state)
    outputs = []
    for start, stop in ((0, 1), (1, 130), (130, 130), (130, 500)):
        part = slice(start, stop)
        o, state = with_state(q[:, part], k[:, part], v[:, part], log_decay, initial_state=state)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, whole_state, rtol=1e-11, atol=1e-11)


def test_steps_equal_one_pass():
    q, k, v, log_decay, state = cases.make_inputs(40, B=2, dtype=torch.float32)
    whole, whole_state = with_state(q, k, v, log_decay, initial_state=state, scale=0.5)
    before = state.clone()
    for t in range(40):
        o, state = lasp.lightning_attention_step(
            q[:, t], k[:, t], v[:, t], state, log_decay, scale=0.5
        )
        torch.testing.assert_close(o, whole[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole_state, rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, state)


def test_any_strides_give_the_same_bits():
    q, k, v, log_decay, _ = cases.make_inputs(100, B=2, D=16, E=16, dtype=torch.float32)
    fused = torch.cat([q, k, v], dim=-1)
    views = fused.split(16, dim=-1)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    column_major = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    o = lasp.lightning_attention(q, k, v, log_decay)
    for other in (views, transposed, column_major):
        assert torch.equal(o, lasp.lightning_attention(*other, log_decay))


def test_no_token_sees_the_future():
    q, k, v, log_decay, _ = cases.make_inputs(200, H=5, dtype=torch.float32)
    o = lasp.lightning_attention(q, k, v, log_decay)
    for cut in (1, 64, 128, 129):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, cut:] = torch.randn_like(x[:, cut:])
        assert torch.equal(o[:, :cut], lasp.lightning_attention(*changed, log_decay)[:, :cut])


def test_no_decay_has_the_bits_of_zero_decay():
    q, k, v, _, _ = cases.make_inputs(300, dtype=torch.float32)
    zero = torch.zeros(3)
    assert torch.equal(lasp.lightning_attention(q, k, v), lasp.lightning_attention(q, k, v, zero))


@pytest.mark.parametrize("rate", [0.0, -1e-6, -0.5, -2.0, -50.0])
def test_long_sequences_stay_finite_and_right(rate):
    # With q = k = v = 1 in one dimension the output is a geometric sum, known in closed form.
    T = 2**17
    ones = torch.ones(1, T, 1, 1)
    log_decay = torch.tensor([rate])
    o, state = with_state(ones, ones, ones, log_decay)
    n = torch.arange(1, T + 1, dtype=torch.float64)
    exact_rate = log_decay.double()
    sums = n if rate == 0 else torch.expm1(exact_rate * n) / torch.expm1(exact_rate)
    torch.testing.assert_close(o.flatten().double(), sums, rtol=2e-4, atol=0)
    torch.testing.assert_close(state.flatten().double(), sums[-1:], rtol=2e-4, atol=0)


def test_gradcheck():
    q, k, v, log_decay, state = cases.make_inputs(7, H=2, D=3, E=2)
    leaves = [x.requires_grad_() for x in (q, k, v, state)]

    def function(q, k, v, state):
        return with_state(q, k, v, log_decay, initial_state=state, scale=0.7)

    assert torch.autograd.gradcheck(function, leaves)


def test_output_alone_and_state_alone_have_gradients():
    q, k, v, log_decay, _ = cases.make_inputs(70, state=False)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, state = with_state(*leaves, log_decay)
    both = torch.autograd.grad(o.sum() + state.sum(), leaves, retain_graph=True)
    of_o = torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    of_state = torch.autograd.grad(state.sum(), leaves)
    for total, a, b in zip(both, of_o, of_state, strict=True):
        torch.testing.assert_close(total, a + b)


def test_compiles_without_a_graph_break_and_checkpoints():
    q, k, v, log_decay, state = cases.make_inputs(80, dtype=torch.float32)

    def layer(q, k, v, state):
        o, final = with_state(q * 2, k, v, log_decay, initial_state=state)
        return o.sin(), final

    def run(function):
        return cases.forward_and_gradients(
            lambda q, k, v, _, initial_state: function(q, k, v, initial_state),
            q, k, v, None, state,
        )  # fmt: skip

    truth = run(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    cases.assert_close(run(compiled), truth, 1e-6, "compiled")
    for use_reentrant in (True, False):
        again = run(
            lambda *args, r=use_reentrant: torch.utils.checkpoint.checkpoint(
                layer, *args, use_reentrant=r
            )
        )
        cases.assert_close(again, truth, 0, f"checkpointed, reentrant {use_reentrant}")


@pytest.mark.parametrize("final", [False, True])
def test_shapes_alone(final):
    inputs = [x.to("meta") for x in cases.make_inputs(70, B=2, dtype=torch.bfloat16)]
    leaves = [x.requires_grad_() for x in inputs[:3]]
    o = lasp.lightning_attention(
        *leaves, inputs[3], initial_state=inputs[4], output_final_state=final
    )
    o, state = o if final else (o, inputs[4])
    o.sum().backward()
    assert (o.shape, o.dtype) == (inputs[2].shape, torch.bfloat16)
    assert (state.shape, state.dtype) == (inputs[4].shape, torch.float32)
    assert all(x.grad.is_meta and x.grad.shape == x.shape for x in leaves)


def test_operators_are_registered_soundly():
    q, k, v, log_decay, state = cases.make_inputs(70, dtype=torch.float32)
    alone = (None, "ring", "contiguous", None)
    state_fwd = torch.ops.lasp.state_fwd.default
    torch.library.opcheck(state_fwd, (k, v, log_decay, state, None, 1.0, True, True, *alone))
    entering, segments, final = state_fwd(k, v, log_decay, state, None, 1.0, True, True, *alone)
    rest = (log_decay, state, None, entering, segments, 1.0)
    torch.library.opcheck(torch.ops.lasp.attn_fwd.default, (q, k, v, *rest, *alone))
    rest = (log_decay, state, None, None, entering, segments, 1.0)
    torch.library.opcheck(
        torch.ops.lasp.attn_bwd.default, (v, q, k, v, *rest, True, True, *alone)
    )


def test_whoever_looks_at_operators_sees_them():
    """Elsewhere the steps are called as functions, with the same results."""
    q, k, v, log_decay, state = cases.make_inputs(70, dtype=torch.float32)
    inputs = (q, k, v, log_decay, state)
    alone = cases.forward_and_gradients(with_state, *inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        watched = cases.forward_and_gradients(with_state, *inputs)
    cases.assert_close(watched, alone, 0, "watched")
    seen = {event.name for event in profile.events()}
    assert {"lasp::state_fwd", "lasp::attn_fwd", "lasp::attn_bwd"} <= seen
    seen.clear()

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.name())
            return function(*args, **(kwargs or {}))

    with Mode():
        watched = cases.forward_and_gradients(with_state, *inputs)
    cases.assert_close(watched, alone, 0, "under a mode")
    assert {"lasp::state_fwd", "lasp::attn_fwd", "lasp::attn_bwd"} <= seen
