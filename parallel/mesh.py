"""How the ranks of a job are laid out: one mesh of dp_replicate x dp_shard x cp x tp.

The sequence (cp) is cut over neighbouring ranks, so its ring stays inside a node where it can;
data parallelism takes the outer axes. `ParallelDims` is numbers alone and opens no socket;
`build_mesh` makes the `DeviceMesh` once the process group is up.
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
    "gradient_group",
    "sharding_mesh",
    "whole",
]

MESH_AXES = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """The degree of each mesh axis; their product is the number of ranks.

    Attributes:
        dp_replicate: replicas of the whole model, each on its own sequences.
        dp_shard: ranks that share one copy of the weights, each on its own sequences.
        cp: ranks over which one sequence is cut.
        tp: ranks over which one layer is cut.
        world_size: ranks of the job.

    Raises:
        ValueError: a degree below 1, or a product that is not world_size; the sentence holds the
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
        if self.dp_replicate * self.dp_shard * self.cp * self.tp != self.world_size:
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
        """Fill in a degree of -1: what the others leave.

        Of several at -1, cp takes what is left if it is one of them, else dp_replicate does; the
        others are 1.
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
        """The degrees and what they must multiply to, with numbers."""
        product = self.dp_replicate * self.dp_shard * self.cp * self.tp
        terms = " x ".join(f"{axis} {degree}" for axis, degree in self.degrees.items())
        sign = "=" if product == self.world_size else "!="
        return f"{terms} = {product} {sign} {self.world_size} processes".replace(
            f"= {product} = ", "= "
        )

    def dp_rank(self, rank: int) -> int:
        """Which of the `dp` streams of sequences a global rank reads."""
        return rank // (self.cp * self.tp)


def build_mesh(dims: ParallelDims, device_type: str) -> DeviceMesh:
    """The mesh of `dims` on "cpu" or "cuda". The default process group must be up."""
    return init_device_mesh(device_type, tuple(dims.degrees.values()), mesh_dim_names=MESH_AXES)


def gradient_group(mesh: DeviceMesh) -> ProcessGroup:
    """The ranks whose gradients belong to the same weights: dp_replicate x dp_shard x cp.

    A rank of the cp axis sees other tokens of the same sequence, which makes it one more data
    rank as far as gradients are concerned.
    """
    return mesh["dp_replicate", "dp_shard", "cp"]._flatten("dp_cp").get_group()


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What weights are cut over: dp_shard x cp as one axis; before it dp_replicate, if above 1.

    Without cp in it, every rank of a sequence would hold the same weights once more.
    """
    sharded = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    if mesh["dp_replicate"].size() == 1:
        return sharded
    with warnings.catch_warnings():
        # torch 2.11 to 2.13 serve it and advise against it, without another public way.
        warnings.filterwarnings("ignore", "Slicing a flattened dim")
        return mesh["dp_replicate", "dp_shard_cp"]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is cut or partial over ranks, gathered or summed, on all of them; others as
    they are. All ranks of its mesh must call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
