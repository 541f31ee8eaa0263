"""LASP-2: every rank gathers all local states and folds those before it (arXiv 2502.07563).

One collective instead of P - 1 hops, at the price of P states received and held per rank.
"""

from __future__ import annotations

import torch

from lasp.exchange.peers import AffineMaps, Line, all_gather_flat

__all__ = ["AllGather"]


class AllGather:
    """One exchange by all-gather; `finish` folds what came."""

    def __init__(self, local, factor, first, group, reverse):
        self.line = Line(group, reverse)
        self.maps = AffineMaps.like(local, factor)
        self.first = first
        # Only the first rank is given what enters it.
        self.message = self.maps.pack(local, factor, entering=first)
        self.gathered, self.work = all_gather_flat(self.message, group)

    def finish(self) -> torch.Tensor:
        self.work.wait()
        messages = self.gathered.view(self.line.size, -1)
        entering = self.message.new_zeros(self.maps.shape)
        if self.line.place == 0:
            return entering if self.first is None else self.first
        for place in range(self.line.place):
            local, factor = self.maps.unpack(messages[self.line.group_rank(place)])
            entering = torch.addcmul(local, factor, entering)
        return entering
