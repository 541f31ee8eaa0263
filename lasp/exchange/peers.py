"""Who stands where in the scan, and who the neighbours are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["AffineMaps", "Line", "all_gather_flat", "device_types"]

# torch 2.13 deprecates the older name; 2.11 has no other.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_flat(message: torch.Tensor, group: ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Begin to gather a flat message of every rank; returns (what will be [P * n], the work)."""
    # Gloo wants one flat buffer, NCCL takes it too.
    gathered = message.new_empty(dist.get_world_size(group) * message.numel())
    return gathered, _all_gather(gathered, message, group=group, async_op=True)


def device_types(group: ProcessGroup) -> set[str]:
    """Where the tensors may be that the group can send, such as {"cuda"} for NCCL."""
    config = dist.get_backend_config(group)
    return {entry.split(":")[0] for entry in config.split(",")}


@dataclass(frozen=True)
class Line:
    """The ranks of a group in scan order: by group rank, or against it when reversed."""

    group: ProcessGroup
    reverse: bool

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def place(self) -> int:
        """Where this rank stands: 0 is the first."""
        rank = dist.get_rank(self.group)
        return self.size - 1 - rank if self.reverse else rank

    def global_rank(self, place: int) -> int:
        """Global rank at a place. A group may be any subset of ranks, strided or shifted."""
        return dist.get_global_rank(self.group, self.group_rank(place))

    def group_rank(self, place: int) -> int:
        return self.size - 1 - place if self.reverse else place


@dataclass(frozen=True)
class AffineMaps:
    """Maps state -> factor * state + local as flat messages: local and factor travel together,
    because shards may be uneven."""

    shape: torch.Size
    num_factors: int

    @classmethod
    def like(cls, local: torch.Tensor, factor: torch.Tensor) -> AffineMaps:
        return cls(local.shape, factor.numel())

    def pack(
        self, local: torch.Tensor, factor: torch.Tensor, entering: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The map as one message; with the state that enters it, if known, worked in."""
        if entering is not None:
            local = torch.addcmul(local, factor, entering)
        return torch.cat([local.flatten(), factor.flatten()])

    def unpack(self, message: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(local, factor) of a message."""
        local = message[: -self.num_factors].view(self.shape)
        return local, message[-self.num_factors :].view(-1, 1, 1)
