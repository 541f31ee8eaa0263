"""Functions that the ranks run: the fused loss beside Megatron's own."""

# ruff: noqa: E402 (Megatron is imported after the shim)

from unittest import mock

from tests.parallel.megatron.cases import (
    build_gpt,
    build_tnl,
    full,
    set_up_groups,
    step,
)

# isort: split
import torch
from megatron.core import parallel_state, tensor_parallel

from parallel.megatron import fuse_cross_entropy, loss


def token_losses(sizes, logits, labels, weights, most):
    """[(losses, gradient of this rank's logits)] of this loss, and of Megatron's own.

    Args:
        logits: [s, b, V] of the full vocabulary.
        labels, weights: [s, b]; the weights are the gradients of the losses.
        most: logits of a kernel.
    """
    set_up_groups(*sizes)
    group = parallel_state.get_tensor_model_parallel_group()

    def ours(x):
        return loss.vocab_parallel_cross_entropy(x, labels, group)

    def megatrons(x):
        # It overwrites its input.
        return tensor_parallel.vocab_parallel_cross_entropy(x.float().clone(), labels.clip(0))

    results = []
    for function in (ours, megatrons):
        local = logits.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
        with mock.patch.object(loss, "_MOST_LOGITS", most):
            losses = function(local)
            (losses * weights).sum().backward()
        results.append((losses.detach(), local.grad))
    return results


def model_losses(sizes, kind, fields, tokens, options):
    """[(loss, gradients)] of a model with this loss, and with Megatron's own."""
    set_up_groups(*sizes)
    results = []
    for fuse in (fuse_cross_entropy, lambda model: None):
        model = {"tnl": build_tnl, "gpt": build_gpt}[kind](fields, **options)
        fuse([model])
        value, grads, _ = step(model, tokens)
        results.append((value, full(model, grads)))
    return results


def refused():
    try:
        fuse_cross_entropy(torch.nn.Linear(2, 2))
    except ValueError as error:
        return str(error)
