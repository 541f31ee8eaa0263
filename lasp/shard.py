"""Which part of a global sequence this rank owns.

One owner for every number that depends on the rank, so that the model, the data loader and the
operator cannot disagree. Shards are contiguous and in group-rank order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SequenceShard"]


@dataclass(frozen=True)
class SequenceShard:
    """Tokens [start, stop) of a sequence of `total` tokens, one shard of those that `group` holds.

    Attributes:
        start, stop: token offsets in the global sequence; start == stop is an empty shard.
        total: tokens of the global sequence.
        group: the ranks that hold the sequence, in order; None: the whole of it is here.
        exchange: how states cross ranks, as in `lasp.lightning_attention`.
    """

    start: int
    stop: int
    total: int
    group: ProcessGroup | None = None
    exchange: str = "ring"

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.total:
            raise ValueError(
                f"a shard needs 0 <= start <= stop <= total, got start {self.start}, "
                f"stop {self.stop}, total {self.total}."
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
        cls, total: int, group: ProcessGroup | None = None, exchange: str = "ring"
    ) -> SequenceShard:
        """This rank's part of an even cut: where P does not divide `total`, the first
        total % P ranks hold one token more; with fewer tokens than ranks the last are empty."""
        if group is None:
            return cls.whole(total)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("this process is not a member of `group`.")
        short, longer = divmod(total, size)
        start = rank * short + min(rank, longer)
        return cls(start, start + short + (rank < longer), total, group, exchange)

    @property
    def rank(self) -> int:
        """Position of this shard in the sequence: the rank within `group`."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of shards."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def length(self) -> int:
        """Tokens of this shard."""
        return self.stop - self.start

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def token_slice(self) -> slice:
        """Where this shard lies in the global sequence: `tokens[:, shard.token_slice]`."""
        return slice(self.start, self.stop)
