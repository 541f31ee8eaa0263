"""LASP-2: every rank gathers all transitions and applies those before its own chunks.

(arXiv 2502.07563.) One collective instead of P - 1 hops, at the price of P states received and held
per rank (zigzag: 2P). Either all ranks take part, or, if no document crosses a boundary, none.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from lasp import replay
from lasp.exchange.comm import all_gather_flat
from lasp.exchange.topology import ChunkChain, Transition

__all__ = ["all_gather"]


def all_gather(
    chain: ChunkChain, transitions: list[Transition], *, overlapped: bool
) -> Generator[None, None, list[torch.Tensor | None]]:
    """See `lasp.exchange.start`."""
    replay.refuse()
    if not any(chain.same_document(chunk, chunk + 1) for chunk in range(chain.num_chunks)):
        return [None] * len(transitions)
    message = torch.cat([each.pack() for each in transitions])
    gathered, work = all_gather_flat(message, chain.group)
    yield
    work.wait()
    messages = gathered.view(chain.num_ranks, len(transitions), -1)
    state, states_in = None, []
    for chunk in range(chain.local_chunks[-1] + 1):
        if chunk in chain.local_chunks:
            # Cloned: a view would keep everything that was gathered.
            enters = chain.same_document(chunk - 1, chunk)
            states_in.append(state.clone() if enters else None)
        rank = chain.group_rank(chunk)
        message = messages[rank, chain.chunks_of(rank).index(chunk)]
        each = transitions[0].unpack(message)
        state = each.apply(state if chain.passes_through(chunk) else None)
    return states_in
