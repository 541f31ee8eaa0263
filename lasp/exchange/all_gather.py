"""LASP-2: every rank gathers all local states and folds those before it (arXiv 2502.07563).

One collective instead of P - 1 hops, at the price of P states received and held per rank.
"""

from __future__ import annotations

import torch

from lasp.exchange.peers import Line, all_gather_flat

__all__ = ["AllGather"]


class AllGather:
    """One exchange by all-gather; `finish` folds what came."""

    def __init__(self, local, factor, first, group, reverse):
        self.line = Line(group, reverse)
        self.shape, self.num_factors = local.shape, factor.numel()
        self.first = first
        if self.line.place == 0 and first is not None:
            local = torch.addcmul(local, factor, first)
        # The decay over a rank's tokens travels with its state: shards may be uneven.
        self.message = torch.cat([local.flatten(), factor.flatten()])
        self.gathered, self.work = all_gather_flat(self.message, group)

    def finish(self) -> torch.Tensor:
        self.work.wait()
        messages = self.gathered.view(self.line.size, -1)
        entering = self.message.new_zeros(self.shape)
        if self.line.place == 0:
            return entering if self.first is None else self.first
        for place in range(self.line.place):
            message = messages[self.line.group_rank(place)]
            local = message[: -self.num_factors].view(self.shape)
            factor = message[-self.num_factors :].view(-1, 1, 1)
            entering = torch.addcmul(local, factor, entering)
        return entering
