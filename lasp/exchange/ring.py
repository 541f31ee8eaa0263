"""LASP: the state goes point to point to the next rank (arXiv 2404.02882). The default.

A rank receives one state, adds its own and sends one on: P - 1 hops one after another, one state
sent per rank whatever the length of the sequence, memory for one received state.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lasp.exchange.peers import Line

__all__ = ["Ring"]


class Ring:
    """One exchange over the ring; `finish` receives, and sends on to the next rank."""

    def __init__(self, local, factor, first, group, reverse):
        self.line = Line(group, reverse)
        self.local, self.factor = local, factor
        self.sending = None
        if self.line.place == 0:
            self.entering = torch.zeros_like(local) if first is None else first
            self._send_on()
        else:
            self.entering = torch.empty_like(local, memory_format=torch.contiguous_format)
            prev = self.line.global_rank(self.line.place - 1)
            self.receiving = dist.irecv(self.entering, src=prev, group=group)

    def finish(self) -> torch.Tensor:
        if self.line.place > 0:
            self.receiving.wait()
            self._send_on()
        # Gloo reads the buffer until the send is done. NCCL keeps the buffer alive by itself, and
        # waiting there would hold this rank's stream until the next rank has come.
        if self.sending is not None and not self.local.is_cuda:
            self.sending.wait()
        return self.entering

    def _send_on(self):
        if self.line.place + 1 == self.line.size:
            return
        leaving = torch.addcmul(self.local, self.factor, self.entering)
        next_rank = self.line.global_rank(self.line.place + 1)
        self.sending = dist.isend(leaving, dst=next_rank, group=self.line.group)
