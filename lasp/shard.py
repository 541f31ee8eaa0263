"""Which part of a global sequence a rank holds, and in which order.

Every number that depends on the rank comes from here, so that the model, the data loader and the
operator cannot disagree. The sequence is split into chunks, counted from its beginning:

    contiguous   P chunks: rank r holds chunk r
    zigzag       2P chunks: rank r holds chunks r and 2P-1-r, one after the other along T and of
                 equal length: every rank has the same share of a causal softmax's work

    8 tokens, 2 ranks:   contiguous  0 1 2 3 | 4 5 6 7      zigzag  0 1 6 7 | 2 3 4 5

The functions take lengths and ranks as numbers and need no process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = [
    "LAYOUTS",
    "SequenceShard",
    "chunk_boundaries",
    "chunks_of_rank",
    "split_lengths",
    "token_order",
    "token_ranges",
]

LAYOUTS = ("contiguous", "zigzag")


def split_lengths(total: int, size: int, layout: str = "contiguous") -> tuple[int, ...]:
    """Tokens of each of `size` ranks when `total` tokens are split evenly.

    If they do not divide evenly, the first ranks hold one token more (zigzag: one more in each of
    their chunks); with fewer tokens than ranks the last ranks hold none.

    Raises:
        ValueError: an odd total in zigzag.
    """
    _check_layout(layout)
    if layout == "zigzag":
        if total % 2:
            raise ValueError(
                f"a zigzag split of {total} tokens: both chunks of a rank have the same length, so "
                "the total must be even. Pad the sequence by one token."
            )
        return tuple(2 * half for half in split_lengths(total // 2, size))
    short, longer = divmod(total, size)
    return tuple(short + (rank < longer) for rank in range(size))


def chunks_of_rank(rank: int, size: int, layout: str = "contiguous") -> tuple[int, ...]:
    """The chunks that a rank holds, in the order it holds them."""
    _check_layout(layout)
    return (rank,) if layout == "contiguous" else (rank, 2 * size - 1 - rank)


def chunk_boundaries(lengths: tuple[int, ...], layout: str = "contiguous") -> tuple[int, ...]:
    """The first token of each chunk, and the total, for ranks of `lengths` tokens.

    Raises:
        ValueError: an odd length in zigzag.
    """
    _check_layout(layout)
    if layout == "zigzag":
        odd = [length for length in lengths if length % 2]
        if odd:
            raise ValueError(
                f"a rank holds {odd[0]} tokens in zigzag: its two chunks have the same length, so "
                "every rank's number of tokens must be even."
            )
        halves = tuple(length // 2 for length in lengths)
        lengths = halves + halves[::-1]
    return (0, *accumulate(lengths))


def token_ranges(
    total: int, size: int, rank: int, layout: str = "contiguous"
) -> tuple[tuple[int, int], ...]:
    """The (start, stop) of global tokens that a rank holds in an even split, one per chunk."""
    boundaries = chunk_boundaries(split_lengths(total, size, layout), layout)
    chunks = chunks_of_rank(rank, size, layout)
    return tuple((boundaries[chunk], boundaries[chunk + 1]) for chunk in chunks)


def token_order(total: int, size: int, layout: str = "contiguous") -> torch.Tensor:
    """Global positions, int64 [total], in the order in which the ranks hold them.

    `x[:, order]` of a full tensor, split into `split_lengths`, gives the ranks' shards; and
    `joined[:, order.argsort()]` puts the ranks' concatenated shards back into sequence order.
    """
    ranges = (token_ranges(total, size, rank, layout) for rank in range(size))
    return torch.cat([torch.arange(*each) for of_rank in ranges for each in of_rank])


@dataclass(frozen=True)
class SequenceShard:
    """A rank's tokens of a sequence of `total` tokens that the ranks of `group` hold.

    Contiguous: tokens [start, stop). Zigzag: these and their mirror image, [total - stop,
    total - start). `ranges` gives both.

    Attributes:
        start, stop: token offsets in the global sequence; start == stop is an empty shard.
        total: tokens of the global sequence.
        group: the ranks that hold the sequence, in order; None: this process holds all of it.
        exchange: how states cross ranks, as in `lasp.lightning_attention`.
        layout: "contiguous" or "zigzag", likewise.
        lengths: tokens of every rank, in group order; `split` sets them. None: a softmax layer
            gathers them from the other ranks in every call.
    """

    start: int
    stop: int
    total: int
    group: ProcessGroup | None = None
    exchange: str = "ring"
    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_layout(self.layout)
        if not 0 <= self.start <= self.stop <= self.total:
            raise ValueError(
                f"a shard needs 0 <= start <= stop <= total, got start {self.start}, "
                f"stop {self.stop}, total {self.total}."
            )
        if self.layout == "zigzag" and 2 * self.stop > self.total:
            raise ValueError(
                f"a zigzag shard's start..stop are in the first half of the sequence, the second "
                f"chunk is their mirror image; got {self.start}..{self.stop} of {self.total}."
            )
        if self.lengths is not None and sum(self.lengths) != self.total:
            raise ValueError(
                f"the ranks' lengths {list(self.lengths)} sum up to {sum(self.lengths)}, not to "
                f"the total of {self.total} tokens."
            )
        if self.group is None and self.length != self.total:
            raise ValueError(
                f"tokens {self.start}..{self.stop} of {self.total} are a part of the sequence, "
                "but group is None: pass the process group whose ranks hold the rest."
            )

    @classmethod
    def whole(cls, total: int) -> SequenceShard:
        """The full sequence on this device."""
        return cls(0, total, total)

    @classmethod
    def split(
        cls,
        total: int,
        group: ProcessGroup | None = None,
        exchange: str = "ring",
        layout: str = "contiguous",
    ) -> SequenceShard:
        """This rank's shard of an even split, see `split_lengths`."""
        if group is None:
            return cls.whole(total)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("this process is not a member of `group`.")
        start, stop = token_ranges(total, size, rank, layout)[0]
        lengths = split_lengths(total, size, layout)
        return cls(start, stop, total, group, exchange, layout, lengths)

    @property
    def rank(self) -> int:
        """Position of this shard among the others: the rank within `group`."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of shards."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def length(self) -> int:
        """Tokens of this shard."""
        return (self.stop - self.start) * (2 if self.layout == "zigzag" else 1)

    @property
    def is_first(self) -> bool:
        """True if this rank holds the first chunk of the sequence."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """True if this rank holds the last chunk of the sequence (zigzag: the first rank does)."""
        return self.rank == (0 if self.layout == "zigzag" else self.size - 1)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of global tokens, one per chunk, in the order they are held."""
        first = (self.start, self.stop)
        if self.layout == "contiguous":
            return (first,)
        return first, (self.total - self.stop, self.total - self.start)

    @property
    def token_slice(self) -> slice:
        """The slice of a contiguous shard in the sequence: `tokens[:, shard.token_slice]`."""
        if self.layout != "contiguous":
            raise ValueError("a zigzag shard is two ranges and no slice: use shard.take(tokens).")
        return slice(self.start, self.stop)

    def take(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This shard of a tensor whose dimension `dim` is the global sequence."""
        if x.shape[dim] != self.total:
            raise ValueError(
                f"x has {x.shape[dim]} entries along dimension {dim}, the sequence {self.total} "
                "tokens: pass the tensor of the full sequence."
            )
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Global positions of this shard's tokens, int64 [length]."""
        return torch.cat([torch.arange(*each, device=device) for each in self.ranges])


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}.")
