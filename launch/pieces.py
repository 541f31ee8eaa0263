"""Tensors cut over ranks, on disk: every rank writes what it holds, any rank reads what it needs.

A file is safetensors. Of a tensor that is not whole, the file's metadata says where the piece lies:
{"pieces": '{"<name>": [[shape of the whole], [offset of the piece]]}'}. A reader needs nothing but
the files: what is cut how, over how many of them, may differ from how it is wanted.
"""

from __future__ import annotations

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

__all__ = ["Piece", "StoredTensor", "TensorFiles", "piece_of", "write_pieces"]

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
class Piece:
    """The part of a tensor that this rank holds: a block of it.

    Attributes:
        local: the block, sharing memory with the tensor.
        shape: of the whole tensor.
        offset: of the block in it.
        mine: among the ranks that hold the same block, this one writes it.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    mine: bool

    @property
    def region(self) -> tuple[slice, ...]:
        """Where the block lies in the whole tensor."""
        return tuple(
            slice(start, start + size)
            for start, size in zip(self.offset, self.local.shape, strict=True)
        )


def piece_of(tensor: Tensor, *, is_first: bool) -> Piece:
    """The piece of a plain tensor (whole; the first rank writes it) or of a DTensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Piece(tensor, tuple(tensor.shape), (0,) * tensor.dim(), is_first)
    local, coordinate = tensor.to_local(), tensor.device_mesh.get_coordinate()
    start, size = [0] * tensor.dim(), list(tensor.shape)
    mine = local.numel() > 0
    cuts = list(zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True))
    # FSDP cuts what tensor parallelism has cut before it, though its mesh axis is the outer one;
    # torch marks such a placement as strided.
    for placement, parts, place in sorted(cuts, key=lambda cut: hasattr(cut[0], "split_factor")):
        dim = getattr(placement, "dim", None)
        if dim is None:
            mine = mine and place == 0
            continue
        each = -(-size[dim] // parts)
        first = min(each * place, size[dim])
        start[dim] += first
        size[dim] = min(each, size[dim] - first)
    assert tuple(size) == tuple(local.shape), f"{size} of {tensor.placements} is {local.shape}"
    return Piece(local, tuple(tensor.shape), tuple(start), mine)


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write blocks to a safetensors file, with where they lie."""
    cut = {
        name: [piece.shape, piece.offset]
        for name, piece in pieces.items()
        if piece.local.shape != piece.shape
    }
    save_file(
        {name: piece.local.cpu().contiguous() for name, piece in pieces.items()},
        path,
        metadata={"pieces": json.dumps(cut)} if cut else None,
    )


class StoredTensor:
    """One tensor in one or more files; `stored[region]` reads a region of it.

    Attributes:
        shape, dtype: of the whole.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._blocks: dict[tuple[tuple[int, ...], tuple[int, ...]], Any] = {}

    def add(self, offset: tuple[int, ...], size: tuple[int, ...], source: Any) -> None:
        """A block, in a slice of a file. One that is there already is a replica's."""
        self._blocks.setdefault((offset, size), source)

    @property
    def is_complete(self) -> bool:
        """Whether the blocks cover the whole."""
        return sum(math.prod(size) for _, size in self._blocks) == math.prod(self.shape)

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        """A new tensor on the CPU."""
        wanted = [range(*each.indices(length)) for each, length in self._dims(region)]
        out = torch.empty([len(each) for each in wanted], dtype=self.dtype)
        for (offset, size), source in self._blocks.items():
            first = [max(w.start, o) for w, o in zip(wanted, offset, strict=True)]
            last = [min(w.stop, o + s) for w, o, s in zip(wanted, offset, size, strict=True)]
            if any(begin >= end for begin, end in zip(first, last, strict=True)):
                continue
            out[_box(first, last, [each.start for each in wanted])] = source(
                _box(first, last, offset)
            )
        return out

    def _dims(self, region: tuple[slice, ...]) -> Iterator[tuple[slice, int]]:
        return itertools.zip_longest(region, self.shape, fillvalue=slice(None))


def _box(first: Iterable[int], last: Iterable[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(
        slice(begin - zero, end - zero)
        for begin, end, zero in zip(first, last, origin, strict=True)
    )


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of some files by name.

    Args:
        paths: all the files that the tensors are cut over. They stay open until the last tensor
            that was got from here is gone.

    Raises:
        ValueError: pieces that do not fit together, or do not make whole tensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            cut = json.loads((file.metadata() or {}).get("pieces", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                self._add(name, file, cut.get(name), path)
        for name, stored in self._tensors.items():
            if not stored.is_complete:
                raise ValueError(f"{name} is not whole: a piece of it is in no file")

    def _add(self, name: str, file: Any, cut: list[list[int]] | None, path: Path) -> None:
        part = file.get_slice(name)
        size, dtype = tuple(part.get_shape()), _DTYPES[part.get_dtype()]
        shape, offset = map(tuple, cut) if cut else (size, (0,) * len(size))
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
