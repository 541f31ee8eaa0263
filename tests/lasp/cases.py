"""Inputs and comparisons that the operator's tests share."""

from __future__ import annotations

import torch

import lasp

# From hardly any memory to none at all, and no decay.
RATES = (0.0, -1e-4, -0.03, -1.0, -50.0)


def make_inputs(T, *, B=1, H=3, D=16, E=24, dtype=torch.float64, seed=0, state=True, N=None):
    """(q, k, v, log_decay, initial_state), random; initial_state None unless `state`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(B, T, H, D), normal(B, T, H, D), normal(B, T, H, E)
    log_decay = torch.tensor([RATES[(h + seed) % len(RATES)] for h in range(H)])
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    initial_state = normal(N or B, H, D, E, dtype=state_dtype) if state else None
    return q, k, v, log_decay, initial_state


def make_output_grads(o, final_state, seed=1):
    """Random gradients for an output and a state, the same for every implementation."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        for x in (o, final_state)
    )


def forward_and_gradients(function, q, k, v, log_decay, initial_state, with_final=True, **kwargs):
    """All that an implementation computes, by name: o, state, dq, dk, dv, dinitial; without the
    final state also the gradients are of o alone."""
    leaves = dict(dq=q, dk=k, dv=v, dinitial=initial_state)
    if log_decay is not None and log_decay.dim() > 1:
        leaves["dlog_decay"] = log_decay
    leaves = {
        name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None
    }
    o, state = function(
        *(leaves[name] for name in ("dq", "dk", "dv")),
        leaves.get("dlog_decay", log_decay),
        initial_state=leaves.get("dinitial"),
        **kwargs,
    )
    do, dstate = make_output_grads(o, state)
    torch.autograd.backward((o, state), (do, dstate if with_final else torch.zeros_like(dstate)))
    results = dict(o=o.detach(), state=state.detach())
    if not with_final:
        del results["state"]
    return results | {name: leaf.grad for name, leaf in leaves.items()}


def expected(q, k, v, log_decay, initial_state, **kwargs):
    """The same by the definition in float64."""
    doubled = [x.double() if x is not None else None for x in (q, k, v, log_decay, initial_state)]
    return forward_and_gradients(lasp.reference.quadratic, *doubled, **kwargs)


def relative_error(actual, truth):
    """||actual - truth|| / ||truth||; NaN anywhere gives NaN, which no bound accepts."""
    difference = (actual.double() - truth.double()).norm()
    return float(difference / truth.double().norm().clamp_min(1e-30))


def assert_close(actual, truth, bound, what=""):
    """Every named result within `bound` (a number, or one per name) of the truth."""
    assert actual.keys() == truth.keys()
    for name in truth:
        assert actual[name].shape == truth[name].shape, f"{what} {name}"
        limit = bound[name] if isinstance(bound, dict) else bound
        if truth[name].numel() == 0:
            continue
        error = relative_error(actual[name], truth[name])
        assert error <= limit, f"{what} {name}: relative error {error:.3g}, allowed {limit:.3g}"
