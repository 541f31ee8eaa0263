"""The operator on a GPU beside plain torch there: what the tests of single kernels share."""

import functools

import torch

import lasp
from tests.lasp import cases

with_state = functools.partial(lasp.lightning_attention, output_final_state=True)


def to_gpu(inputs):
    return [None if x is None else x.cuda() for x in inputs]


def check(inputs, slack_forward=2.0, slack_backward=3.0, **kwargs):
    """The operator on the GPU errs at most 2x (gradients 3x) as much as plain torch there."""
    on_gpu = to_gpu(inputs)
    kwargs = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
    truth = cases.expected(*on_gpu, **kwargs)
    low = [None if x is None else x.to(inputs[0].dtype) for x in on_gpu]
    plain = cases.forward_and_gradients(lasp.reference.quadratic, *low, **kwargs)
    actual = cases.forward_and_gradients(with_state, *on_gpu, **kwargs)
    for name, value in truth.items():
        slack = slack_forward if name in ("o", "state") else slack_backward
        allowed = slack * cases.relative_error(plain[name], value) + 1e-6
        error = cases.relative_error(actual[name], value)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
