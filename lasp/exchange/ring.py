"""LASP: the state goes point to point from place to place (arXiv 2404.02882). The default.

A rank receives one state, adds its own and sends one on: P - 1 hops one after another, one state
sent per rank whatever the length of the sequence, memory for one received state. In zigzag the
state goes up the ranks and comes down again: two of each per rank, 2P - 2 hops. A rank whose decay
forgets whatever enters sends before it has received: with all ranks such, it is one hop.

GPUs that reach each other's memory pass the state on by a kernel (see `lasp.exchange.mailbox`),
others by messages of the process group.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.distributed as dist

from lasp.exchange.mailbox import Mailbox, find_mailbox
from lasp.exchange.peers import AffineMap, Line, send

__all__ = ["ring"]

# From so many values of k or v on, dq takes longer than a relay that runs beside it.
LONG = 2**25


def ring(line: Line, maps: list[AffineMap]) -> Generator[None, None, list[torch.Tensor | None]]:
    """See `lasp.exchange.start`."""
    mailbox = find_mailbox(line.group, maps[0].local, line.relay)
    if mailbox is not None:
        return (yield from _by_memory(line, maps, mailbox))
    return (yield from _by_messages(line, maps))


def _by_memory(line: Line, maps: list[AffineMap], mailbox: Mailbox):
    entering, leaving = [], None
    arriving = [
        torch.empty_like(each.local, memory_format=torch.contiguous_format)
        if line.linked(place - 1, place) and place - 1 not in line.here
        else None
        for place, each in zip(line.here, maps, strict=True)
    ]
    # In the backward dq is to be computed meanwhile: a relay that waits for others then gets the
    # few multiprocessors which that leaves free, and takes longer. Not worth it for a short dq; and
    # a state that is known is sent before that begins, for all others wait for it.
    beside = line.reverse and sum(each.length for each in maps) * _width(maps) >= LONG
    beside = beside and any(each is not None for each in arriving)
    with mailbox.on_its_stream():
        for place, each, came in zip(line.here, maps, arriving, strict=True):
            receives, goes_on = came is not None, line.linked(place, place + 1)
            sends = goes_on and place + 1 not in line.here
            if leaving is not None:
                # It comes from this rank's other place, so what leaves is known.
                came = leaving
                each = AffineMap(each.after(came), passes=False)
            if receives or sends:
                mailbox.pass_on(
                    each,
                    came if receives else None,
                    upward=_goes_up(line, place),
                    sends=sends,
                    few=beside,
                )
            if goes_on and not sends:
                leaving = mailbox.lent(each.after(came))
            entering.append(came)
    if line.reverse and not beside:
        mailbox.join()
    yield
    mailbox.join()
    return entering


def _width(maps: list[AffineMap]) -> int:
    """Values of one token of k or v."""
    _, num_heads, D, E = maps[0].local.shape
    return num_heads * max(D, E)


def _goes_up(line: Line, place: int) -> bool:
    """Whether states come to a place from the rank below, and go to the one above."""
    if place + 1 < line.size and place + 1 not in line.here:
        return line.group_rank(place + 1) > line.group_rank(place)
    return line.group_rank(place - 1) < line.group_rank(place)


def _by_messages(line: Line, maps: list[AffineMap]):
    # All ranks post their messages in the order of the places that send them. So they never wait
    # for each other in a circle, even where a backend runs the messages of a rank one by one.
    entering, receiving, sending = [], [], []
    leaving = None
    for place, each in zip(line.here, maps, strict=True):
        came = work = None
        if line.linked(place - 1, place):
            if place - 1 in line.here:
                came = leaving
            else:
                came = torch.empty_like(each.local, memory_format=torch.contiguous_format)
                prev = line.global_rank(place - 1)
                work = dist.irecv(came, src=prev, group=line.group)
                receiving.append(work)
        entering.append(came)
        if not line.linked(place, place + 1):
            continue
        if work is not None and each.passes:
            # Computed here, so that nothing but one sum is left to do once the state has come.
            _ = each.factor
            yield
            receiving.pop().wait()
        leaving = each.after(came).contiguous()
        if place + 1 not in line.here:
            next_rank = line.global_rank(place + 1)
            if (work := send(leaving, next_rank, line.group)) is not None:
                # With what it reads.
                sending.append((work, leaving))
    yield
    for work in [*receiving, *(work for work, _ in sending)]:
        work.wait()
    return entering
