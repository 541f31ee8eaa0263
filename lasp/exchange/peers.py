"""Who stands where in the scan, who the neighbours are, and what they pass on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lasp import shard

__all__ = ["AffineMap", "Line", "all_gather_flat", "device_types", "pack", "send", "unpack"]

# torch 2.13 deprecates the older name; 2.11 has no other.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_flat(message: torch.Tensor, group: ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Begin to gather a flat message of every rank; returns (what will be [P * n], the work)."""
    # Gloo wants one flat buffer, NCCL takes it too.
    gathered = message.new_empty(dist.get_world_size(group) * message.numel())
    return gathered, _all_gather(gathered, message, group=group, async_op=True)


def send(message: torch.Tensor, rank: int, group: ProcessGroup) -> dist.Work | None:
    """Begin to send to a global rank; the work after which `message` may change, None: at once."""
    work = dist.isend(message, dst=rank, group=group)
    if not message.is_cuda:
        # Gloo reads the message until the send is done.
        return work
    # Holds this rank's stream, not its host. NCCL sends by a kernel, which would else wait until
    # the next kernels of this rank leave it a multiprocessor; a state fits its buffers, so that it
    # does not wait for the next rank to come.
    work.wait()
    return None


def device_types(group: ProcessGroup) -> set[str]:
    """Where the tensors may be that the group can send, such as {"cuda"} for NCCL."""
    config = dist.get_backend_config(group)
    return {entry.split(":")[0] for entry in config.split(",")}


class AffineMap:
    """What a place makes of the state that enters it: factor * state + local.

    Args:
        local: [B, H, D, E].
        log_decay: [H]; None: no decay. The factor is exp(log_decay * length), [H, 1, 1].
        length: tokens of the place.
        passes: False where the factor is zero for all heads, so that what leaves is known before
            anything has come.
    """

    def __init__(
        self,
        local: torch.Tensor,
        log_decay: torch.Tensor | None = None,
        length: int = 0,
        passes: bool = True,
    ) -> None:
        self.local, self.log_decay = local, log_decay
        self.length, self.passes = length, passes

    @cached_property
    def factor(self) -> torch.Tensor:
        """Computed when it is first needed, which at the ends of the ring is never."""
        num_heads = self.local.shape[1]
        if not self.passes:
            return self.local.new_zeros(num_heads, 1, 1)
        if self.log_decay is None:
            return self.local.new_ones(num_heads, 1, 1)
        return torch.exp(self.log_decay.to(self.local.dtype) * self.length)[:, None, None]

    def after(self, entering: torch.Tensor | None) -> torch.Tensor:
        """The state that leaves when `entering` came in; None: nothing did."""
        if entering is None or not self.passes:
            return self.local
        return torch.addcmul(self.local, self.factor, entering)


def pack(*parts: torch.Tensor) -> torch.Tensor:
    """A map, its local and its factor, or several, as one flat message.

    Factors travel because the ranks' lengths, which they depend on, may differ.
    """
    return torch.cat([part.flatten() for part in parts])


def unpack(message: torch.Tensor, like: AffineMap) -> tuple[torch.Tensor, torch.Tensor]:
    """(local, factor) of a message; their shapes are those of `like`."""
    size = like.factor.numel()
    return message[:-size].view(like.local.shape), message[-size:].view(like.factor.shape)


@dataclass(eq=False)
class Line:
    """The places of a sequence in scan order (`lasp.shard` tells what a place is).

    Attributes:
        group: the ranks that hold them.
        layout: "contiguous" or "zigzag".
        reverse: scan from the last place to the first.
        crossing: for each border, the outer ones included, the document that runs across it or
            None; in sequence order. None in place of the tuple: one sequence runs through all.
        relay: `lasp.ops.relay`, which passes a state on in memory that ranks share; None: messages.
        num_ranks, size: number of ranks, and of places.
        here: this rank's places in scan order: 0 is the first of the scan.
    """

    group: ProcessGroup
    layout: str = "contiguous"
    reverse: bool = False
    crossing: tuple[int | None, ...] | None = None
    relay: Callable | None = None
    num_ranks: int = field(init=False)
    size: int = field(init=False)
    here: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Asked of the group itself: two lines are made per step and layer, and
        # `torch.distributed` looks up in Python whom it is asked about.
        self.num_ranks = self.group.size()
        self.size = self.num_ranks * (2 if self.layout == "zigzag" else 1)
        self.here = self.places_of(self.group.rank())

    def places_of(self, rank: int) -> tuple[int, ...]:
        """The places of a group rank in scan order."""
        return _scan_places(rank, self.num_ranks, self.layout, self.reverse)

    def group_rank(self, place: int) -> int:
        """Who holds a place."""
        if self.layout == "zigzag":
            # The mirror image of a place is on the same rank, so the direction does not matter.
            return min(place, self.size - 1 - place)
        return self.size - 1 - place if self.reverse else place

    def global_rank(self, place: int) -> int:
        """Global rank at a place. A group may be any subset of ranks, strided or shifted."""
        return dist.get_global_rank(self.group, self.group_rank(place))

    def linked(self, earlier: int, later: int) -> bool:
        """Whether one document runs from the end of place `earlier` to the start of `later`.

        If not, no state of the one ever reaches the other.
        """
        if not 0 <= earlier < later < self.size:
            return False
        if self.crossing is None:
            return True
        first, last = earlier + 1, later
        if self.reverse:
            first, last = self.size - first, self.size - last
        return self.crossing[first] is not None and self.crossing[first] == self.crossing[last]

    def runs_through(self, place: int) -> bool:
        """Whether what enters `place` goes on to the next one."""
        return self.linked(place - 1, place + 1)


# By numbers and not by group: nothing here outlives a group that is destroyed.
@lru_cache(maxsize=4096)
def _scan_places(rank, num_ranks, layout, reverse):
    held = shard.places(rank, num_ranks, layout)
    if not reverse:
        return held
    last = num_ranks * len(held) - 1
    return tuple(last - place for place in held[::-1])
