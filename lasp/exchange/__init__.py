"""How a state crosses ranks. Collectives only: no attention arithmetic.

What ranks compute together is an exclusive scan of affine maps. Rank i of P turns the state that
enters it into factor_i * state + local_i and hands that to the next rank:

    entering_0 = first,   entering_{i+1} = factor_i * entering_i + local_i

with `local` [N, H, D, E] from the rank's own tokens and `factor` [H, 1, 1] the decay over all of
them (LASP, arXiv 2404.02882, algorithms 2 and 3). In the backward the ranks stand in reverse
order. Every exchange is started, lets other work run, and is finished:

    pending = start(local, factor, first, group, method="ring", reverse=False)
    ...                          # work that needs no remote state
    entering = pending.finish()

Shards may be uneven or empty: an empty one has factor 1 and local 0. States travel in float32.
"""

from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from lasp.exchange import guard
from lasp.exchange.all_gather import AllGather
from lasp.exchange.doubling import Doubling
from lasp.exchange.peers import Line, device_types
from lasp.exchange.ring import Ring

__all__ = ["METHODS", "Pending", "device_types", "guard", "start"]

METHODS = {"all_gather": AllGather, "doubling": Doubling, "ring": Ring}


class Pending(Protocol):
    """An exchange under way."""

    def finish(self) -> torch.Tensor:
        """The state that enters this rank, shaped like `local`."""
        ...


def start(
    local: torch.Tensor,
    factor: torch.Tensor,
    first: torch.Tensor | None,
    group: ProcessGroup,
    *,
    method: str = "ring",
    reverse: bool = False,
) -> Pending:
    """Begin an exchange; it runs until `finish` of what is returned.

    Args:
        local: float32 [N, H, D, E], this rank's own contribution.
        factor: float32 [H, 1, 1], what becomes of a state that crosses this rank.
        first: the state that enters the first rank in scan order, or None for zero; other ranks
            pass None.
        group: the ranks, of which this is one; order is group rank.
        method: "ring", "all_gather" or "doubling".
        reverse: scan from the last rank to the first.
    """
    assert first is None or Line(group, reverse).place == 0
    return METHODS[method](local, factor, first, group, reverse)
