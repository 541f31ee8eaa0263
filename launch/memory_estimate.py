"""Memory of one rank, from one simulated step with fake ranks and fake tensors.

The dry run makes a process group of fake ranks (no socket, no message) and tensors without storage,
builds the model that a real run would build (launch/build.py), runs one forward and backward in
each activation checkpointing mode, and counts the bytes that are alive. So the numbers follow the
code, the mesh and the dtypes, on any machine. Only FSDP's sharding is computed by hand: doing it
would create as many small tensors per weight as there are ranks. FP8 products are simulated as
products in the training dtype: FP8 needs no more, and its casts can be counted only when compiled.
Not included: the CUDA context, NCCL's buffers, what the allocator loses between blocks, scratch
memory inside kernels, and the savings of compilation.
"""

import contextlib
import copy
import dataclasses
import math
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lasp import SequenceShard
from launch.build import (
    LossModel,
    autocast_dtype,
    build_model,
    check_float8_sizes,
    data_parallel_engine,
    get_family,
    num_weight_shards,
)
from launch.config import Config, Float8, Quantize
from launch.distributed import DistContext, RankInfo
from launch.resolve import batching
from parallel.mesh import build_mesh

_GIB = 2**30
# For what an estimate leaves out: CUDA's context, NCCL's buffers, and what the allocator loses
# between blocks. In mode full on H200, TNL 1b reserved more than the estimate by 3.8 GiB with 23.9
# GiB of activations (one GPU), 6.1 with 23.9 (eight, FSDP), 9.8 with 47.2 (two), 17.5 with 94.1
# (one): a constant and a part of the activations. In the other modes compiled blocks reserved 6 and
# 10 GiB less than the estimate; what eager ones lose was not measured.
_LOST_IN_FULL, _BESIDES_IN_FULL = 0.19, 3.5 * _GIB
_RESERVE = 7 * _GIB
_MAX_RANKS = 1 << 16
_MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Estimate:
    """Bytes of the fullest rank, and what it holds of each parameter.

    Attributes:
        shards: {name: (full shape, shape of this rank's shard)}.
        weights, gradients, moments: of this rank's shards, float32.
        gathered: other ranks' weights while they are needed, and gradients before they are sharded
            (FSDP).
        activations: the most that the forward and backward of a micro-batch hold besides; `logits`
            and `states` are parts of it.
        logits: of a chunk of tokens, in float32 and in the dtype of the products.
        states: the recurrent states received from other ranks, or from the segment before.
        kept_states: those of all segments, in the memory of the host or of the device.
        start: before the first step, when every rank draws all weights and then keeps its own.
        reserve: for what is not counted.
        kept_on_host: `kept_states` need no memory of the device.
    """

    shards: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    weights: int
    gradients: int
    moments: int
    gathered: int
    activations: int
    logits: int
    states: int
    kept_states: int
    start: int
    reserve: int

    kept_on_host: bool

    @property
    def total(self) -> int:
        step = self.weights + self.gradients + self.moments + self.gathered + self.activations
        if not self.kept_on_host:
            step += self.kept_states
        return max(step, self.start)

    def fits(self, memory: float) -> bool:
        """True if a device of `memory` GiB holds it and its reserve."""
        return self.total + self.reserve <= memory * _GIB


