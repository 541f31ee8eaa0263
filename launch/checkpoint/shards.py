"""Sharded tensors on disk: every rank writes the shards it holds, any rank reads what it needs.

Files are safetensors. If a file holds only a shard of a tensor, its metadata has the shard's place:
{"pieces": '{"<name>": [[full shape], [offset of the shard]]}'}. A reader needs the files alone, and
may want other shards than those that were written.
"""

import dataclasses
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.checkpoint.parts import PartedFile, thread_pool, write_files
from launch.files import parse_json
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
# Host memory for tensors on their way to a GPU, or cut otherwise than their files.
_STAGED_BYTES = 1 << 30


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


def tensor_bytes(shards: Mapping[str, TensorShard]) -> list[Tensor]:
    """The content of a safetensors file of shards by name, with their places in the full tensors:
    its header and the tensors, each as flat uint8."""
    names = sorted(shards, key=lambda name: (-shards[name].local.element_size(), name))
    partial = {
        name: [shard.shape, shard.offset]
        for name, shard in sorted(shards.items())
        if shard.local.shape != shard.shape
    }
    header: dict[str, Any] = {"__metadata__": {"pieces": json.dumps(partial)}} if partial else {}
    end, sections = 0, []
    for name in names:
        local = shards[name].local
        begin, end = end, end + local.nbytes
        header[name] = {
            "dtype": _NAMES[local.dtype],
            "shape": list(local.shape),
            "data_offsets": [begin, end],
        }
        sections.append(local.contiguous().reshape(-1).view(torch.uint8))
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format wants tensors to begin at a multiple of 8.
    text = text.ljust(-(-len(text) // 8) * 8)
    data = bytearray(len(text).to_bytes(8, "little") + text)
    return [torch.frombuffer(data, dtype=torch.uint8), *sections]


def write_shards(files: Mapping[Path, Mapping[str, TensorShard]]) -> list[dict[str, Any]]:
    """Write safetensors files of shards by name, and sync them to the disk; return their manifest
    entries. Raises OSError."""
    return write_files({path: tensor_bytes(shards) for path, shards in files.items()})


def section_lengths(path: Path) -> list[int]:
    """Lengths of the consecutive sections of a file: header and tensors if it is safetensors."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [size]
    begin, header = _read_header(PartedFile(path, None))
    ends = sorted(each["data_offsets"][1] for name, each in header.items() if name != _METADATA)
    return [begin, *(end - start for start, end in itertools.pairwise([0, *ends]))]


def _read_header(file: PartedFile) -> tuple[int, dict[str, Any]]:
    """(byte at which the tensors begin, header). Raises ValueError, SafetensorError."""
    text = b""
    begin = 8 + int.from_bytes(file.read(0, 8), "little")
    if begin <= file.size:
        text = file.read(8, begin)
    # The library finds everything that is wrong with a header, a length beyond the file too.
    safe_open(file.path, framework="pt")
    return begin, json.loads(text)


@dataclass(frozen=True)
class _Block:
    """A block of a tensor that is in a file, row by row from byte `begin` on."""

    file: PartedFile
    begin: int
    dtype: torch.dtype
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def read(self, box: tuple[slice, ...], out: Tensor) -> "Read":
        """Read a region of the block into `out`, a tensor of the region's shape."""
        rows, row_bytes = box[0], math.prod(self.shape[1:]) * self.dtype.itemsize
        is_direct = (
            (out.device.type, out.dtype) == ("cpu", self.dtype)
            and out.is_contiguous()
            and out.shape[1:] == self.shape[1:]
        )
        stage = out
        if not is_direct:
            stage = torch.empty((rows.stop - rows.start, *self.shape[1:]), dtype=self.dtype)
        data = memoryview(stage.reshape(-1).view(torch.uint8).numpy())
        tasks = self.file.reads(self.begin + rows.start * row_bytes, data)
        if is_direct:
            return Read(tasks, 0, lambda: None)
        region = (slice(None), *box[1:])
        return Read(tasks, stage.nbytes, lambda: out.copy_(stage[region]))


@dataclass(frozen=True)
class Read:
    """A tensor that is being read.

    Attributes:
        tasks: to be called in any order, by any thread.
        nbytes: of memory until `finish`.
        finish: to be called after all tasks.
    """

    tasks: list[Callable[[], None]]
    nbytes: int
    finish: Callable[[], Any]


class StoredTensor:
    """One tensor in one or more files; `stored[region]` reads a region of it.

    Attributes:
        shape, dtype: of the full tensor.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._blocks: dict[tuple[tuple[int, ...], tuple[int, ...]], _Block] = {}

    def add(self, block: _Block) -> None:
        """Add a block. Replicas of a block are ignored."""
        if math.prod(block.shape):
            self._blocks.setdefault((block.offset, block.shape), block)

    def check(self, name: str) -> None:
        """Raise ValueError unless every element is in exactly one block."""
        blocks = sorted(self._blocks)
        active: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for offset, size in blocks:
            if any(o + s > whole for o, s, whole in zip(offset, size, self.shape, strict=True)):
                raise ValueError(
                    f"{name} has a shard at {offset} that does not fit in {self.shape}"
                )
            # Sorted by their first row: those that end before this one are done with.
            active = [each for each in active if not offset or each[0][0] + each[1][0] > offset[0]]
            for other, extent in active:
                sides = zip(offset, size, other, extent, strict=True)
                if all(a < b + e and b < a + s for a, s, b, e in sides):
                    raise ValueError(f"{name} has shards that overlap, at {other} and {offset}")
            active.append((offset, size))
        if sum(math.prod(size) for _, size in blocks) != math.prod(self.shape):
            raise ValueError(f"{name} is incomplete: a shard of it is in no file")

    def reads(self, region: tuple[slice, ...], out: Tensor) -> list[Read]:
        """What reads a region into `out`, a tensor of its shape on any device."""
        if not self.shape:
            (block,) = self._blocks.values()
            return [dataclasses.replace(block, shape=(1,)).read((slice(0, 1),), out.reshape(1))]
        dims = itertools.zip_longest(region, self.shape, fillvalue=slice(None))
        ranges = [range(*each.indices(length)) for each, length in dims]
        found = []
        for block in self._blocks.values():
            offset, size = block.offset, block.shape
            first = [max(r.start, o) for r, o in zip(ranges, offset, strict=True)]
            last = [min(r.stop, o + s) for r, o, s in zip(ranges, offset, size, strict=True)]
            if any(begin >= end for begin, end in zip(first, last, strict=True)):
                continue
            target = out[_box(first, last, [each.start for each in ranges])]
            found.append(block.read(_box(first, last, offset), target))
        return found

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        """A new tensor on the CPU. Raises DamagedError."""
        dims = itertools.zip_longest(region, self.shape, fillvalue=slice(None))
        out = torch.empty(
            [len(range(*each.indices(length))) for each, length in dims], dtype=self.dtype
        )
        for read in self.reads(region, out):
            for task in read.tasks:
                task()
            read.finish()
        return out


def load_shards(pairs: Iterable[tuple[TensorShard, Tensor | StoredTensor]]) -> None:
    """Copy stored tensors into shards of them, with several threads. Raises DamagedError."""
    running: deque[tuple[Read, list[Future[None]]]] = deque()
    staged = 0

    def finish_oldest() -> int:
        read, tasks = running.popleft()
        for task in tasks:
            task.result()
        read.finish()
        return read.nbytes

    with thread_pool() as pool:
        for shard, stored in pairs:
            if isinstance(stored, Tensor):
                shard.local.copy_(stored[shard.region])
                continue
            for read in stored.reads(shard.region, shard.local):
                running.append((read, [pool.submit(task) for task in read.tasks]))
                staged += read.nbytes
            while staged > _STAGED_BYTES:
                staged -= finish_oldest()
        while running:
            finish_oldest()


def _box(first: Iterable[int], last: Iterable[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(
        slice(begin - zero, end - zero)
        for begin, end, zero in zip(first, last, origin, strict=True)
    )


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of some files by name.

    Args:
        files: all files that hold shards of the tensors. They stay open as long as a tensor from
            here is referenced.

    Raises:
        DamagedError: a file that cannot be read or does not match its hash.
        KeyError: a dtype that is not known.
        ValueError, SafetensorError: shards that contradict each other, overlap or leave gaps; a
            file that is not safetensors.
    """

    def __init__(self, files: Iterable[PartedFile | Path]) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for each in files:
            file = PartedFile(each, None) if isinstance(each, Path) else each
            begin, header = _read_header(file)
            places = _read_places(header.pop(_METADATA, {}))
            for name, entry in header.items():
                self._add(name, entry, places.get(name), begin, file)
        for name, stored in self._tensors.items():
            stored.check(name)

    def _add(
        self, name: str, entry: dict[str, Any], place: Any, begin: int, file: PartedFile
    ) -> None:
        size, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        shape, offset = _place(name, place) if place is not None else (size, (0,) * len(size))
        if not len(shape) == len(offset) == len(size):
            raise ValueError(f"{file.path}: {name} of shape {size} is a shard of shape {shape}")
        stored = self._tensors.setdefault(name, StoredTensor(shape, dtype))
        if (stored.shape, stored.dtype) != (shape, dtype):
            raise ValueError(f"{file.path}: {name} is {dtype} {shape}, elsewhere {stored.shape}")
        stored.add(_Block(file, begin + entry["data_offsets"][0], dtype, offset, size))

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read_places(metadata: dict[str, str]) -> dict[str, Any]:
    places = parse_json(metadata.get("pieces", "{}"))
    if not isinstance(places, dict):
        raise ValueError("the places of its shards are no JSON object")
    return places


def _place(name: str, place: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(full shape, offset) of a shard, as its file has them."""
    try:
        shape, offset = map(tuple, place)
    except (TypeError, ValueError):
        shape, offset = ("?",), ()
    if not all(type(each) is int and each >= 0 for each in (*shape, *offset)):
        raise ValueError(f"{name} has an invalid place {str(place)[:60]}")
    return shape, offset
