"""Which part of a global sequence a rank owns, and in which order it holds it.

One owner for every number that depends on the rank, so that the model, the data loader and the
operator cannot disagree. The sequence is cut into *places*, counted from its beginning:

    contiguous   P places: rank r holds place r
    zigzag       2P places: rank r holds places r and 2P-1-r, one after the other along T, both of
                 the same length: every rank has the same share of a causal softmax's work

    8 tokens, 2 ranks:   contiguous  0 1 2 3 | 4 5 6 7      zigzag  0 1 6 7 | 2 3 4 5

The functions take lengths and ranks as numbers and need no process group, apart from `to_zigzag`
and `to_contiguous`, which move the tokens of a tensor between ranks.
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
    "place_borders",
    "places",
    "split_lengths",
    "to_contiguous",
    "to_zigzag",
    "token_order",
    "token_ranges",
]

LAYOUTS = ("contiguous", "zigzag")


def split_lengths(total: int, size: int, layout: str = "contiguous") -> tuple[int, ...]:
    """Tokens of each of `size` ranks in an even cut of `total`.

    Where it does not come out even, the first ranks hold one token more (zigzag: one more in both
    of their places); with fewer tokens than ranks the last are empty. Raises ValueError for an odd
    total in zigzag.
    """
    _check_layout(layout)
    if layout == "zigzag":
        if total % 2:
            raise ValueError(
                f"a zigzag cut of {total} tokens: both places of a rank have the same length, so "
                "the total must be even. Pad the sequence by one token."
            )
        return tuple(2 * half for half in split_lengths(total // 2, size))
    short, longer = divmod(total, size)
    return tuple(short + (rank < longer) for rank in range(size))


def places(rank: int, size: int, layout: str = "contiguous") -> tuple[int, ...]:
    """The places that a rank holds, in the order it holds them."""
    _check_layout(layout)
    return (rank,) if layout == "contiguous" else (rank, 2 * size - 1 - rank)


def place_borders(lengths: tuple[int, ...], layout: str = "contiguous") -> tuple[int, ...]:
    """Where each place begins, and at last the total, for ranks of `lengths` tokens."""
    _check_layout(layout)
    if layout == "zigzag":
        odd = [length for length in lengths if length % 2]
        if odd:
            raise ValueError(
                f"a rank holds {odd[0]} tokens in zigzag: its two places have the same length, so "
                "every rank's number of tokens must be even."
            )
        halves = tuple(length // 2 for length in lengths)
        lengths = halves + halves[::-1]
    return (0, *accumulate(lengths))


def token_ranges(
    total: int, size: int, rank: int, layout: str = "contiguous"
) -> tuple[tuple[int, int], ...]:
    """The (start, stop) of global tokens that a rank holds in an even cut, one per place."""
    borders = place_borders(split_lengths(total, size, layout), layout)
    return tuple((borders[place], borders[place + 1]) for place in places(rank, size, layout))


def token_order(total: int, size: int, layout: str = "contiguous") -> torch.Tensor:
    """Global positions, int64 [total], in the order in which the ranks hold them.

    `x[:, order]` of a whole tensor, split into `split_lengths`, gives the ranks' parts; and
    `joined[:, order.argsort()]` puts the ranks' concatenated parts back into sequence order.
    """
    ranges = (token_ranges(total, size, rank, layout) for rank in range(size))
    return torch.cat([torch.arange(*each) for of_rank in ranges for each in of_rank])


@dataclass(frozen=True)
class SequenceShard:
    """A rank's tokens of a sequence of `total` tokens, one shard of those that `group` holds.

    Contiguous: tokens [start, stop). Zigzag: these and their mirror image, [total - stop,
    total - start). `ranges` says both.

    Attributes:
        start, stop: token offsets in the global sequence; start == stop is an empty shard.
        total: tokens of the global sequence.
        group: the ranks that hold the sequence, in order; None: the whole of it is here.
        exchange: how states cross ranks, as in `lasp.lightning_attention`.
        layout: "contiguous" or "zigzag", likewise.
        lengths: tokens of every rank, in group order; `split` knows them. None: a softmax layer
            asks the other ranks for theirs, in every call.
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
                f"place is their mirror image; got {self.start}..{self.stop} of {self.total}."
            )
        if self.lengths is not None and sum(self.lengths) != self.total:
            raise ValueError(
                f"the ranks' lengths {list(self.lengths)} sum up to {sum(self.lengths)}, not to "
                f"the total of {self.total} tokens."
            )
        if self.group is None and self.length != self.total:
            raise ValueError(
                f"tokens {self.start}..{self.stop} of {self.total} are a part of the sequence, but "
                "group is None: pass the process group whose ranks hold the rest."
            )

    @classmethod
    def whole(cls, total: int) -> SequenceShard:
        """The whole sequence on this device."""
        return cls(0, total, total)

    @classmethod
    def split(
        cls,
        total: int,
        group: ProcessGroup | None = None,
        exchange: str = "ring",
        layout: str = "contiguous",
    ) -> SequenceShard:
        """This rank's part of an even cut, as `split_lengths` has it."""
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
        """Whether this rank holds the sequence's first place."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the sequence's last place (zigzag: the first rank does)."""
        return self.rank == (0 if self.layout == "zigzag" else self.size - 1)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of global tokens, one per place, in the order they are held."""
        first = (self.start, self.stop)
        if self.layout == "contiguous":
            return (first,)
        return first, (self.total - self.stop, self.total - self.start)

    @property
    def token_slice(self) -> slice:
        """Where a contiguous shard lies in the global sequence: `tokens[:, shard.token_slice]`."""
        if self.layout != "contiguous":
            raise ValueError("a zigzag shard is two ranges and no slice: use shard.take(tokens).")
        return slice(self.start, self.stop)

    def take(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This shard's part of a tensor whose dimension `dim` is the global sequence."""
        if x.shape[dim] != self.total:
            raise ValueError(
                f"x has {x.shape[dim]} entries along dimension {dim}, the sequence {self.total} "
                "tokens: pass the whole sequence's tensor."
            )
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Global positions of this shard's tokens, int64 [length]."""
        return torch.cat([torch.arange(*each, device=device) for each in self.ranges])


