"""Segments on a GPU: pinned host memory, Triton kernels, bfloat16, compiled blocks."""

import pytest
import torch

from lasp.tnl import TNL, TNLConfig, TNLState
from parallel.compile import compile_blocks
from parallel.loss import chunked_cross_entropy
from parallel.streaming import backward_in_segments

TOKENS, LENGTH = 20_000, 4096


def losses_and_gradients(compiled, keep_on):
    """Of one pass, and of segments; the last one is shorter."""
    torch.manual_seed(0)
    config = TNLConfig(vocab_size=256, dim=256, num_layers=3, num_heads=4, glu_dim=512)
    model = TNL(config).cuda()
    if compiled:
        compile_blocks(model.blocks)
    tokens, labels = torch.randint(256, (2, 1, TOKENS), device="cuda")
    found = []
    for in_segments in (False, True):
        model.zero_grad()

        def run(index, states, *, states_only, length=LENGTH if in_segments else TOKENS):
            part = slice(index * length, (index + 1) * length)
            states = model.initial_states().layers if states is None else states
            before = TNLState(list(states), index * length)
            with torch.autocast("cuda", torch.bfloat16):
                if states_only:
                    return None, model(tokens[:, part], states=before, states_only=True).layers
                hidden, after = model(
                    tokens[:, part], states=before, return_states=True, return_hidden=True
                )
                loss = chunked_cross_entropy(hidden, model.head_weight, labels[:, part])
            return loss, after.layers

        count = -(-TOKENS // LENGTH) if in_segments else 1
        loss, _ = backward_in_segments(run, count, loss_scale=1 / TOKENS, keep_on=keep_on)
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    return found


@pytest.mark.parametrize(("compiled", "keep_on"), [(False, "device"), (True, "host")])
def test_gradients_are_those_of_one_pass(compiled, keep_on):
    (expected_loss, expected), (loss, found) = losses_and_gradients(compiled, keep_on)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name, each in expected.items():
        # A rate's gradient is a small sum of large terms of both signs, weighed by position: over
        # 20,000 tokens in bfloat16, rounding. tests/parallel/test_streaming.py compares it.
        if not name.endswith("theta"):
            error = (found[name] - each).norm() / each.norm()
            assert error < 0.02, f"{name} is off by {error:.1e}"
