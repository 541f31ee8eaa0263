"""Decoding token by token is the definition: the output and the state, in every dtype."""

import pytest
import torch

import lasp
from tests.lasp import cases

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (dtype, largest relative error)
DTYPES = [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
@pytest.mark.parametrize(("D", "E"), [(16, 24), (128, 96), (1, 1)])
@pytest.mark.parametrize("decay", [True, False], ids=["decay", "no_decay"])
def test_steps_equal_the_definition(device, dtype, bound, D, E, decay):
    inputs = cases.make_inputs(40, B=2, H=5, D=D, E=E, dtype=dtype)
    q, k, v, log_decay, state = (x.to(device) for x in inputs)
    q, k, log_decay = q / D**0.25, k / D**0.25, log_decay if decay else None
    doubled = (x.double() for x in (q, k, v))
    wanted, wanted_state = lasp.reference.recurrent(
        *doubled,
        None if log_decay is None else log_decay.double(),
        scale=0.5,
        initial_state=state.double(),
    )
    given, before, outputs = state, state.clone(), []
    for t in range(40):
        o, state = lasp.lightning_attention_step(
            q[:, t], k[:, t], v[:, t], state, log_decay, scale=0.5
        )
        outputs.append(o)
    assert outputs[0].dtype == dtype and state.dtype == torch.float32
    assert cases.relative_error(torch.stack(outputs, 1), wanted) <= bound
    assert cases.relative_error(state, wanted_state) <= 2e-6
    assert torch.equal(given, before), "the caller's state was overwritten"


def decays_of_tokens(T, *shape, dtype=torch.float32):
    """Weak and strong ones, and some that reset the state."""
    generator = torch.Generator().manual_seed(3)
    rates = torch.tensor([0.0, -1e-3, -0.1, -1.0, -torch.inf])
    chosen = torch.randint(0, len(rates), (shape[0], T, *shape[1:]), generator=generator)
    return rates[chosen].to(dtype)


def steps(q, k, v, log_decay, state, **options):
    """(o [B, T, H, E], state) of one step after the other."""
    outputs = []
    for t in range(q.shape[1]):
        tokens = q[:, t], k[:, t], v[:, t]
        o, state = lasp.lightning_attention_step(*tokens, state, log_decay[:, t], **options)
        outputs.append(o)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
def test_steps_with_a_decay_of_their_token_equal_the_definition(device, dtype, bound):
    inputs = cases.make_inputs(40, B=2, H=5, dtype=dtype)
    q, k, v, _, state = (x.to(device) for x in inputs)
    # Of tokens that hold one tensor: its rows have strides.
    log_decay = decays_of_tokens(40, 2, 5).to(device)
    o, last = steps(q / 2, k / 2, v, log_decay, state, scale=0.5)
    doubled = [x.double() for x in (q / 2, k / 2, v, log_decay)]
    want, want_state = lasp.reference.recurrent(*doubled, scale=0.5, initial_state=state.double())
    assert o.dtype == dtype and last.dtype == torch.float32
    assert cases.relative_error(o, want) <= bound
    assert cases.relative_error(last, want_state) <= 2e-6


@pytest.mark.parametrize("device", DEVICES)
def test_steps_have_the_gradients_of_the_whole_sequence(device):
    """Also on a GPU, whose kernel for a step has none."""
    q, k, v, _, state = (x.to(device) for x in cases.make_inputs(12, B=2, dtype=torch.float32))
    log_decay = decays_of_tokens(12, 2, 3).to(device)
    inputs = q, k, v, log_decay, state
    found = cases.forward_and_gradients(lambda *x, initial_state: steps(*x, initial_state), *inputs)
    whole = cases.forward_and_gradients(
        lambda *x, **y: lasp.lightning_attention(*x, **y, output_final_state=True), *inputs
    )
    truth = cases.expected(*inputs)
    assert truth.keys() == found.keys() and "dlog_decay" in truth
    for results in (found, whole):
        cases.assert_close(results, truth, 5e-6)
