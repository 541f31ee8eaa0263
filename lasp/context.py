"""Where the tokens of a call are: the ranks that hold the sequence and how states cross them."""

from __future__ import annotations

from typing import NamedTuple

from torch.distributed import ProcessGroup, distributed_c10d

__all__ = ["CPContext"]


class CPContext(NamedTuple):
    """The context-parallel arguments of a call.

    Attributes:
        group: the ranks that hold the sequence; None: it is all on this device.
        exchange: how states cross ranks, see `lasp.exchange`.
        layout: which tokens a rank holds, see `lasp.shard`.
        shard_lengths: tokens of every rank, or None.
    """

    group: ProcessGroup | None = None
    exchange: str = "ring"
    layout: str = "contiguous"
    shard_lengths: tuple[int, ...] | None = None

    def flatten(self) -> tuple[str | None, str, str, tuple[int, ...] | None]:
        """The context in types that an operator of torch takes; the group goes by its name."""
        name = None if self.group is None else self.group.group_name
        return (name, *self[1:])

    @classmethod
    def unflatten(cls, group_name, exchange, layout, shard_lengths) -> CPContext:
        """Undoes `flatten`."""
        group = None
        if group_name is not None:
            group = distributed_c10d._resolve_process_group(group_name)
        return cls(group, exchange, layout, None if shard_lengths is None else tuple(shard_lengths))
