"""LASP-2: every rank gathers all maps and folds those before it (arXiv 2502.07563).

One collective instead of P - 1 hops, at the price of P states received and held per rank (zigzag:
2P). All ranks take part, or none where no document crosses a border.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from lasp.exchange.peers import AffineMap, Line, all_gather_flat, pack, unpack

__all__ = ["all_gather"]


def all_gather(
    line: Line, maps: list[AffineMap]
) -> Generator[None, None, list[torch.Tensor | None]]:
    """See `lasp.exchange.start`."""
    if not any(line.linked(place, place + 1) for place in range(line.size)):
        return [None] * len(maps)
    message = pack(*(x for each in maps for x in (each.local, each.factor)))
    gathered, work = all_gather_flat(message, line.group)
    yield
    work.wait()
    messages = gathered.view(line.num_ranks, len(maps), -1)
    leaving, entering = None, []
    for place in range(line.here[-1] + 1):
        linked = line.linked(place - 1, place)
        if place in line.here:
            # Not a view: it would keep all that was gathered.
            entering.append(leaving.clone() if linked else None)
        rank = line.group_rank(place)
        local, factor = unpack(messages[rank, line.places_of(rank).index(place)], maps[0])
        passes = leaving is not None and line.runs_through(place)
        leaving = torch.addcmul(local, factor, leaving) if passes else local
    return entering
