"""Sharded tensors on disk: every rank writes the shards it holds, any rank reads what it needs.

Files are safetensors. If a file holds only a shard of a tensor, its metadata has the shard's place:
{"pieces": '{"<name>": [[full shape], [offset of the shard]]}'}. A reader needs the files alone, and
may want other shards than those that were written.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.float8 import high_precision

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorShard:
    """The block of a tensor that this rank holds.

    Attributes:
        local: the block, sharing memory with the tensor.
        shape: of the full tensor.
        offset: of the block in it.
        is_writer: among the ranks that hold this block, this one writes it.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    is_writer: bool

    @property
    def region(self) -> tuple[slice, ...]:
        """The block's place in the full tensor."""
        return tuple(
            slice(start, start + size)
            for start, size in zip(self.offset, self.local.shape, strict=True)
        )


def shard_of(tensor: Tensor, *, is_rank0: bool) -> TensorShard:
    """The local shard of a DTensor, or all of a plain tensor (which rank 0 writes)."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return TensorShard(tensor, tuple(tensor.shape), (0,) * tensor.dim(), is_rank0)
    local, coordinate = high_precision(tensor.to_local()), tensor.device_mesh.get_coordinate()
    start, size = [0] * tensor.dim(), list(tensor.shape)
    is_writer = local.numel() > 0
    axes = list(zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True))
    # FSDP shards what tensor parallelism has sharded before it, although its mesh axis is the outer
    # one; torch marks such a placement as strided.
    for placement, parts, index in sorted(axes, key=lambda axis: hasattr(axis[0], "split_factor")):
        dim = getattr(placement, "dim", None)
        if dim is None:
            is_writer = is_writer and index == 0
            continue
        length = -(-size[dim] // parts)
        first = min(length * index, size[dim])
        start[dim] += first
        size[dim] = min(length, size[dim] - first)
    assert tuple(size) == tuple(local.shape), f"{size} of {tensor.placements} is {local.shape}"
    return TensorShard(local, tuple(tensor.shape), tuple(start), is_writer)


def write_shards(path: Path, shards: Mapping[str, TensorShard]) -> None:
    """Write shards by name to a safetensors file, with their places in the full tensors."""
    partial = {
        name: [shard.shape, shard.offset]
        for name, shard in shards.items()
        if shard.local.shape != shard.shape
    }
    save_file(
        {name: shard.local.cpu().contiguous() for name, shard in shards.items()},
        path,
        metadata={"pieces": json.dumps(partial)} if partial else None,
    )


class StoredTensor:
    """One tensor in one or more files; `stored[region]` reads a region of it.

    Attributes:
        shape, dtype: of the full tensor.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._blocks: dict[tuple[tuple[int, ...], tuple[int, ...]], Any] = {}

    def add(self, offset: tuple[int, ...], size: tuple[int, ...], source: Any) -> None:
        """Add a block that `source(region)` reads from a file. Replicas of a block are ignored."""
        self._blocks.setdefault((offset, size), source)

    @property
    def is_complete(self) -> bool:
        """True if the blocks cover the full tensor."""
        return sum(math.prod(size) for _, size in self._blocks) == math.prod(self.shape)

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        """A new tensor on the CPU."""
        dims = itertools.zip_longest(region, self.shape, fillvalue=slice(None))
        ranges = [range(*each.indices(length)) for each, length in dims]
        out = torch.empty([len(each) for each in ranges], dtype=self.dtype)
        for (offset, size), source in self._blocks.items():
            first = [max(r.start, o) for r, o in zip(ranges, offset, strict=True)]
            last = [min(r.stop, o + s) for r, o, s in zip(ranges, offset, size, strict=True)]
            if any(begin >= end for begin, end in zip(first, last, strict=True)):
                continue
            out[_box(first, last, [each.start for each in ranges])] = source(
                _box(first, last, offset)
            )
        return out


def _box(first: Iterable[int], last: Iterable[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(
        slice(begin - zero, end - zero)
        for begin, end, zero in zip(first, last, origin, strict=True)
    )


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of some files by name.

    Args:
        paths: all files that hold shards of the tensors. They stay open as long as a tensor from
            here is referenced.

    Raises:
        ValueError: shards that contradict each other, or leave gaps.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            places = json.loads((file.metadata() or {}).get("pieces", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                self._add(name, file, places.get(name), path)
        for name, stored in self._tensors.items():
            if not stored.is_complete:
                raise ValueError(f"{name} is incomplete: a shard of it is in no file")

    def _add(self, name: str, file: Any, place: list[list[int]] | None, path: Path) -> None:
        part = file.get_slice(name)
        size, dtype = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
        shape, offset = map(tuple, place) if place else (size, (0,) * len(size))
        stored = self._tensors.setdefault(name, StoredTensor(shape, dtype))
        if (stored.shape, stored.dtype) != (shape, dtype):
            raise ValueError(f"{path}: {name} is {dtype} {shape}, elsewhere {stored.shape}")

        def read(box: tuple[slice, ...]) -> Tensor:
            return part[box] if box else file.get_tensor(name)

        stored.add(offset, size, read)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
