"""How a state crosses ranks. Collectives only: no attention arithmetic.

What ranks compute together is an exclusive scan of affine maps over the places of the sequence
(`lasp.shard`: one per rank, or two in zigzag). Place i turns the state that enters it into
factor_i * state + local_i and hands that to the next place:

    entering_0 = 0,   entering_{i+1} = factor_i * entering_i + local_i

with `local` [B, H, D, E] from the place's own tokens and `factor` [H, 1, 1] the decay over all of
them (LASP, arXiv 2404.02882, algorithms 2 and 3). In the backward the places stand in reverse
order. Every exchange is started, lets other work run, and is finished:

    pending = start(maps, Line(group), method="ring")
    ...                          # work that needs no remote state
    entering = pending.finish()

Shards may be uneven or empty: an empty one has factor 1 and local 0. States travel in float32.
Where documents are packed, a state crosses a border only inside a document that does.

Which one: the ring. A rank goes on as soon as its own state is there, so the ranks of a ring stand
staggered and its P - 1 hops are paid once per pass; and GPUs of one host pass a state on in memory
(`lasp.exchange.mailbox`), which no other exchange does. Where they cannot, and something holds the
ranks level between layers, `all_gather` (one collective) is faster on few ranks and `doubling` on
many; "auto" chooses so. benchmarks/sequence_parallel.py measures, benchmarks/cost_model.py counts.

A method is a generator: it begins what it can, yields where it would first wait, and returns what
enters each place of this rank.
"""

from __future__ import annotations

import torch

from lasp.exchange import guard
from lasp.exchange.all_gather import all_gather
from lasp.exchange.doubling import doubling
from lasp.exchange.mailbox import find_mailbox
from lasp.exchange.peers import AffineMap, Line, device_types
from lasp.exchange.ring import ring

__all__ = ["METHODS", "AffineMap", "Line", "Pending", "device_types", "guard", "start"]

# By messages the ring was measured to be the fastest of two ranks, and all_gather of four; the rest
# is what the cost model says.
_FEW_RANKS = 8


def auto(line: Line, maps: list[AffineMap]):
    """The ring in shared memory or between two ranks, all_gather on few, doubling on many."""
    chosen = all_gather if line.num_ranks <= _FEW_RANKS else doubling
    if line.num_ranks <= 2 or find_mailbox(line.group, maps[0].local, line.relay) is not None:
        chosen = ring
    return (yield from chosen(line, maps))


METHODS = {"all_gather": all_gather, "auto": auto, "doubling": doubling, "ring": ring}


class Pending:
    """An exchange under way."""

    def __init__(self, steps, line: Line) -> None:
        self._steps, self._reverse, self._group = steps, line.reverse, line.group
        self._entering = None
        self._advance()

    def finish(self) -> list[torch.Tensor | None]:
        """The states that enter this rank's places, in sequence order, shaped like `local`; None
        where nothing comes in. To be called once, on every rank."""
        while self._steps is not None:
            self._advance()
        return self._entering[::-1] if self._reverse else self._entering

    def _advance(self):
        try:
            # The range costs the host microseconds also where nobody looks.
            if torch.autograd.profiler._is_profiler_enabled:
                direction = "backward" if self._reverse else "forward"
                with torch.profiler.record_function(f"lasp::exchange.{direction}"):
                    next(self._steps)
            else:
                next(self._steps)
        except StopIteration as end:
            self._steps, self._entering = None, end.value
            guard.count_exchange(self._group)


def start(maps: list[AffineMap], line: Line, *, method: str = "ring") -> Pending:
    """Begin an exchange; it runs until `finish` of what is returned.

    Args:
        maps: one per place of this rank, in sequence order. What enters the sequence from outside
            is worked into the first `local` by the caller.
        line: the places, their ranks and the direction.
        method: "ring", "all_gather", "doubling" or "auto".
    """
    assert len(maps) == len(line.here)
    return Pending(METHODS[method](line, maps[::-1] if line.reverse else maps), line)
