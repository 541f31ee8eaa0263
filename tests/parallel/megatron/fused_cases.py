"""Functions that the ranks run: fused parts beside those that they replace."""

# ruff: noqa: E402 (Megatron is imported after the shim)

from unittest import mock

from torch._dynamo.backends.debugging import aot_eager

from tests.parallel.megatron.cases import (
    build_gpt,
    build_tnl,
    full,
    set_up_groups,
    step,
)
from tests.parallel.megatron.hybrid_cases import build_hybrid

# isort: split
import torch
from megatron.core import parallel_state, tensor_parallel

from parallel.megatron import fuse_cross_entropy, loss

BUILD = {
    "tnl": lambda fields, options: build_tnl(fields, **options),
    "gpt": lambda fields, options: build_gpt(fields, **options),
    "hybrid": build_hybrid,
}
# Names of functions for which graphs were made. The fused functions keep their first compiler.
_graphs = []


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
        model = BUILD[kind](fields, options)
        fuse([model])
        value, grads, _ = step(model, tokens)
        results.append((value, full(model, grads)))
    return results


def fused_gradients(sizes, kind, fields, tokens, options):
    """[(loss, gradients, names of compiled functions)]: first as on a GPU, then as on a CPU."""
    set_up_groups(*sizes)
    compile, results = torch.compile, []

    def by_aot(function, options, **others):
        def backend(graph, inputs):
            _graphs.append(function.__name__)
            return aot_eager(graph, inputs)

        return compile(function, backend=backend, fullgraph=True, **others)

    for how in (lambda x: True, lambda x: False):
        torch._dynamo.reset()
        _graphs.clear()
        with (
            mock.patch("parallel.compile._pays_to_compile", how),
            mock.patch.object(torch, "compile", by_aot),
        ):
            model = BUILD[kind](fields, options)
            fuse_cross_entropy(model)
            value, grads, _ = step(model, tokens)
        results.append((value, full(model, grads), set(_graphs)))
    return results


def refused():
    try:
        fuse_cross_entropy(torch.nn.Linear(2, 2))
    except ValueError as error:
        return str(error)
