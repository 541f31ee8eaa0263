"""What must hold exactly, or is known in closed form, whatever the definition says."""

import functools

import pytest
import torch

import lasp
from tests.lasp import cases

with_state = functools.partial(lasp.lightning_attention, output_final_state=True)


def test_the_two_definitions_agree():
    inputs = cases.make_inputs(37, B=2, H=5)
    truth = cases.forward_and_gradients(lasp.reference.recurrent, *inputs, scale=0.3)
    cases.assert_close(cases.expected(*inputs, scale=0.3), truth, 1e-13)


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


def test_gradients_equal_finite_differences():
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
