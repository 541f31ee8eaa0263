"""This process among the ranks of the job: its number and device, and small collectives."""

import contextlib
import faulthandler
import hashlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup

from lasp.exchange.comm import all_gather_flat
from launch.config import Config
from launch.exit_codes import (
    INTERRUPTED,
    ConfigError,
    HungRankError,
    RemoteRankError,
    UserError,
)
from launch.heartbeat import NCCL_MARGIN, Heartbeat
from launch.hosts import Hosts
from launch.rendezvous import difference, differs_error, meet, settings, versions
from parallel.mesh import ParallelDims, build_mesh, gradient_group

T = TypeVar("T")


@dataclass(frozen=True)
class RankInfo:
    """What the environment and the config say before any socket opens.

    Attributes:
        ranks_per_host: of this host, or of each simulated one; None: all ranks are on one host.
    """

    rank: int
    local_rank: int
    backend: str
    device: torch.device
    dims: ParallelDims
    ranks_per_host: int | None = None

    @property
    def dp_rank(self) -> int:
        return self.dims.dp_rank(self.rank)


def get_rank_info(config: Config) -> RankInfo:
    """This rank, from torchrun's variables and the config. With job.dry_run_gpus, the first rank of
    a job of that many GPUs.

    Raises:
        ConfigError: degrees that do not multiply to the number of processes, a backend that this
            machine cannot run, or variables that are not numbers.
    """
    simulated = config.job.dry_run_gpus if config.job.dry_run else 0
    dims = _parallel_dims(config, simulated or from_environment("WORLD_SIZE", 1, minimum=1))
    rank = from_environment("RANK", 0)
    local_rank = from_environment("LOCAL_RANK", 0)
    local_size = from_environment("LOCAL_WORLD_SIZE", 1, minimum=1)
    gpus = max(torch.cuda.device_count() if torch.cuda.is_available() else 0, simulated)
    backend = config.comm.backend
    if backend == "nccl" and gpus < local_size:
        raise ConfigError(
            f"comm.backend is nccl, but this machine has {gpus} GPUs for {local_size} processes: "
            "start fewer, or use --comm.backend gloo."
        )
    if backend == "auto":
        backend = "nccl" if gpus >= local_size else "gloo"
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    per_host = config.job.dry_run_gpus_per_host if simulated else local_size
    if per_host in (0, dims.world_size):
        per_host = None
    return RankInfo(rank, local_rank, backend, device, dims, per_host)


def _parallel_dims(config: Config, world_size: int) -> ParallelDims:
    parallelism = config.parallelism
    replicate = parallelism.data_parallel_replicate_degree
    if (
        parallelism.data_parallel_method == "fsdp"
        and parallelism.data_parallel_shard_degree == replicate == -1
    ):
        # The remaining ranks go to the axis that shards weights.
        replicate = 1
    try:
        dims = ParallelDims.resolve(
            world_size,
            dp_replicate=replicate,
            dp_shard=parallelism.data_parallel_shard_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if dims.dp_shard > 1 and parallelism.data_parallel_method == "ddp":
        raise ConfigError(
            f"parallelism.data_parallel_shard_degree is {dims.dp_shard} ({dims.equation}), but "
            "data_parallel_method ddp shards no weights: use fsdp, or leave "
            "data_parallel_replicate_degree at -1."
        )
    return dims


def from_environment(name: str, default: int, *, minimum: int = 0) -> int:
    """A variable that torchrun sets. Raises ConfigError if it is no number."""
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or int(text) < minimum:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, must be a whole number of at least "
            f"{minimum}: unset it, or start the job with torchrun, which sets it."
        )
    return int(text)


