"""Messages between ranks: states, and rows of tokens where no state of constant size is enough.

Rows are [tokens, ...] and flat in memory; ranks may hold different numbers of them, or none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = [
    "PendingRows",
    "all_gather_flat",
    "all_gather_into",
    "all_to_all_rows",
    "device_types",
    "gather_rows",
    "send",
]

# torch 2.13 deprecates the older name; 2.11 has no other.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_flat(message: torch.Tensor, group: ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Start to gather a flat message of every rank; returns (what will be [P * n], the work)."""
    # Gloo needs one flat buffer, NCCL takes it too.
    gathered = message.new_empty(dist.get_world_size(group) * message.numel())
    return gathered, all_gather_into(gathered, message, group)


def all_gather_into(
    gathered: torch.Tensor, message: torch.Tensor, group: ProcessGroup
) -> dist.Work:
    """`all_gather_flat` into memory that exists."""
    return _all_gather(gathered, message, group=group, async_op=True)


def send(message: torch.Tensor, rank: int, group: ProcessGroup) -> dist.Work | None:
    """Start to send to a global rank; the work after which `message` may change, None: at once."""
    work = dist.isend(message, dst=rank, group=group)
    if not message.is_cuda:
        # Gloo reads the message until the send is done.
        return work
    # Blocks the stream, not the host. Otherwise the NCCL send kernel may find no free
    # multiprocessor until later kernels finish. A state fits into NCCL's buffers, so the send does
    # not wait for the next rank.
    work.wait()
    return None


def device_types(group: ProcessGroup) -> set[str]:
    """Device types whose tensors the group can send, such as {"cuda"} for NCCL."""
    config = dist.get_backend_config(group)
    return {entry.split(":")[0] for entry in config.split(",")}


class PendingRows:
    """An all-gather of rows that has been started."""

    def __init__(self, rows: torch.Tensor, lengths: Sequence[int], group: ProcessGroup) -> None:
        self.lengths, self.shape = lengths, rows.shape[1:]
        self.most = max(lengths)
        missing = self.most - rows.shape[0]
        # Kept until the end: the collective reads it.
        self.message = torch.cat([rows, rows.new_zeros(missing, *self.shape)]) if missing else rows
        self.gathered, self.work = all_gather_flat(self.message.flatten(), group)

    def wait(self) -> list[torch.Tensor]:
        """The rows of each rank, in group order."""
        self.work.wait()
        parts = self.rows.split(self.most) if self.most else [self.rows] * len(self.lengths)
        return [part[:length] for part, length in zip(parts, self.lengths, strict=True)]

    @property
    def rows(self) -> torch.Tensor:
        """The gathered rows after `wait`, padded to the same number for every rank."""
        return self.gathered.view(-1, *self.shape)


def gather_rows(rows: torch.Tensor, lengths: Sequence[int], group: ProcessGroup) -> PendingRows:
    """Start to gather the rows of all ranks in one collective; `lengths` are their numbers."""
    assert rows.shape[0] == lengths[dist.get_rank(group)], (rows.shape, lengths)
    return PendingRows(rows, lengths, group)


def all_to_all_rows(
    rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup
) -> list[torch.Tensor]:
    """Send sent[r] rows to each rank r, in that order, and return the received[r] rows of each."""
    assert rows.shape[0] == sum(sent), (rows.shape, sent)
    shape = rows.shape[1:]
    size = shape.numel()
    buffer = rows.new_empty(sum(received) * size)
    dist.all_to_all_single(
        buffer,
        rows.flatten(),
        [length * size for length in received],
        [length * size for length in sent],
        group=group,
    )
    return list(buffer.view(-1, *shape).split(list(received)))
