"""Recursive doubling: an exclusive scan in ceil(log2 P) rounds (Hillis and Steele, 1986).

In the round of distance d a chunk sends the transition of the d chunks that end with itself to the
chunk d further on, and puts the one it receives before its own. It needs few hops for many ranks;
zigzag takes one round more.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.distributed as dist

from lasp import replay
from lasp.exchange.comm import send
from lasp.exchange.topology import ChunkChain, Transition

__all__ = ["doubling"]


def doubling(
    chain: ChunkChain, transitions: list[Transition], *, overlapped: bool
) -> Generator[None, None, list[torch.Tensor | None]]:
    """See `lasp.exchange.start`."""
    replay.refuse()
    # `inclusive` holds the transitions of the chunks up to and with each of this rank's,
    # `exclusive` those of the chunks before it, both covering the chunks combined so far.
    inclusive = [each.pack() for each in transitions]
    exclusive: list[torch.Tensor | None] = [None] * len(transitions)
    distance = 1
    while distance < chain.num_chunks:
        received, works = _start_round(chain, inclusive, distance)
        yield
        for work in works:
            work.wait()
        sent, inclusive = inclusive, list(inclusive)
        for i, message in received.items():
            earlier, like = transitions[i].unpack(message), transitions[i]
            before = exclusive[i]
            exclusive[i] = message if before is None else _compose(earlier, like.unpack(before))
            if chain.passes_through(chain.local_chunks[i]):
                inclusive[i] = _compose(earlier, like.unpack(sent[i]))
        distance *= 2
    return [
        None if message is None else each.unpack(message).local
        for message, each in zip(exclusive, transitions, strict=True)
    ]


def _start_round(chain, inclusive, distance):
    """Start the messages of one round: ({index of a local chunk: its message}, works to wait for).

    The messages are posted in the order of the sending chunks over all ranks, as in the ring.
    """
    local = chain.local_chunks
    received, works, posted = {}, [], []
    for i, chunk in enumerate(local):
        if chain.same_document(chunk - distance, chunk):
            posted.append((chunk - distance, i, None))
        if chain.same_document(chunk, chunk + distance):
            posted.append((chunk, None, inclusive[i]))
    for source, i, message in sorted(posted, key=lambda each: each[0]):
        target = source + distance
        if source in local and target in local:
            received[local.index(target)] = inclusive[local.index(source)]
        elif message is None:
            received[i] = torch.empty_like(inclusive[i])
            rank = chain.global_rank(source)
            works.append(dist.irecv(received[i], src=rank, group=chain.group))
        elif (work := send(message, chain.global_rank(target), chain.group)) is not None:
            works.append(work)
    return received, works


def _compose(earlier: Transition, later: Transition) -> torch.Tensor:
    """The transition of `earlier` chunks followed by `later` ones, as a message."""
    local = torch.addcmul(later.local, later.factor, earlier.local)
    return Transition(local, later.factor * earlier.factor).pack()