def estimate(config: Config, info: RankInfo, shape: Any) -> Estimate:
    """The memory of a job, for a model of config `shape`; nothing of that size is allocated.

    Call it inside `fake_ranks()` if the job has more than one rank.
    """
    family, dims = get_family(config.model.family), info.dims
    config = copy.deepcopy(config)
    dtype = autocast_dtype(config, info.device) or torch.float32
    # What the job's devices would choose, not the CPU that simulates them.
    config.training.mixed_precision_param = str(dtype).removeprefix("torch.")
    config.compile.enable = False
    float8, config.quantize = config.float8, Quantize()
    is_fsdp = data_parallel_engine(config, dims) == "fsdp"
    ctx = _simulated_rank0(info)
    with FakeTensorMode():
        loss_model = build_model(config, ctx, shape)
        check_float8_sizes(loss_model.model, float8)
        shards = _shards(loss_model.model, num_weight_shards(config, dims))
        full_gradients = _bytes_of(loss_model.parameters(), 4)
        gathered = _gathered(loss_model, config, dtype, float8) if is_fsdp else 0
        activations = _peak(loss_model, config, ctx, dtype if is_fsdp else None)
    weights = 4 * sum(math.prod(part) for _, part in shards.values())
    accumulates = batching(config, info).accumulation > 1
    if is_fsdp and accumulates and not config.parallelism.fsdp_reduce_every_micro_batch:
        # Gradients are sharded only at the last micro-batch.
        gathered += full_gradients
    sequences = config.training.local_batch_size
    tokens = sequences * -(-config.training.forward_len // dims.cp)
    chunk = min(config.training.loss_chunk_size, tokens)
    is_full = config.activation_checkpoint.mode == "full"
    states = sequences * family.state_bytes(shape) // dims.tp
    return Estimate(
        shards=shards,
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        gathered=gathered,
        activations=activations,
        logits=chunk * (shape.vocab_size // dims.tp) * (4 + dtype.itemsize),
        states=states if dims.cp > 1 or config.training.segment_len else 0,
        kept_states=_num_kept(config) * states,
        start=4 * family.num_parameters(shape),
        kept_on_host=config.training.segment_states == "host",
        reserve=int(_BESIDES_IN_FULL + _LOST_IN_FULL * activations if is_full else _RESERVE),
    )


def format_estimate(
    config: Config, info: RankInfo, shape: Any, memory: float | None
) -> tuple[str, bool]:
    """The shards and GiB of one rank as text, and whether they fit.

    Args:
        memory: GiB of a device; None if not known, which counts as enough.
    """
    by_mode = {}
    for mode in _MODES:
        changed = copy.deepcopy(config)
        changed.activation_checkpoint.mode = mode
        by_mode[mode] = estimate(changed, info, shape)
    own = by_mode[config.activation_checkpoint.mode]
    lines = ["parameters, and the shard of one rank:", *_shard_lines(own)]
    lines.append("memory of one rank in GiB:")
    for part in ("weights", "gradients", "moments", "gathered", "activations"):
        lines.append(f"  {part:<12}{getattr(own, part) / _GIB:9.2f}")
    modes = ", ".join(f"{mode} {each.activations / _GIB:.2f}" for mode, each in by_mode.items())
    lines[-1] += (
        f"  (activation_checkpoint.mode {modes}; of these {own.logits / _GIB:.2f} for a chunk of "
        f"logits, {own.states / _GIB:.2f} for states)"
    )
    if own.kept_states:
        where = ""
        if own.kept_on_host:
            where = " of host memory, not in the total"
            if config.job.dry_run_gpus_per_host:
                of_host = own.kept_states * config.job.dry_run_gpus_per_host / _GIB
                where = f" of host memory, {of_host:.2f} for all ranks of a host, not in the total"
        lines.append(
            f"  {'states':<12}{own.kept_states / _GIB:9.2f}  (of {_num_kept(config):,} "
            f"segments{where})"
        )
    lines.append(f"  {'total':<12}{own.total / _GIB:9.2f}")
    if own.total == own.start:
        lines[-1] += "  (before the first step, when every rank draws all weights)"
    if memory is None:
        return "\n".join(lines), True
    verdict = "fits in" if own.fits(memory) else "does not fit in"
    lines.append(
        f"{verdict} {memory:g} GiB, of which {own.reserve / _GIB:.1f} are kept for the "
        "allocator's losses, CUDA and NCCL"
    )
    return "\n".join(lines), own.fits(memory)


def _shard_lines(found: Estimate) -> list[str]:
    """One line for all parameters that differ only in the block's number."""
    counts: dict[tuple, int] = {}
    for name, shapes in found.shards.items():
        key = (re.sub(r"\.\d+\.", ".*.", name), *shapes)
        counts[key] = counts.get(key, 0) + 1
    return [
        f"  {count:>3} x {name:<38} {_times(full):>16} -> {_times(part)}"
        for (name, full, part), count in counts.items()
    ]


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@contextlib.contextmanager
def fake_ranks() -> Iterator[None]:
    """A process group whose other ranks do not exist: nothing is sent, no socket opens.

    Once per process: DTensor remembers meshes by value, and would find the closed groups of an
    earlier one.
    """
    # torch's own tool for this; importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=_MAX_RANKS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _simulated_rank0(info: RankInfo) -> DistContext:
    info = dataclasses.replace(
        info, rank=0, local_rank=0, backend="fake", device=torch.device("cpu")
    )
    return DistContext(info, build_mesh(info.dims, "cpu") if info.dims.world_size > 1 else None)


def _peak(
    loss_model: LossModel, config: Config, ctx: DistContext, gathered_dtype: torch.dtype | None
) -> int:
    """Most bytes that a micro-batch holds besides weights and gradients."""
    model, parallelism = loss_model.model, config.parallelism
    if gathered_dtype is not None:
        # FSDP's forward sees the blocks' matrices in this dtype: nothing is left to cast.
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().to(gathered_dtype))
    shard = SequenceShard.split(
        config.training.forward_len,
        ctx.cp_group,
        parallelism.context_parallel_method,
        parallelism.context_parallel_layout,
    )
    tokens = torch.zeros(config.training.local_batch_size, shard.length, dtype=torch.long)
    with _LiveBytes() as live:
        for parameter in model.parameters():
            # Counted first, because operators return views of them.
            live.add(parameter)
            parameter.grad = torch.zeros_like(parameter)
        before = live.bytes
        if not config.training.segment_len:
            loss_model(tokens, tokens, shard, None).backward()
        else:
            states = model.initial_states(len(tokens))
            states.layers = [state.requires_grad_() for state in states.layers]
            loss, after = loss_model(tokens, tokens, shard, None, states)
            # A later segment has sent the gradients of the states.
            gradients = [None, *(torch.zeros_like(state) for state in after)]
            torch.autograd.backward([loss, *after], gradients)
    return live.peak - before


def _num_kept(config: Config) -> int:
    """Segments whose states are kept until the backward."""
    training = config.training
    return training.num_segments - 1 if training.segment_gradient == "exact" else 0


def _gathered(loss_model: LossModel, config: Config, dtype: torch.dtype, float8: Float8) -> int:
    """Bytes that FSDP adds at most. Embedding and head stay gathered, and so do two blocks at a
    time, or all: each as it arrives and as it is used. Of embedding and head, and of one block:
    gradients before they are sharded, and as they are sent."""
    blocks = [_bytes_of(block.parameters(), 1) for block in loss_model.model.blocks]
    root = _bytes_of(loss_model.parameters(), 1) - sum(blocks)
    always = config.parallelism.fsdp_reshard_after_forward == "always"
    at_once = sum(sorted(blocks)[-2:] if always else blocks)
    itemsize = 1 if float8.enable_fsdp_float8_all_gather else dtype.itemsize
    return 4 * 4 * root + 2 * at_once * itemsize + max(blocks) * (dtype.itemsize + 4)


def _shards(model: nn.Module, ranks: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """{name: (full shape, shape of this rank's shard)} once FSDP has sharded over `ranks` what
    tensor parallelism left: by rows, of which rank 0 has no fewer than any other."""
    shards = {}
    for name, parameter in model.named_parameters():
        rows, *others = _local(parameter).shape
        shards[name] = tuple(parameter.shape), (-(-rows // ranks), *others)
    return shards


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes_of(tensors: Iterable[Tensor], itemsize: int) -> int:
    """Bytes of this rank's shards, at `itemsize` bytes per element."""
    return sum(itemsize * _local(tensor).numel() for tensor in tensors)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the operators' results that are still referenced, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor, unless its storage is counted already."""
        storage = _local(tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.bytes -= size
