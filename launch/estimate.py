"""What one rank would hold: its model built, and a step of it run, on ranks and memory not there.

The dry run makes a process group of fake ranks (no socket, no message) and tensors without storage,
builds the very model that a run would build (launch/build.py), runs one forward and backward of
each recomputation mode, and counts the bytes that are alive. So the numbers follow the code, the
mesh and the dtypes, on any machine. FSDP's cut alone is arithmetic: making it takes as many small
tensors per weight as there are ranks. What the numbers leave out: the CUDA context, NCCL's buffers,
what the allocator loses between blocks, and scratch memory inside kernels. What they ignore:
compilation, by which blocks keep less.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lasp import SequenceShard
from launch.build import build_model
from launch.errors import ConfigError
from launch.plan import autocast_dtype, batching, check_layout, cut_over, data_parallel_engine
from launch.world import World
from parallel.mesh import build_mesh

if TYPE_CHECKING:
    from lasp.tnl import TNLConfig
    from launch.config import Config
    from launch.step import LossModel
    from launch.world import Place
    from parallel.mesh import ParallelDims

__all__ = ["Estimate", "advice", "estimate", "fake_ranks", "format_estimate"]

_GIB = 2**30
# What an estimate leaves out: CUDA's context, NCCL's buffers, and what the allocator loses between
# blocks. With blocks recomputed whole, on H200, TNL 1b reserved above it 3.8 GiB where activations
# are 23.9 (one GPU), 6.1 where they are 23.9 (eight, FSDP), 9.8 where 47.2 (two), 17.5 where 94.1
# (one): a part of them, and something. In the other modes compiled blocks reserved 6 and 10 GiB
# less than the estimate, and what eager ones lose was not measured.
_LOST_IN_FULL, _BESIDES_IN_FULL = 0.19, 3.5 * _GIB
_RESERVE = 7 * _GIB
# The largest job that can be planned, and that advice may come to.
_MOST_RANKS = 1 << 16
_MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Estimate:
    """Bytes of the fullest rank, and what it holds of each parameter.

    Attributes:
        shards: {name: (shape of the whole, shape of this rank's part)}.
        weights, gradients, moments: of this rank's part, float32.
        gathered: other ranks' weights while they are needed, and gradients before they are cut
            (FSDP).
        activations: the most that the forward and backward of a micro-batch hold besides; `logits`
            and `states` are parts of it.
        logits: of a chunk of tokens, in float32 and in the dtype of the products.
        states: the d x d states that came from other ranks, one per linear layer.
        start: before the first step; every rank draws all weights, and then keeps its own.
        reserve: for what is not counted.
    """

    shards: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    weights: int
    gradients: int
    moments: int
    gathered: int
    activations: int
    logits: int
    states: int
    start: int
    reserve: int

    @property
    def total(self) -> int:
        step = self.weights + self.gradients + self.moments + self.gathered + self.activations
        return max(step, self.start)

    def fits(self, memory: float) -> bool:
        """Whether a device of `memory` GiB holds it and its reserve."""
        return self.total + self.reserve <= memory * _GIB


def estimate(config: Config, place: Place, shape: TNLConfig) -> Estimate:
    """Of the job at `place`, for a model of `shape`; nothing of that size is allocated.

    To be called within `fake_ranks()`.
    """
    wanted = copy.deepcopy(config)
    dtype = autocast_dtype(config, place.device) or torch.float32
    # What the job's devices would choose, and not the CPU that stands for them here.
    wanted.training.mixed_precision_param = str(dtype).removeprefix("torch.")
    wanted.activation_checkpoint.offload = False
    wanted.compile.enable = False
    is_fsdp = data_parallel_engine(config, place.dims) == "fsdp"
    world = _first_rank(place)
    with FakeTensorMode():
        loss_model = build_model(wanted, world, shape)
        shards = _shards(loss_model.model, cut_over(config, place.dims))
        uncut = _bytes_of(loss_model.parameters(), 4)
        gathered = _gathered(loss_model, wanted, dtype) if is_fsdp else 0
        activations, block_input = _peak(loss_model, wanted, world, dtype if is_fsdp else None)
    weights = 4 * sum(math.prod(part) for _, part in shards.values())
    accumulates = batching(config, place).accumulation > 1
    if is_fsdp and accumulates and not config.parallelism.fsdp_reduce_every_micro_batch:
        # Gradients are cut at the last micro-batch.
        gathered += uncut
    if config.activation_checkpoint.offload and config.activation_checkpoint.mode != "none":
        # One is on its way, and the last block's stays.
        activations -= max(0, shape.num_layers - 2) * block_input
    tp, length = place.dims.tp, -(-config.training.seq_len // place.dims.cp)
    sequences = config.training.local_batch_size
    chunk = min(config.training.loss_chunk_size, sequences * length)
    is_full = config.activation_checkpoint.mode == "full"
    linear = [layer for layer in range(shape.num_layers) if not shape.is_softmax(layer)]
    keys = sum(map(shape.key_dim, linear))
    return Estimate(
        shards=shards,
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        gathered=gathered,
        activations=activations,
        logits=chunk * (shape.vocab_size // tp) * (4 + dtype.itemsize),
        states=4 * sequences * shape.num_heads // tp * keys * shape.head_dim
        if place.dims.cp > 1
        else 0,
        start=4 * shape.num_parameters(),
        reserve=int(_BESIDES_IN_FULL + _LOST_IN_FULL * activations if is_full else _RESERVE),
    )


def format_estimate(
    config: Config, place: Place, shape: TNLConfig, memory: float | None
) -> tuple[str, bool]:
    """What one rank holds: shards, GiB by part, whether a device of `memory` GiB (None: not known)
    is enough, and what to change if not. And again, whether it is (not known: yes)."""
    by_mode = {}
    for mode in _MODES:
        changed = copy.deepcopy(config)
        changed.activation_checkpoint.mode = mode
        by_mode[mode] = estimate(changed, place, shape)
    mine = by_mode[config.activation_checkpoint.mode]
    lines = ["parameters, and the part of one rank:", *_shard_lines(mine)]
    lines.append("memory of one rank in GiB:")
    for part in ("weights", "gradients", "moments", "gathered", "activations"):
        lines.append(f"  {part:<12}{getattr(mine, part) / _GIB:9.2f}")
    modes = ", ".join(f"{mode} {each.activations / _GIB:.2f}" for mode, each in by_mode.items())
    lines[-1] += (
        f"  (activation_checkpoint.mode {modes}; in it {mine.logits / _GIB:.2f} for a chunk of "
        f"logits, {mine.states / _GIB:.2f} for states)"
    )
    lines.append(f"  {'total':<12}{mine.total / _GIB:9.2f}")
    if mine.total == mine.start:
        lines[-1] += "  (before the first step, when a rank draws all weights to keep its own)"
    if memory is None:
        return "\n".join(lines), True
    verdict = "fits in" if mine.fits(memory) else "does not fit in"
    lines.append(
        f"{verdict} {memory:g} GiB, of which {mine.reserve / _GIB:.1f} are kept for the "
        "allocator's losses, CUDA and NCCL"
    )
    if not mine.fits(memory):
        lines.append(advice(config, place, shape, memory, by_mode))
    return "\n".join(lines), mine.fits(memory)


def advice(
    config: Config, place: Place, shape: TNLConfig, memory: float, by_mode: dict[str, Estimate]
) -> str:
    """One sentence: which numbers to change so that a rank fits in `memory` GiB.

    Args:
        by_mode: the estimate of this job in each mode of activation_checkpoint.
    """
    best = by_mode[config.activation_checkpoint.mode]
    changes: dict[str, Any] = {}
    for setting, values in _remedies(config, place.dims, best):
        for value in values:
            changed, there = _changed(config, place, setting, value)
            if there.dims.world_size > _MOST_RANKS:
                break
            try:
                check_layout(changed, there)
                known = by_mode.get(value) if setting == "activation_checkpoint.mode" else None
                result = known or estimate(changed, there, shape)
            except (ConfigError, ValueError):
                # A degree that the model or the batch does not divide by.
                continue
            if result.total > 0.98 * best.total:
                break
            best, config, place = result, changed, there
            changes[setting] = value
            if best.fits(memory):
                return (
                    f"change {_listed(changes)}: {best.total / _GIB:.2f} GiB per rank "
                    f"({place.dims.equation})"
                )
    return (
        f"even {_listed(changes) or 'a larger mesh'} leaves {best.total / _GIB:.2f} GiB per rank: "
        "use a smaller model, or shorter sequences"
    )


def _remedies(config: Config, dims: ParallelDims, now: Estimate) -> list[tuple[str, list[Any]]]:
    """Settings that save memory, each with the values to try in turn: first those that cost no
    devices, then the axis that cuts what weighs most."""
    local, mode = config.training.local_batch_size, config.activation_checkpoint.mode
    factors = [2**power for power in range(1, 11)]
    free = [
        ("activation_checkpoint.mode", list(_MODES[_MODES.index(mode) + 1 :])),
        ("training.local_batch_size", [local // n for n in factors if local % n == 0]),
    ]
    if dims.cp > 1:
        free.append(("parallelism.data_parallel_method", ["fsdp"]))
    weights = ("parallelism.data_parallel_shard_degree", [dims.dp_shard * n for n in factors])
    tokens = ("parallelism.context_parallel_degree", [dims.cp * n for n in factors])
    heavier = now.weights + now.gradients + now.moments + now.gathered > now.activations
    return [*free, weights, tokens] if heavier else [*free, tokens, weights]


def _changed(config: Config, place: Place, setting: str, value: Any) -> tuple[Config, Place]:
    """The job with one setting changed. The ranks that a larger degree takes come from
    dp_replicate where it has them; else the job grows."""
    config = copy.deepcopy(config)
    section, key = setting.split(".")
    setattr(getattr(config, section), key, value)
    axis = {"data_parallel_shard_degree": "dp_shard", "context_parallel_degree": "cp"}.get(key)
    if axis is None:
        return config, place
    dims = place.dims
    factor = value // getattr(dims, axis)
    degrees, size = {**dims.degrees, axis: value}, dims.world_size
    if dims.dp_replicate % factor == 0:
        degrees["dp_replicate"] //= factor
    else:
        size *= factor
    dims = type(dims)(**degrees, world_size=size)
    config.parallelism.data_parallel_replicate_degree = dims.dp_replicate
    return config, dataclasses.replace(place, dims=dims)


def _listed(changes: dict[str, Any]) -> str:
    return ", ".join(f"{setting} to {value}" for setting, value in changes.items())


def _shard_lines(found: Estimate) -> list[str]:
    """One line for the parameters that have a name but for the block's number, and shapes."""
    counts: dict[tuple, int] = {}
    for name, shapes in found.shards.items():
        key = (re.sub(r"\.\d+\.", ".*.", name), *shapes)
        counts[key] = counts.get(key, 0) + 1
    return [
        f"  {count:>3} x {name:<38} {_times(whole):>16} -> {_times(part)}"
        for (name, whole, part), count in counts.items()
    ]


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@contextlib.contextmanager
def fake_ranks() -> Iterator[None]:
    """A process group whose other ranks are not there: nothing is sent, no socket opens.

    Once in a process: DTensor remembers meshes by value, and would find the closed groups of an
    earlier one.
    """
    # torch's own means for this; importing it makes the backend known.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=_MOST_RANKS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _first_rank(place: Place) -> World:
    """The first rank of the job, as the process that plays it."""
    place = dataclasses.replace(
        place, rank=0, local_rank=0, backend="fake", device=torch.device("cpu")
    )
    return World(place, build_mesh(place.dims, "cpu") if place.dims.world_size > 1 else None)


def _peak(
    loss_model: LossModel, config: Config, world: World, gathered_dtype: torch.dtype | None
) -> tuple[int, int]:
    """Most bytes of a micro-batch besides weights and gradients; bytes of a block's input."""
    model, inputs = loss_model.model, []
    if gathered_dtype is not None:
        # FSDP's forward sees the blocks' matrices in this dtype: nothing is left to cast.
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().to(gathered_dtype))
    model.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    layout = config.parallelism
    shard = SequenceShard.split(
        config.training.seq_len,
        world.cp_group,
        layout.context_parallel_method,
        layout.context_parallel_layout,
    )
    tokens = torch.zeros(config.training.local_batch_size, shard.length, dtype=torch.long)
    with _Alive() as alive:
        for parameter in model.parameters():
            # Operators return views of it.
            alive.add(parameter)
            parameter.grad = torch.zeros_like(parameter)
        before = alive.bytes
        loss = loss_model(tokens, tokens, shard, None)
        block_input = _bytes_of(inputs[:1])
        inputs.clear()
        loss.backward()
    return alive.peak - before, block_input


def _gathered(loss_model: LossModel, config: Config, dtype: torch.dtype) -> int:
    """Bytes that FSDP adds at its fullest. Of embedding and head, which stay gathered, and of the
    blocks, two at a time or all: weights as they arrive and as they are used. Of embedding and
    head, and of a block: gradients before they are cut, and as they leave."""
    blocks = [_bytes_of(block.parameters(), 1) for block in loss_model.model.blocks]
    root = _bytes_of(loss_model.parameters(), 1) - sum(blocks)
    always = config.parallelism.fsdp_reshard_after_forward == "always"
    at_once = sum(sorted(blocks)[-2:] if always else blocks)
    return 4 * 4 * root + 2 * at_once * dtype.itemsize + max(blocks) * (dtype.itemsize + 4)


def _shards(model: nn.Module, ranks: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """{name: (shape of the whole, shape of this rank's part)} once FSDP has cut over `ranks` what
    tensor parallelism left: by rows, of which the first rank has no fewer than any other."""
    shards = {}
    for name, parameter in model.named_parameters():
        rows, *others = _part(parameter).shape
        shards[name] = tuple(parameter.shape), (-(-rows // ranks), *others)
    return shards


def _part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes_of(tensors, itemsize: int | None = None) -> int:
    """Of this rank's parts, at `itemsize` bytes each or as they are."""
    return sum(part.numel() * (itemsize or part.itemsize) for part in map(_part, tensors))


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that operators made and that are still referred to, and their peak."""

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
        """Count a tensor, unless its memory is counted already."""
        storage = _part(tensor).untyped_storage()
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
