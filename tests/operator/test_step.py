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
