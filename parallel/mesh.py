"""The ranks of a job as one mesh of dp_replicate x dp_shard x cp x tp.

A sequence is sharded over neighbouring ranks (cp), so that its ring stays inside a node where
possible; data parallelism takes the outer axes. `ParallelDims` holds numbers only and opens no
socket; `build_mesh` makes the `DeviceMesh` once the process group is up.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh, ProcessGroup

__all__ = [
    "MESH_AXES",
    "ParallelDims",
    "build_mesh",
    "full_tensor",
    "gradient_group",
    "sharding_mesh",
]

MESH_AXES = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """The degree of each mesh axis; their product is the number of ranks.

    Attributes:
        dp_replicate: replicas of the full model, each on its own sequences.
        dp_shard: ranks that share one copy of the weights, each on its own sequences.
        cp: ranks over which one sequence is sharded.
        tp: ranks over which one layer is sharded.
        world_size: ranks of the job.

    Raises:
        ValueError: a degree below 1, or a product that is not world_size; the message shows the
            equation with its numbers.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    world_size: int = 1

    def __post_init__(self) -> None:
        for axis, degree in self.degrees.items():
            if degree < 1:
                raise ValueError(f"degree {axis} is {degree}: it must be at least 1.")
        if math.prod(self.degrees.values()) != self.world_size:
            raise ValueError(f"{self.equation}: change a degree or the number of processes.")

    @classmethod
    def resolve(
        cls,
        world_size: int,
        *,
        dp_replicate: int = -1,
        dp_shard: int = -1,
        cp: int = 1,
        tp: int = 1,
    ) -> ParallelDims:
        """Replace a degree of -1 by the ranks that the others leave.

        Of several, cp takes them if it is one of these, else dp_replicate; the rest become 1.
        """
        degrees = dict(zip(MESH_AXES, (dp_replicate, dp_shard, cp, tp), strict=True))
        for axis, degree in degrees.items():
            if degree < 1 and (degree != -1 or axis == "tp"):
                raise ValueError(f"degree {axis} is {degree}: it must be at least 1, or -1.")
        open_axes = [axis for axis in ("cp", "dp_replicate", "dp_shard") if degrees[axis] == -1]
        if not open_axes:
            return cls(**degrees, world_size=world_size)
        given = {axis: degree for axis, degree in degrees.items() if degree != -1}
        product = math.prod(given.values())
        left, rest = divmod(world_size, product)
        if rest:
            terms = " x ".join(f"{axis} {degree}" for axis, degree in given.items())
            processes = "one process" if world_size == 1 else f"{world_size} processes"
            raise ValueError(
                f"{terms} = {product} does not divide the {processes} of this job: "
                f"start a multiple of {product} processes or lower a degree."
            )
        degrees |= dict.fromkeys(open_axes, 1) | {open_axes[0]: left}
        return cls(**degrees, world_size=world_size)

    @property
    def degrees(self) -> dict[str, int]:
        """Degree by axis, outermost first."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def dp(self) -> int:
        """Ranks that see different sequences: dp_replicate x dp_shard."""
        return self.dp_replicate * self.dp_shard

    @property
    def equation(self) -> str:
        """The degrees, their product and, if it differs, the world size it should equal."""
        product = math.prod(self.degrees.values())
        terms = " x ".join(f"{axis} {degree}" for axis, degree in self.degrees.items())
        wrong = "" if product == self.world_size else f" != {self.world_size}"
        return f"{terms} = {product}{wrong} processes"

    def hosts_of_groups(self, ranks_per_host: int) -> dict[str, int]:
        """By axis with a degree above 1: over how many hosts its groups extend, at most."""
        found, stride = {}, self.world_size
        for axis, degree in self.degrees.items():
            block, stride = stride, stride // degree
            if degree == 1:
                continue
            # A group's ranks are `stride` apart; the first ones are the first of each block.
            found[axis] = max(
                len({(first + i * stride) // ranks_per_host for i in range(degree)})
                for start in range(0, self.world_size, block)
                for first in range(start, start + stride)
            )
        return found

    def dp_rank(self, rank: int) -> int:
        """Index, among the `dp`, of the sequences that a global rank reads."""
        return rank // (self.cp * self.tp)


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """The mesh of `dims` on "cpu" or "cuda". The default process group must be up."""
    return init_device_mesh(device_type, tuple(dims.degrees.values()), mesh_dim_names=MESH_AXES)


def gradient_group(mesh: DeviceMesh) -> ProcessGroup:
    """The ranks over which a weight's gradient is summed: dp_replicate x dp_shard x cp.

    A cp rank sees other tokens of the same sequence, so for gradients it is one more data rank.
    """
    return mesh["dp_replicate", "dp_shard", "cp"]._flatten("dp_cp").get_group()


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that shards weights: dp_shard x cp as one axis; before it dp_replicate, if above 1.

    Without cp, every rank of a sequence would hold a copy of the same weights.
    """
    sharded = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    if mesh["dp_replicate"].size() == 1:
        return sharded
    with warnings.catch_warnings():
        # torch 2.11 to 2.13 warn about it and have no other public way.
        warnings.filterwarnings("ignore", "Slicing a flattened dim")
        return mesh["dp_replicate", "dp_shard_cp"]


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor's shards gathered, or its partial values summed, on every rank of its mesh, which
    must all call; plain tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
