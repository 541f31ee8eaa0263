"""What the LRPE kernels compute under Triton's interpreter, against the equation in float64.

Not a test module: test_triton_lrpe.py runs it; see interpreter.py.
"""

from __future__ import annotations

import torch

from lasp.ops.triton.lrpe import MAX_ROWS, TOKENS, lrpe, lrpe_backward
from tests.lasp.cases import relative_error
from tests.lasp.ops import interpreter
from tests.lasp.ops.triton_checks import poison_empty


def equation(x, theta, position):
    """[x cos(theta p), x sin(theta p)] in float64, x [B, T, H, D], theta [H, D]."""
    steps = torch.arange(position, position + x.shape[1], dtype=torch.float64)
    angle = theta * steps[:, None, None]
    return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


def check(B=1, T=1, H=2, D=16, position=0, dtype=torch.float32):
    # Strided, as queries and keys are in the output of one projection.
    q, k, grads_q, grads_k = torch.randn(4, B, T, H, 2, 2 * D).to(dtype).unbind(0)
    q, k = q[..., 0, :D], k[..., 1, :D]
    grads = grads_q[..., 0, :], grads_k[..., 1, :]
    theta = torch.rand(H, D)
    exact = [x.double().requires_grad_() for x in (q, k, theta)]
    wanted = [equation(x, exact[2], position) for x in exact[:2]]
    wanted_grads = torch.autograd.grad(wanted, exact, [x.double() for x in grads])
    outputs = lrpe(q, k, theta, position)
    into = lrpe_backward(*grads, q, k, theta, position)
    bound = 3e-7 if dtype == torch.float32 else 5e-4
    for got, want in zip((*outputs, *into[:2]), (*wanted, *wanted_grads[:2]), strict=True):
        assert got.dtype == dtype
        if T:
            assert relative_error(got, want) < bound
    assert into[2].dtype == torch.float64
    # A small sum of large terms of both signs, weighed by position.
    scale = (position + T) * (B * T) ** 0.5
    assert (into[2] - wanted_grads[2]).abs().max() < 1e-6 * max(scale, 1)


CASES = {
    "no token": lambda: check(T=0),
    "one token far out": lambda: check(B=2, T=1, position=2**22 - 5),
    "63 tokens, half a tile of values": lambda: check(B=3, T=63, H=3, D=24, position=17),
    "100 tokens, 128 values, float16": lambda: check(T=100, D=128, dtype=torch.float16),
    "more tiles than rows": lambda: check(T=TOKENS * MAX_ROWS + 33, H=1, position=2**20 + 17),
}


if __name__ == "__main__":
    poison_empty()
    interpreter.report(CASES)
