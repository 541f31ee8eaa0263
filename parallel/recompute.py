"""Activation checkpointing that never repeats a state exchange.

A recomputed block would send and receive its state a second time, in the middle of the backward's
own exchange. The operator's exchange is one dispatcher op, `torch.ops.lasp.enter`; its output (one
d x d state per head) is kept, so that the recomputation finds it and stays on its own device.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = ["checkpointed"]

# By name and not by object, so that this module needs no import of the operator. A softmax layer
# keeps its output: that spares a second gathering, and the quadratic work.
_KEPT = ("lasp::enter", "lasp::finish", "lasp::softmax_attend", "lasp::start")


def checkpointed(block: nn.Module) -> nn.Module:
    """Make `block` recompute its activations in the backward; the same module, same names.

    Everything is recomputed except the state exchanges, whose outputs are saved.
    """
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    block.forward = functools.partial(
        checkpoint,
        block.forward,
        use_reentrant=False,
        context_fn=contexts,
        # Blocks draw no random numbers.
        preserve_rng_state=False,
    )
    return block


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op.name().split(".")[0] in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