def to_zigzag(x: torch.Tensor, group: ProcessGroup | None, dim: int = 1) -> torch.Tensor:
    """A contiguous part of a sequence, exchanged for the zigzag one. All ranks call it.

    The operators of this library take either layout as it is and need no conversion; this is for
    code that has the other one. One all-to-all, in which a rank sends its tokens once;
    differentiable.

    Args:
        x: this rank's part; its size along `dim` is even and the same on all ranks.
        group: the ranks that hold the sequence; None: x is all of it and is returned.
    """
    return _relayout(x, group, dim, True)


def to_contiguous(x: torch.Tensor, group: ProcessGroup | None, dim: int = 1) -> torch.Tensor:
    """A zigzag part of a sequence, exchanged for the contiguous one: undoes `to_zigzag`."""
    return _relayout(x, group, dim, False)


def _relayout(x, group, dim, to_zigzag):
    if x.shape[dim] % 2:
        raise ValueError(
            f"x has {x.shape[dim]} tokens along dimension {dim}: a rank holds two places of the "
            "same length, so the number must be even, and the same on all ranks."
        )
    if group is None or dist.get_world_size(group) == 1:
        return x
    return _Relayout.apply(x, group, dim, to_zigzag)


class _Relayout(torch.autograd.Function):
    """The exchange of places between ranks; its gradient is the exchange back."""

    @staticmethod
    def forward(ctx, x, group, dim, to_zigzag):
        ctx.group, ctx.dim, ctx.to_zigzag = group, dim, to_zigzag
        return _move_places(x, group, dim, to_zigzag)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _move_places(grad, ctx.group, ctx.dim, not ctx.to_zigzag), None, None, None


def _move_places(x, group, dim, to_zigzag):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    contiguous = [place // 2 for place in range(2 * size)]
    zigzag = [min(place, 2 * size - 1 - place) for place in range(2 * size)]
    here, there = (contiguous, zigzag) if to_zigzag else (zigzag, contiguous)
    # Places travel sorted by the other rank; both sides hold theirs in ascending order.
    sent = sorted((to, place) for place, at, to in _moves(here, there) if at == rank)
    received = sorted((at, place) for place, at, to in _moves(here, there) if to == rank)
    halves = dict(zip(sorted(place for _, place in sent), x.movedim(dim, 0).chunk(2), strict=True))
    message = torch.cat([halves[place] for _, place in sent])
    half = message.shape[0] // 2
    arrived = torch.empty_like(message)
    splits = [
        [half * sum(peer == other for peer, _ in moved) for other in range(size)]
        for moved in (received, sent)
    ]
    dist.all_to_all_single(arrived, message, *splits, group=group)
    halves = dict(zip((place for _, place in received), arrived.chunk(2), strict=True))
    return torch.cat([halves[place] for place in sorted(halves)]).movedim(0, dim)


def _moves(here, there):
    return zip(range(len(here)), here, there, strict=True)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}.")
