"""LASP-2: every rank gathers all transitions and applies those before its own chunks.

(arXiv 2502.07563.) One collective instead of P - 1 hops, at the price of P states received and held
per rank (zigzag: 2P). Either all ranks take part, or, if no document crosses a boundary, none.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lasp import replay
from lasp.exchange.comm import all_gather_into
from lasp.exchange.topology import ChunkChain, Transition

__all__ = ["all_gather"]


def all_gather(
    chain: ChunkChain, transitions: list[Transition], *, overlapped: bool
) -> Generator[None, None, list[torch.Tensor | None]]:
    """See `lasp.exchange.start`."""
    if not any(chain.same_document(chunk, chunk + 1) for chunk in range(chain.num_chunks)):
        return [None] * len(transitions)
    local = transitions[0].local
    options = dict(dtype=local.dtype, device=local.device)
    message = torch.empty(sum(each.message_size for each in transitions), **options)
    gathered = torch.empty(chain.num_ranks * message.numel(), **options)
    replay.note_call(_pack, message, *(x for each in transitions for x in each))
    collective = _AllGather(chain.group)
    replay.note_call(collective.start, gathered, message)
    yield
    replay.note_call(collective.wait)
    states_in = [
        torch.empty(local.shape, **options) if chain.same_document(chunk - 1, chunk) else None
        for chunk in chain.local_chunks
    ]
    if all(each is None for each in states_in):
        return states_in
    order = []
    for chunk in range(chain.local_chunks[-1]):
        rank = chain.group_rank(chunk)
        index = rank * len(transitions) + chain.chunks_of(rank).index(chunk)
        order.append((index, chain.passes_through(chunk)))
    apply = partial(_apply, tuple(order), chain.local_chunks, transitions[0].factor_shape)
    replay.note_call(apply, gathered, *states_in)
    return states_in


class _AllGather:
    """A collective that is started and waited for, again in every replay."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self._work: dist.Work | None = None

    def start(self, gathered: torch.Tensor, message: torch.Tensor) -> None:
        self._work = all_gather_into(gathered, message, self._group())

    def wait(self) -> None:
        self._work.wait()
        self._work = None


def _pack(message: torch.Tensor, *transitions: torch.Tensor | None) -> None:
    """Write the message of transitions (local, factor, local, factor, ...)."""
    pairs = zip(transitions[::2], transitions[1::2], strict=True)
    torch.cat([Transition(*pair).pack() for pair in pairs], out=message)


def _apply(order, local_chunks, factor_shape, gathered, *states_in) -> None:
    """Write the states that enter this rank's chunks.

    Args:
        order: (index of its transition in `gathered`, whether a state passes through it) of every
            chunk before the last of `local_chunks`.
        states_in: the states to write, None where none enters.
    """
    some = next(each for each in states_in if each is not None)
    like = Transition(some, some.new_empty(factor_shape))
    messages = gathered.view(-1, like.message_size)
    entering = dict(zip(local_chunks, states_in, strict=True))
    state = None
    for chunk in range(len(order) + 1):
        if entering.get(chunk) is not None:
            entering[chunk].copy_(state)
        if chunk < len(order):
            index, passes = order[chunk]
            state = like.unpack(messages[index]).apply(state if passes else None)
