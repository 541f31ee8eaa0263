"""The chain of chunks that a state passes through, and what a chunk does to a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lasp.shard import chunks_of_rank

__all__ = ["ChunkChain", "Transition"]


class Transition(NamedTuple):
    """What a chunk does to the state that enters it: state_out = factor * state_in + local.

    Attributes:
        local: [B, H, D, E], the state that the chunk's own tokens add up to.
        factor: [H, 1, 1] (or any shape that broadcasts to `local`, the same on all ranks). None:
            zero for all heads, so the outgoing state is known before the incoming state arrives.
    """

    local: torch.Tensor
    factor: torch.Tensor | None

    def apply(self, state_in: torch.Tensor | None) -> torch.Tensor:
        """The state that leaves the chunk; None: no state enters it."""
        if state_in is None or self.factor is None:
            return self.local
        return torch.addcmul(self.local, self.factor, state_in)

    def pack(self) -> torch.Tensor:
        """The transition as one flat message.

        Factors travel because they depend on the ranks' lengths, which may differ.
        """
        factor = self.factor
        if factor is None:
            factor = self.local.new_zeros(self.local.shape[1], 1, 1)
        return torch.cat((self.local.flatten(), factor.flatten()))

    def unpack(self, message: torch.Tensor) -> Transition:
        """The transition of a message, with the shapes of this one."""
        size, shape = self.local.numel(), self.factor_shape
        return Transition(message[:size].view(self.local.shape), message[size:].view(shape))

    @property
    def factor_shape(self) -> tuple[int, ...]:
        """The shape of the factor in a message."""
        return self.local.shape[1:2] + (1, 1) if self.factor is None else self.factor.shape

    @property
    def message_size(self) -> int:
        """Numbers in a message."""
        return self.local.numel() + math.prod(self.factor_shape)


@dataclass(eq=False)
class ChunkChain:
    """The chunks of a sequence (`lasp.shard`) in scan order.

    Attributes:
        group: the ranks that hold them.
        layout: "contiguous" or "zigzag".
        reverse: scan from the last chunk to the first.
        boundary_documents: for each boundary between chunks, the outer ones included, the document
            that runs across it or None; in sequence order. None in place of the tuple: one sequence
            runs through all chunks.
        send_recv_state: `lasp.ops.send_recv_state`, which passes a state on in peer memory; None:
            states go by messages.
        num_ranks, num_chunks: numbers of ranks and of chunks.
        local_chunks: this rank's chunks in scan order: 0 is the first of the scan.
    """

    group: ProcessGroup
    layout: str = "contiguous"
    reverse: bool = False
    boundary_documents: tuple[int | None, ...] | None = None
    send_recv_state: Callable | None = None
    num_ranks: int = field(init=False)
    num_chunks: int = field(init=False)
    local_chunks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        # The group's own methods cost less than those of torch.distributed, which look it up.
        self.num_ranks = self.group.size()
        self.num_chunks = self.num_ranks * (2 if self.layout == "zigzag" else 1)
        self.local_chunks = self.chunks_of(self.group.rank())

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of a group rank in scan order."""
        return _scan_chunks(rank, self.num_ranks, self.layout, self.reverse)

    def group_rank(self, chunk: int) -> int:
        """The group rank that holds a chunk."""
        if self.layout == "zigzag":
            # The mirror image of a chunk is on the same rank, so the direction does not matter.
            return min(chunk, self.num_chunks - 1 - chunk)
        return self.num_chunks - 1 - chunk if self.reverse else chunk

    def global_rank(self, chunk: int) -> int:
        """The global rank that holds a chunk. A group may be any subset of ranks."""
        return dist.get_global_rank(self.group, self.group_rank(chunk))

    def same_document(self, earlier: int, later: int) -> bool:
        """True if one document runs from the end of chunk `earlier` to the start of `later`.

        If not, no state of the one ever reaches the other.
        """
        if not 0 <= earlier < later < self.num_chunks:
            return False
        if self.boundary_documents is None:
            return True
        first, last = earlier + 1, later
        if self.reverse:
            first, last = self.num_chunks - first, self.num_chunks - last
        document = self.boundary_documents[first]
        return document is not None and document == self.boundary_documents[last]

    def passes_through(self, chunk: int) -> bool:
        """True if a state that enters `chunk` goes on to the next one."""
        return self.same_document(chunk - 1, chunk + 1)


# Keyed by numbers and not by group, so that nothing here outlives a destroyed group.
@lru_cache(maxsize=4096)
def _scan_chunks(rank, num_ranks, layout, reverse):
    held = chunks_of_rank(rank, num_ranks, layout)
    if not reverse:
        return held
    last = num_ranks * len(held) - 1
    return tuple(last - chunk for chunk in held[::-1])
