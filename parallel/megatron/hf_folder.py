"""Reads and writes Hugging Face folders of published models, a tensor at a time.

A folder has config.json and model.safetensors, or several such files with an index. Reading runs no
code from it. Everything but the values of the tensors is checked before the first is read.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.megatron.hf_config import PublishedModel, published_model
from parallel.megatron.hf_layout import Entry, is_derived

__all__ = ["HFFolder", "open_hf_folder", "write_safetensors"]

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class HFFolder:
    """A folder that has been checked.

    Attributes:
        model: what its config.json says.
        entries: the tensors of the Megatron form, all of whose parts the folder has.
        files: the file of each tensor.
        dtypes: of each tensor.
    """

    path: Path
    model: PublishedModel
    entries: tuple[Entry, ...]
    files: Mapping[str, Path]
    dtypes: Mapping[str, torch.dtype]

    def read(self, entry: Entry) -> Tensor:
        """The values of a tensor of the Megatron form."""
        return entry.join([self._read(name) for name, _ in entry.parts])

    def dtype(self, entry: Entry) -> torch.dtype:
        return self.dtypes[entry.parts[0][0]]

    def _read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def open_hf_folder(path: Path) -> HFFolder:
    """Check a folder.

    Raises:
        ValueError: a missing or damaged file, a model that is not supported, or tensors that are
            missing, unexpected, or of another shape or dtype.
    """
    model = read_config(path)
    entries = tuple(model.entries())
    files, shapes, dtypes = {}, {}, {}
    for file in _weight_files(path):
        for name, shape, code in _header(file):
            if name in files:
                raise ValueError(f"{name} is in both {files[name]} and {file}: remove one of them.")
            files[name], shapes[name], dtypes[name] = file, shape, _DTYPES.get(code, code)
    _check_tensors(path, entries, shapes, dtypes)
    return HFFolder(path, model, entries, files, dtypes)


def read_config(folder: Path) -> PublishedModel:
    """What the folder's config.json says.

    Raises:
        ValueError: it is missing or damaged, or of a model that is not supported.
    """
    path = folder / "config.json"
    values = _read_object(path)
    try:
        return published_model(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): copy it again.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or download it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object: copy or download it again.")
    return values


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; all that an index names exist."""
    if (folder / _INDEX).is_file():
        index = _read_object(folder / _INDEX).get("weight_map")
        names = set(index.values()) if isinstance(index, dict) else set()
        if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise ValueError(f'{folder / _INDEX} has no "weight_map" from tensors to files.')
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / _ONE_FILE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {_listed(missing)}: weights are read from {_ONE_FILE}, or from the "
            f"files that {_INDEX} names."
        )
    return files


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, safetensors' code of the dtype) of each tensor."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                view = opened.get_slice(name)
                yield name, tuple(view.get_shape()), view.get_dtype()
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is no safetensors file, or truncated ({error}): copy or download it again."
        ) from None


def _check_tensors(path, entries, shapes, dtypes):
    expected = {name: shape for entry in entries for name, shape in entry.parts}
    # "x.weight_scale_inv" belongs to an FP8 or otherwise quantised "x.weight".
    scales = [name for name in shapes if "scale" in name.rpartition(".")[2]]
    if scales and not any(name in expected for name in scales):
        raise ValueError(
            f"{path} holds quantised weights ({_listed(scales)}): take the release in bfloat16."
        )
    extra = [name for name in shapes if name not in expected and not is_derived(name)]
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": extra,
        "wrong shape": [
            f"{name} {shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
        "no floats": [
            name
            for name in expected
            if not isinstance(dtypes.get(name, torch.float32), torch.dtype)
        ],
        "dtypes that differ": [
            entry.parts[0][0]
            for entry in entries
            if len({dtypes.get(name) for name, _ in entry.parts}) > 1
        ],
    }
    found = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
    if found:
        raise ValueError(f"the weights in {path} are not those of its config.json: {found}.")


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def other_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder beside its weights: config, tokenizer, code."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.endswith(_WEIGHTS)
    )


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    values: Iterator[tuple[str, Tensor]],
    limit: int,
    report: Callable[[str], None],
) -> None:
    """Write model.safetensors, or several files of at most `limit` bytes (or one tensor) and an
    index, with one tensor in memory at a time.

    Args:
        tensors: shape and dtype by name, in the order of `values`.
        values: the tensors' names and values.
        report: called with a line after each file.
    """
    sizes = {n: d.itemsize * torch.Size(shape).numel() for n, (shape, d) in tensors.items()}
    groups = [{name: sizes[name] for name in names} for names in grouped(sizes, limit)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        path = folder / (file if len(groups) > 1 else _ONE_FILE)
        with path.open("wb") as stream:
            stream.write(_safetensors_header(group, tensors))
            for expected in group:
                name, tensor = next(values)
                assert name == expected and tensor.shape == torch.Size(tensors[name][0])
                tensor = tensor.to(tensors[name][1]).contiguous()
                stream.write(tensor.view(-1).view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(group, path.name)
        report(f"{path.name}: {number} of {len(groups)} files")
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def grouped(sizes: Mapping[Any, int], limit: int) -> list[list[Any]]:
    """The keys in order, in groups of at most `limit` bytes (or one key)."""
    groups: list[list[Any]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    return groups


def _safetensors_header(sizes, tensors) -> bytes:
    """The length and the JSON with which the format begins, padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        shape, dtype = tensors[name]
        start, end = end, end + size
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def copy_files(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        shutil.copyfile(file, folder / file.name)
