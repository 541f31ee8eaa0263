"""How rows of tokens cross ranks, where a state of constant size is not enough (softmax layers).

Rows are [tokens, ...] and flat in memory; ranks may hold different numbers of them, or none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lasp.exchange.peers import all_gather_flat

__all__ = ["PendingRows", "gather_rows", "swap_rows"]


class PendingRows:
    """A gathering of rows under way."""

    def __init__(self, rows: torch.Tensor, lengths: Sequence[int], group: ProcessGroup) -> None:
        self.lengths, self.shape = lengths, rows.shape[1:]
        self.most = max(lengths)
        missing = self.most - rows.shape[0]
        # Kept until the end: the collective reads it.
        self.message = torch.cat([rows, rows.new_zeros(missing, *self.shape)]) if missing else rows
        self.gathered, self.work = all_gather_flat(self.message.flatten(), group)

    def finish(self) -> list[torch.Tensor]:
        """The rows of each rank, in group order."""
        self.work.wait()
        parts = self.rows.split(self.most) if self.most else [self.rows] * len(self.lengths)
        return [part[:length] for part, length in zip(parts, self.lengths, strict=True)]

    @property
    def rows(self) -> torch.Tensor:
        """What came, once finished: as many rows of every rank as any rank has."""
        return self.gathered.view(-1, *self.shape)


def gather_rows(rows: torch.Tensor, lengths: Sequence[int], group: ProcessGroup) -> PendingRows:
    """Begin to gather the rows of all ranks, in one collective; `lengths` are their numbers."""
    assert rows.shape[0] == lengths[dist.get_rank(group)], (rows.shape, lengths)
    return PendingRows(rows, lengths, group)


def swap_rows(
    rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup
) -> list[torch.Tensor]:
    """Send rows to all ranks, sent[r] of them to rank r, in that order; the rows that come from
    each rank, received[r] of them from rank r."""
    assert rows.shape[0] == sum(sent), (rows.shape, sent)
    shape = rows.shape[1:]
    size = shape.numel()
    came = rows.new_empty(sum(received) * size)
    dist.all_to_all_single(
        came,
        rows.flatten(),
        [length * size for length in received],
        [length * size for length in sent],
        group=group,
    )
    return list(came.view(-1, *shape).split(list(received)))
