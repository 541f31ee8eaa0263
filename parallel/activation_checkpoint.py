"""Activation checkpointing that never repeats an exchange between ranks.

A block recomputed in the backward would exchange its state a second time, in the middle of the
backward's own exchange. The exchange is one dispatcher operator whose result is small (one d x d
state per head): checkpointing saves it, so that recomputation needs no other rank.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

__all__ = [
    "EXCHANGE_OPS",
    "ReplayExchanges",
    "checkpoint_blocks",
    "checkpointed",
    "keeping_exchanges",
]

# The operators whose results are saved, by name, so that this module imports none of them.
# A softmax layer saves its output: this spares a second gather and the quadratic work.
EXCHANGE_OPS = ("lasp::state_fwd", "lasp::softmax_fwd", "lasp::halo_fwd")
# Slow to recompute for their size. The other operators of a block (norms, gates, activations) are
# cheap, and their results take as much memory again.
_EXPENSIVE_OPS = ("lasp::attn_fwd", "aten::mm", "aten::addmm", "aten::bmm")
# The largest values from which FP8 scales are computed (parallel.float8): a number per tensor or
# row, for a pass over the tensor. TNL-1b, 32,768 tokens, full: a step of 356 ms takes 351.
_SCALE_OPS = ("aten::max", "aten::amax")
_SAVED_OPS = {
    "full": EXCHANGE_OPS + _SCALE_OPS,
    "selective": EXCHANGE_OPS + _SCALE_OPS + _EXPENSIVE_OPS,
}


def checkpoint_blocks(blocks: Sequence[nn.Module], mode: str) -> None:
    """Make every block recompute its activations in the backward; in place, names unchanged.

    Args:
        blocks: of a model.
        mode: "none"; "full": a block saves its input, the results of its exchanges and the scales
            of its FP8 products; "selective": also the results of matrix products and of attention.

    Raises:
        ValueError: another mode.
    """
    if mode != "none":
        for block in blocks:
            checkpointed(block, mode)


def checkpointed(block: nn.Module, mode: str = "full") -> nn.Module:
    """`checkpoint_blocks` for one block; returns the block."""
    if mode not in _SAVED_OPS:
        raise ValueError(f"mode is {mode!r}: it must be none, full or selective.")
    contexts = functools.partial(
        create_selective_checkpoint_contexts, functools.partial(_policy, _SAVED_OPS[mode])
    )

    # Not a partial of `checkpoint`: torch.compile does not trace into that.
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            type(self).forward,
            self,
            *args,
            use_reentrant=False,
            context_fn=contexts,
            # Blocks draw no random numbers: dropout (lasp.tnl.dropout) is a function of positions.
            preserve_rng_state=False,
            **kwargs,
        )

    block.forward = types.MethodType(forward, block)
    return block


def _policy(
    saved: tuple[str, ...], ctx: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    is_saved = op.name().split(".")[0] in saved
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def keeping_exchanges(function: Callable) -> Callable:
    """`function` for one call of a checkpoint that takes no policy, reentrant or not.

        y = torch.utils.checkpoint.checkpoint(keeping_exchanges(block), x, use_reentrant=True)

    The first run records the results of exchanges; later runs replay them and communicate nothing.
    """
    recorded: list[Any] | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal recorded
        with ReplayExchanges(recorded) as exchanges:
            result = function(*args, **kwargs)
        recorded = exchanges.results
        return result

    return run


class ReplayExchanges(TorchDispatchMode):
    """Records the results of exchanges in `results`; given such a list, replays it in order.

    Args:
        recorded: the `results` of an earlier run, which then exchanges nothing; None: record.
    """

    def __init__(self, recorded: list[Any] | None = None) -> None:
        super().__init__()
        self.results = [] if recorded is None else recorded
        self._replay = None if recorded is None else iter(recorded)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_exchange = func.name().split(".")[0] in EXCHANGE_OPS
        if is_exchange and self._replay is not None:
            return next(self._replay)
        result = func(*args, **(kwargs or {}))
        if is_exchange:
            self.results.append(result)
        return result
