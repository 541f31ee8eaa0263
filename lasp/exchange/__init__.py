"""How a state crosses ranks. This package does not depend on attention or decay.

The ranks compute an exclusive scan of affine maps over the chunks of the sequence (`lasp.shard`:
one per rank, or two in zigzag). Chunk i turns the state that enters it into the state that enters
the next one:

    state_in_0 = 0,   state_in_{i+1} = factor_i * state_in_i + local_i

with `local` [B, H, D, E] from the chunk's own tokens and `factor` [H, 1, 1] what remains of a state
after all of them (LASP, arXiv 2404.02882, algorithms 2 and 3). In the backward the chunks stand in
reverse order. Every exchange is started, lets other work run, and is waited for:

    pending = start(transitions, ChunkChain(group), method="ring")
    ...                          # work that needs no remote state
    states_in = pending.wait()

Shards may be uneven or empty: an empty one has factor 1 and local 0. States travel in float32.
Where documents are packed, a state crosses a boundary only inside a document.

Prefer the ring. Ranks run staggered, because a rank continues as soon as its own state has arrived,
so the latency of P - 1 hops is incurred once per pass, not per layer. It is also the only method
in which GPUs of one host pass the state on in peer memory (`lasp.exchange.symmetric_memory`), also
where the group spans hosts. Where they cannot, and something synchronises the ranks between layers,
`all_gather` (one collective) is faster on few ranks and `doubling` on many. In zigzag every rank
waits for all others in each layer, since the first rank has the last chunk too. "auto" chooses by
the number of ranks and the layout. benchmarks/sequence_parallel.py measures the methods,
benchmarks/projection.py simulates training steps with them.

A method is a generator: it starts what it can, yields where it would first wait, and returns the
states that enter this rank's chunks.
"""

from __future__ import annotations

import weakref
from functools import partial

import torch

from lasp import replay
from lasp.exchange.all_gather import all_gather
from lasp.exchange.consistency import record_exchange
from lasp.exchange.doubling import doubling
from lasp.exchange.ring import ring
from lasp.exchange.symmetric_memory import find_buffer
from lasp.exchange.topology import ChunkChain, Transition

__all__ = ["METHODS", "ChunkChain", "PendingExchange", "Transition", "start"]

# By the simulation of training steps in benchmarks/projection.py (`ring_limit`, `gather_limit`).
# Up to so many ranks the ring by messages is the fastest with 32,768 and 262,144 tokens per rank,
# with DDP and FSDP, over a fast and a slow network. Beyond, FSDP lets no rank run as far ahead of
# others as P - 1 hops take.
_RING_UP_TO = 128
# In zigzag, up to so many ranks an all-gather of states takes less time than doubling.
_ALL_GATHER_UP_TO = 32


def auto(chain: ChunkChain, transitions: list[Transition], *, overlapped: bool):
    """The ring up to many ranks, then doubling; in zigzag the ring within one host's memory or
    between two ranks, else all_gather over few, doubling over many."""
    if chain.layout == "zigzag":
        buffer = find_buffer(chain.group, transitions[0].local, chain.send_recv_state)
        method = all_gather if chain.num_ranks <= _ALL_GATHER_UP_TO else doubling
        in_memory = buffer is not None and len(buffer.ranks) == chain.num_ranks
        if chain.num_ranks <= 2 or in_memory:
            method = ring
    else:
        method = ring if chain.num_ranks <= _RING_UP_TO else doubling
    return (yield from method(chain, transitions, overlapped=overlapped))


METHODS = {"all_gather": all_gather, "auto": auto, "doubling": doubling, "ring": ring}


class PendingExchange:
    """An exchange that has been started."""

    def __init__(self, steps, chain: ChunkChain) -> None:
        self._steps, self._reverse, self._group = steps, chain.reverse, chain.group
        self._states_in = None
        self._advance()

    def wait(self) -> list[torch.Tensor | None]:
        """The states that enter this rank's chunks, in sequence order, shaped like `local`; None
        where no state enters. Call it once, on every rank."""
        while self._steps is not None:
            self._advance()
        return self._states_in[::-1] if self._reverse else self._states_in

    def _advance(self):
        try:
            # A profiler range costs microseconds even without a profiler.
            if torch.autograd.profiler._is_profiler_enabled:
                direction = "backward" if self._reverse else "forward"
                with torch.profiler.record_function(f"lasp::exchange.{direction}"):
                    next(self._steps)
            else:
                next(self._steps)
        except StopIteration as end:
            self._steps, self._states_in = None, end.value
            replay.note_call(partial(_record_exchange, weakref.ref(self._group)))


def _record_exchange(group):
    record_exchange(group())


def start(
    transitions: list[Transition],
    chain: ChunkChain,
    *,
    method: str = "ring",
    overlapped: bool = False,
) -> PendingExchange:
    """Start an exchange; it runs until `wait` of the result.

    Args:
        transitions: one per chunk of this rank, in sequence order. A state that enters the
            sequence from outside is already part of the first `local`.
        chain: the chunks, their ranks and the direction.
        method: "ring", "all_gather", "doubling" or "auto".
        overlapped: the caller runs kernels before `wait` that take longer than the exchange, so it
            should leave them the multiprocessors. Only the ring makes use of it.
    """
    assert len(transitions) == len(chain.local_chunks)
    transitions = transitions[::-1] if chain.reverse else transitions
    return PendingExchange(METHODS[method](chain, transitions, overlapped=overlapped), chain)