class DistContext:
    """The ranks of a running job. A single process has no process group at all.

    Attributes:
        info: this rank.
        mesh: of all ranks; None for a single process.
        is_loss_rank: this rank's loss counts. (The ranks of a tensor-parallel group see the same
            tokens, so only one of them counts.)
        cp_group: the ranks that share a sequence; None if this rank holds all of it.
        gradient_group: the ranks whose gradients are summed; None for a single process.
        hosts: of the ranks; None where they have not met (a single process, a simulation).
    """

    def __init__(
        self,
        info: RankInfo,
        mesh: DeviceMesh | None,
        heartbeat: Heartbeat | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.info = info
        self.hosts = hosts
        self._heartbeat = heartbeat
        self._seconds: int | None = None
        self.rank = info.rank
        self.device = info.device
        self.dims = info.dims
        self.is_rank0 = info.rank == 0
        self.is_loss_rank = info.rank % info.dims.tp == 0
        self.cp_group: ProcessGroup | None = None
        self.gradient_group: ProcessGroup | None = None
        self.mesh = mesh
        if mesh is not None:
            self.gradient_group = gradient_group(mesh)
            if info.dims.cp > 1:
                self.cp_group = mesh["cp"].get_group()

    def sum_numbers(self, *values: float, dtype: torch.dtype) -> list[float]:
        """Each of `values` summed over all ranks, in one reduction."""
        # A single process need not wait for its GPU.
        device = "cpu" if self.gradient_group is None else self.device
        return self.all_reduce(torch.tensor(values, dtype=dtype, device=device)).tolist()

    def all_reduce(self, vector: Tensor) -> Tensor:
        """Sum `vector` over all ranks in place, without waiting for the device."""
        if self.gradient_group is not None:
            dist.all_reduce(vector)
        return vector

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (JSON), in rank order, on every rank.

        A rank receives the values of all: where rank 0 alone needs them, or one is enough, the
        methods below cost less.
        """
        if self.gradient_group is None:
            return [value]
        return self._read(self._gather_padded(value))

    def gather_on_rank0(self, value: Any) -> list[Any] | None:
        """Every rank's `value` (JSON), in rank order, on rank 0; None on the others."""
        if self.gradient_group is None:
            return [value]
        if self.device.type != "cuda":
            return self._read(self._gather_padded(value, to_rank0=True))
        # With NCCL all receive, but do not read: its gather would connect rank 0 with every other
        # rank, at some megabytes of GPU memory each.
        everyone = self._gather_padded(value)
        return self._read(everyone) if self.is_rank0 else None

    def first(self, value: Any | None) -> tuple[int, Any] | None:
        """(rank, value) of the first rank whose `value` (JSON) is not None, on every rank; None if
        there is none, which costs one reduction of eight bytes."""
        if self.gradient_group is None:
            return None if value is None else (0, value)
        size = self.dims.world_size
        lowest = torch.tensor([size if value is None else self.rank], device=self.device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        rank = int(lowest)
        return None if rank == size else (rank, self._broadcast(value, rank))

    def all_or_raise(self, function: Callable[[], T]) -> T:
        """Run `function` on every rank; a UserError on any rank raises on all of them.

        The first rank that failed raises its own error, the others a RemoteRankError.
        """
        result: T | None = None
        problem: UserError | None = None
        try:
            result = function()
        except UserError as error:
            problem = error
        failed = self.first(None if problem is None else [str(problem), problem.exit_code])
        if failed is None:
            return result
        rank, (message, code) = failed
        if rank == self.rank:
            raise problem
        raise RemoteRankError(message, code)

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0; every rank returns its JSON result, or raises its UserError."""
        result: T | None = None
        report = problem = None
        if self.is_rank0:
            try:
                result = function()
            except UserError as error:
                problem, report = error, [str(error), error.exit_code]
        if self.gradient_group is not None:
            result, report = self._broadcast([result, report], 0)
        if problem is not None:
            raise problem
        if report is not None:
            raise RemoteRankError(*report)
        return result

    def _broadcast(self, value: Any, source: int) -> Any:
        """The `value` (JSON) of one rank, on every rank."""
        payload = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(payload)], device=self.device)
        dist.broadcast(length, source)
        text = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if payload:
            text = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self.device)
        dist.broadcast(text, source)
        return json.loads(text.cpu().numpy().tobytes())

    def _gather_padded(self, value: Any, to_rank0: bool = False) -> Tensor | None:
        """The values as texts of one length [P, length], uint8; None except on rank 0 if they go
        there alone."""
        payload = json.dumps(value).encode()
        length = torch.tensor([len(payload)], device=self.device)
        dist.all_reduce(length, dist.ReduceOp.MAX)
        padded = torch.frombuffer(bytearray(payload.ljust(int(length))), dtype=torch.uint8)
        padded = padded.to(self.device)
        if not to_rank0:
            everyone, work = all_gather_flat(padded, dist.group.WORLD)
            work.wait()
            return everyone.view(-1, len(padded))
        rows = None
        if self.is_rank0:
            rows = [torch.zeros_like(padded) for _ in range(self.dims.world_size)]
        dist.gather(padded, rows, dst=0)
        return None if rows is None else torch.stack(rows)

    def _read(self, everyone: Tensor | None) -> list[Any] | None:
        """The values of such texts."""
        if everyone is None:
            return None
        return [json.loads(row.tobytes()) for row in everyone.cpu().numpy()]

    def fail(self, error: UserError) -> NoReturn:
        """Raise an error that every rank has found: rank 0 reports it, the others exit quietly."""
        raise error if self.is_rank0 else RemoteRankError(str(error), error.exit_code)

    def compare(self, facts: dict[str, Any]) -> None:
        """Raise ConfigError on all ranks, with what differs, unless all pass the same (JSON)."""
        if self.gradient_group is None:
            return
        digest = hashlib.sha256(json.dumps(sorted(facts.items())).encode()).digest()
        number = int.from_bytes(digest[:8], "little", signed=True)
        # The greatest of ~x is ~ the least of x. Only ranks that differ send their facts.
        greatest = torch.tensor([number, ~number], device=self.device)
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        highest, complement = greatest.tolist()
        if highest == ~complement:
            return
        text = difference(self.gather(facts))
        if text is not None:
            self.fail(differs_error(text))

    def enter(self, phase: str, step: int | None = None) -> None:
        """The ranks begin a phase, of a step if given: an error that names this rank says so."""
        if self._heartbeat is not None:
            if step is not None:
                self._heartbeat.step = step
            self._heartbeat.enter(phase)

    def set_timeout(self, seconds: int) -> None:
        """Set the time after which an unfinished collective is an error."""
        self._seconds = seconds
        if self.gradient_group is None:
            return
        if self._heartbeat is not None:
            self._heartbeat.limit = seconds
        limit = _collective_timeout(seconds, self.info)
        # The mesh's groups, and those that FSDP and others have made from it.
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(limit, group)

    @contextlib.contextmanager
    def long_timeout(self, config: Config) -> Iterator[None]:
        """Allow init_timeout_seconds while one rank works and the others wait."""
        before = self._seconds or config.comm.train_timeout_seconds
        self.set_timeout(config.comm.init_timeout_seconds)
        try:
            yield
        finally:
            self.set_timeout(before)


def start_copy(vector: Tensor) -> Callable[[], list[float]]:
    """Start to copy a vector to the host; what is returned waits for that, not for later work."""
    if not vector.is_cuda:
        return vector.tolist
    copy = vector.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[float]:
        done.synchronize()
        return copy.tolist()

    return wait


def _collective_timeout(seconds: int, info: RankInfo) -> timedelta:
    """For process groups, so that the heartbeat of a rank acts first where NCCL would abort."""
    return timedelta(seconds=seconds + (NCCL_MARGIN if info.backend == "nccl" else 0))


def meet_ranks(
    config: Config, info: RankInfo, more: dict[str, Any] | None = None
) -> tuple[dist.Store, Hosts] | None:
    """The store and the hosts of the job, once all ranks are known to have the same settings and
    versions (and `more`); None for a single process.

    Raises:
        ConfigError, HungRankError: see `launch.rendezvous.meet`.
    """
    # Not that of a simulated job.
    size = from_environment("WORLD_SIZE", 1, minimum=1)
    if size == 1:
        return None
    facts = settings(config) | {"the backend (comm.backend)": info.backend} | versions()
    seconds = config.comm.init_timeout_seconds
    return meet(info.rank, size, facts | (more or {}), timeout_seconds=seconds)


def refuse_start(error: UserError, config: Config | None = None) -> UserError:
    """Tell the other ranks, if there are any, that this one cannot run; the error to exit with.

    The first rank that cannot run reports its error, the others exit quietly.
    """
    try:
        rank, size = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1, minimum=1)
    except ConfigError:
        return error
    if size == 1 or "MASTER_ADDR" not in os.environ:
        # Processes that cannot meet were given the same: one report is enough.
        return error if rank == 0 else RemoteRankError(str(error), error.exit_code)
    try:
        seconds = (config or Config()).comm.init_timeout_seconds
        meet(rank, size, {}, problem=error, timeout_seconds=seconds)
    except HungRankError:
        return error
    except UserError as agreed:
        return agreed
    return error


def report_error(error: UserError) -> int:
    """Print an error, unless another rank does; the exit code."""
    if not isinstance(error, RemoteRankError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


@contextlib.contextmanager
def open_dist_context(
    info: RankInfo, config: Config, more: dict[str, Any] | None = None
) -> Iterator[DistContext]:
    """Open the process group and mesh of the job, once the ranks have compared their settings and
    `more` (`meet_ranks`).

    They are closed at the end and after a UserError, which every rank raises. Any other
    exception belongs to one rank: the others wait for it in a collective, and closing the group
    would wait for them. So it is printed and the process exits at once; torchrun ends the others.
    If another rank is the cause, the exit code says so (`launch.heartbeat`).
    """
    if info.device.type == "cuda":
        torch.cuda.set_device(info.device)
    seconds = config.comm.init_timeout_seconds
    met = meet_ranks(config, info, more)
    if met is None:
        yield DistContext(info, None)
        return
    store, hosts = met
    if not faulthandler.is_enabled():
        # A process that a signal ends, such as NCCL's abort, prints its stacks.
        faulthandler.enable()
    size, folder = info.dims.world_size, Path(config.job.dump_folder)
    heartbeat = Heartbeat(store, info.rank, hosts, seconds=seconds, folder=folder)
    try:
        # Not bound to a device: NCCL would then queue the ring's messages behind the gradients'
        # reductions.
        dist.init_process_group(
            info.backend,
            store=store,
            rank=info.rank,
            world_size=size,
            timeout=_collective_timeout(seconds, info),
        )
        ctx = DistContext(info, build_mesh(info.dims, info.device.type), heartbeat, hosts)
        # The mesh's own groups may have started with the backend's default.
        ctx.set_timeout(seconds)
        yield ctx
    except UserError:
        heartbeat.stop()
        dist.destroy_process_group()
        raise
    except BaseException as error:
        heartbeat.explain(error)
        heartbeat.stop(f"{type(error).__name__}: {error}")
        _exit_at_once(info, error)
    heartbeat.stop()
    # Without this a finished job may still abort in a destructor.
    dist.destroy_process_group()


def _exit_at_once(info: RankInfo, error: BaseException) -> NoReturn:
    """Print the exception being handled and end the process without closing anything."""
    where = f"rank {info.rank} of {info.dims.world_size} on {socket.gethostname()}"
    if isinstance(error, KeyboardInterrupt):
        print(f"error: {where} was interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    print(f"error: {where} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
