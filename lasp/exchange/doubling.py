"""Recursive doubling: an exclusive scan in ceil(log2 P) rounds (Hillis and Steele, 1986).

In the round of distance d a place sends the map of the d places that end with itself to the place
d further on, and puts the one it receives in front of what it has. Few hops for many ranks; zigzag
takes one round more.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.distributed as dist

from lasp.exchange.peers import AffineMap, Line, pack, send, unpack

__all__ = ["doubling"]


def doubling(line: Line, maps: list[AffineMap]) -> Generator[None, None, list[torch.Tensor | None]]:
    """See `lasp.exchange.start`."""
    # `windows` are the maps of the places up to and with each of this rank's, `before` those of
    # the places in front of it; both reach as far back as the rounds so far have come.
    windows = [pack(each.local, each.factor) for each in maps]
    before: list[torch.Tensor | None] = [None] * len(maps)
    distance = 1
    while distance < line.size:
        arrived, works = _one_round(line, windows, distance)
        yield
        for work in works:
            work.wait()
        sent, windows = windows, list(windows)
        for i, message in arrived.items():
            earlier = unpack(message, maps[i])
            before[i] = message if before[i] is None else _chain(earlier, before[i], maps[i])
            if line.runs_through(line.here[i]):
                windows[i] = _chain(earlier, sent[i], maps[i])
        distance *= 2
    return [
        None if message is None else unpack(message, each)[0]
        for message, each in zip(before, maps, strict=True)
    ]


def _one_round(line, windows, distance):
    """Begin the messages of one round: ({index of the place here: what comes}, works to wait for).

    The order is that of the sending places on all ranks, as in the ring.
    """
    arrived, works, posted = {}, [], []
    for i, place in enumerate(line.here):
        if line.linked(place - distance, place):
            posted.append((place - distance, i, None))
        if line.linked(place, place + distance):
            posted.append((place, None, windows[i]))
    for source, i, window in sorted(posted, key=lambda message: message[0]):
        target = source + distance
        if source in line.here and target in line.here:
            arrived[line.here.index(target)] = windows[line.here.index(source)]
        elif window is None:
            arrived[i] = torch.empty_like(windows[i])
            rank = line.global_rank(source)
            works.append(dist.irecv(arrived[i], src=rank, group=line.group))
        else:
            if (work := send(window, line.global_rank(target), line.group)) is not None:
                works.append(work)
    return arrived, works


def _chain(earlier, message, like):
    """The map of `earlier` places followed by later ones, as a message."""
    local_0, factor_0 = earlier
    local_1, factor_1 = unpack(message, like)
    return pack(torch.addcmul(local_1, factor_1, local_0), factor_1 * factor_0)
