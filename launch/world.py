"""This process among the ranks of the job: who it is, its device, and what all ranks agree on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from launch.errors import ConfigError, EchoError, UserError
from parallel.mesh import ParallelDims, build_mesh, gradient_group

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh, ProcessGroup

    from launch.config import Config

__all__ = ["Place", "World", "find_place", "open_world"]

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """What the environment and the config say before any socket opens."""

    rank: int
    local_rank: int
    backend: str
    device: torch.device
    dims: ParallelDims

    @property
    def dp_rank(self) -> int:
        return self.dims.dp_rank(self.rank)


def find_place(config: Config) -> Place:
    """This rank's place, from torchrun's variables and the config; that of the first GPU of a job
    that is only planned, where job.dry_run_gpus says so.

    Raises:
        ConfigError: degrees that do not multiply to the number of processes, a backend that this
            machine cannot run, or variables that are no numbers.
    """
    planned = config.job.dry_run_gpus if config.job.dry_run else 0
    size = planned or _from_environment("WORLD_SIZE", 1, at_least=1)
    rank = _from_environment("RANK", 0)
    local_rank = _from_environment("LOCAL_RANK", 0)
    local_size = _from_environment("LOCAL_WORLD_SIZE", 1, at_least=1)
    layout = config.parallelism
    replicate = layout.data_parallel_replicate_degree
    if layout.data_parallel_method == "fsdp" and layout.data_parallel_shard_degree == -1:
        # What is left goes to the axis that cuts weights.
        replicate = 1 if replicate == -1 else replicate
    try:
        dims = ParallelDims.resolve(
            size,
            dp_replicate=replicate,
            dp_shard=layout.data_parallel_shard_degree,
            cp=layout.context_parallel_degree,
            tp=layout.tensor_parallel_degree,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if dims.dp_shard > 1 and layout.data_parallel_method == "ddp":
        raise ConfigError(
            f"parallelism.data_parallel_shard_degree is {dims.dp_shard} ({dims.equation}), but "
            "data_parallel_method ddp cuts no weights: use fsdp, or leave "
            "data_parallel_replicate_degree at -1."
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = max(gpus, planned)
    backend = config.comm.backend
    if backend == "nccl" and gpus < local_size:
        raise ConfigError(
            f"comm.backend is nccl, but this machine has {gpus} GPUs for {local_size} processes: "
            "start fewer, or use --comm.backend gloo."
        )
    if backend == "auto":
        backend = "nccl" if gpus >= local_size else "gloo"
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    return Place(rank, local_rank, backend, device, dims)


def _from_environment(name: str, default: int, *, at_least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or int(text) < at_least:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, must be a whole number of at least "
            f"{at_least}: unset it, or start the job with torchrun, which sets it."
        )
    return int(text)


class World:
    """The ranks of a running job. With one process there is no process group at all."""

    def __init__(self, place: Place, mesh: DeviceMesh | None) -> None:
        self.place = place
        self.rank = place.rank
        self.device = place.device
        self.dims = place.dims
        self.is_first = place.rank == 0
        # Ranks of one tensor-parallel group hold the same tokens: one of them counts.
        self.counts = place.rank % place.dims.tp == 0
        self.cp_group: ProcessGroup | None = None
        self.gradient_group: ProcessGroup | None = None
        self.mesh = mesh
        if mesh is not None:
            self.gradient_group = gradient_group(mesh)
            if place.dims.cp > 1:
                self.cp_group = mesh["cp"].get_group()

    def total(self, *values: float, dtype: torch.dtype) -> list[float]:
        """The sums of `values` over all ranks, one small reduction."""
        # One process asks nobody, and so does not wait for its GPU either.
        device = "cpu" if self.gradient_group is None else self.device
        return self.summed(torch.tensor(values, dtype=dtype, device=device)).tolist()

    def summed(self, vector: Tensor) -> Tensor:
        """`vector` with its sum over all ranks in place; on its device, without waiting for it."""
        if self.gradient_group is not None:
            dist.all_reduce(vector)
        return vector

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (JSON), in rank order, on every rank."""
        if self.gradient_group is None:
            return [value]
        payload = json.dumps(value).encode()
        length = torch.tensor([len(payload)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.dims.world_size)]
        dist.all_gather(lengths, length)
        longest = int(max(lengths))
        padded = torch.frombuffer(bytearray(payload.ljust(longest)), dtype=torch.uint8)
        padded = padded.to(self.device)
        everyone = [torch.zeros_like(padded) for _ in lengths]
        dist.all_gather(everyone, padded)
        return [json.loads(bytes(each.tolist())) for each in everyone]

    def agree(self, function: Callable[[], T]) -> T:
        """Run `function` on every rank; a UserError on any rank ends all of them.

        The first rank that found a problem raises its own error, the others an EchoError.
        """
        result: T | None = None
        problem: UserError | None = None
        try:
            result = function()
        except UserError as error:
            problem = error
        reports = self.gather(None if problem is None else [str(problem), problem.exit_code])
        bad = [rank for rank, report in enumerate(reports) if report is not None]
        if not bad:
            return result
        if bad[0] == self.rank:
            raise problem
        message, code = reports[bad[0]]
        raise EchoError(message, code)

    def first_decides(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0; its JSON result, or its UserError, on every rank."""
        result = self.agree(lambda: function() if self.is_first else None)
        return self.gather(result)[0]

    def fail(self, error: UserError) -> NoReturn:
        """Raise a problem that every rank has found: rank 0 tells, the others end quietly."""
        raise error if self.is_first else EchoError(str(error), error.exit_code)

    def set_timeout(self, seconds: int) -> None:
        """The time after which a collective that does not come back is an error."""
        if self.gradient_group is None:
            return
        limit = timedelta(seconds=seconds)
        # Those of the mesh, and those that FSDP and others have made of it.
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(limit, group)

    @contextlib.contextmanager
    def patience(self, config: Config) -> Iterator[None]:
        """Allow init_timeout_seconds while one rank works and the others wait."""
        self.set_timeout(config.comm.init_timeout_seconds)
        try:
            yield
        finally:
            self.set_timeout(config.comm.train_timeout_seconds)


@contextlib.contextmanager
def open_world(place: Place, config: Config) -> Iterator[World]:
    """The process group and mesh of the job.

    Closed at the end and after a UserError, which ranks meet together. Any other exception is one
    rank's own: the others wait for it in a collective, and closing the group would wait for them.
    It is printed and the process ends at once, so that torchrun ends the others.
    """
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if place.dims.world_size == 1:
        yield World(place, None)
        return
    limit = timedelta(seconds=config.comm.init_timeout_seconds)
    # Not bound to a device: NCCL would then put the ring's messages in one queue with the
    # gradients' reductions.
    dist.init_process_group(place.backend, timeout=limit)
    try:
        world = World(place, build_mesh(place.dims, place.device.type))
        # The mesh's own groups may have started with the backend's default.
        world.set_timeout(config.comm.init_timeout_seconds)
        yield world
    except UserError:
        dist.destroy_process_group()
        raise
    except BaseException:
        _leave_at_once(place)
    # Without it a finished job may still abort in a destructor.
    dist.destroy_process_group()


def _leave_at_once(place: Place) -> NoReturn:
    """Print the exception being handled and end the process, with nothing closed."""
    where = f"rank {place.rank} of {place.dims.world_size} on {socket.gethostname()}"
    print(f"error: {where} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
