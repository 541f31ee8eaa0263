"""Recursive doubling: an exclusive scan in ceil(log2 P) rounds (Hillis and Steele, 1986).

In the round of distance d a rank sends the map of the d ranks that end with itself to the rank d
places on, and puts the one it receives in front of what it has. Few hops for many ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lasp.exchange.peers import AffineMaps, Line

__all__ = ["Doubling"]


class Doubling:
    """One exchange by doubling; the first round runs from the start, the others in `finish`."""

    def __init__(self, local, factor, first, group, reverse):
        self.line = Line(group, reverse)
        self.maps = AffineMaps.like(local, factor)
        self.first = first
        # `window` is the map of the ranks up to and with this one, `before` that of those in front
        # of it; both reach as far back as the rounds so far have come.
        self.window = self.maps.pack(local, factor, entering=first)
        self.before = None
        self.distance = 1
        self._launch()

    def finish(self) -> torch.Tensor:
        while self.distance < self.line.size:
            self._absorb()
            self.distance *= 2
            self._launch()
        if self.line.place == 0:
            return self.window.new_zeros(self.maps.shape) if self.first is None else self.first
        return self.maps.unpack(self.before)[0]

    def _launch(self):
        """Send to the rank `distance` places on, receive from the one as far back."""
        self.sending = self.receiving = None
        if self.distance >= self.line.size:
            return
        group, place = self.line.group, self.line.place
        if place >= self.distance:
            self.received = torch.empty_like(self.window)
            prev = self.line.global_rank(place - self.distance)
            self.receiving = dist.irecv(self.received, src=prev, group=group)
        if place + self.distance < self.line.size:
            next_rank = self.line.global_rank(place + self.distance)
            self.sending = dist.isend(self.window, dst=next_rank, group=group)

    def _absorb(self):
        if self.receiving is not None:
            self.receiving.wait()
            before = self.before
            self.before = self.received if before is None else self._chain(self.received, before)
            window = self._chain(self.received, self.window)
        else:
            window = self.window
        # Gloo reads the sent buffer until the send is done; see `Ring.finish` for NCCL.
        if self.sending is not None and not self.window.is_cuda:
            self.sending.wait()
        self.window = window

    def _chain(self, earlier, later):
        """The map of `earlier` ranks followed by `later` ones."""
        local_0, factor_0 = self.maps.unpack(earlier)
        local_1, factor_1 = self.maps.unpack(later)
        return self.maps.pack(torch.addcmul(local_1, factor_1, local_0), factor_1 * factor_0)
