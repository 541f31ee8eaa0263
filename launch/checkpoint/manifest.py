"""The manifest of a checkpoint: the last file that is written, with the hashes of all others.

    {"format": 2, "step": 100, "files": [{"name", "size", "parts": [[bytes, sha256], ...]}, ...],
     "sha256": of all this}

In format 1 a file has one "sha256" instead of parts (launch/checkpoint/parts.py).
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checkpoint.parts import DamagedError, PartedFile, Parts, seal, sync
from launch.checkpoint.shards import section_lengths
from launch.files import parse_json

_TENSOR_FILE = re.compile(r"(model|optimizer|states)(?:-\d{5}-of-(\d{5}))?\.safetensors")
_FORMATS = (1, 2)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# About 100 bytes for each 16 MiB of tensors; a larger file is something else.
_MANIFEST_LIMIT = 64 << 20


@dataclass(frozen=True)
class ManifestFile:
    """A file as the manifest has it; `sha256` of all of it in format 1, else `parts`."""

    path: Path
    size: int
    sha256: str | None
    parts: Parts | None

    def open(self) -> PartedFile:
        """The file, which has the right size. Raises DamagedError."""
        file = PartedFile(self.path, self.parts)
        if file.size != self.size:
            raise DamagedError(
                f"{self.path} has {file.size} bytes, the manifest has {self.size}: truncated."
            )
        return file

    def check_sha256(self) -> None:
        """Raise DamagedError if the file is not that of a manifest of format 1."""
        digest, file = hashlib.sha256(), self.open()
        for begin in range(0, self.size, 1 << 20):
            digest.update(file.read(begin, min(begin + (1 << 20), self.size)))
        if digest.hexdigest() != self.sha256:
            raise DamagedError(f"{self.path} does not match its hash: its content has changed.")


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been checked."""

    step: int
    version: int
    files: list[ManifestFile]


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in a folder.

    Raises:
        DamagedError: it is missing, damaged, of another format or folder, names files outside the
            folder, or leaves some out.
    """
    manifest_path = path / "manifest.json"
    try:
        file = PartedFile(manifest_path, None)
    except DamagedError as error:
        if os.path.lexists(manifest_path):
            raise
        raise DamagedError(f"{error} Not a finished checkpoint.") from None
    if file.size > _MANIFEST_LIMIT:
        raise DamagedError(f"{manifest_path} is larger than a manifest can be.")
    try:
        manifest = parse_json(file.read(0, file.size))
        sealed = manifest["sha256"] == _seal(manifest)
        step, version = manifest["step"], manifest["format"]
        if sealed and version not in _FORMATS:
            raise DamagedError(
                f"{manifest_path} has format {version}, this code reads {_FORMATS}: use the "
                "version of lasp that wrote it, or a newer one."
            )
        files = [_manifest_file(path, each, version) for each in manifest["files"]]
        name = folder_name(step)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{manifest_path} is damaged ({error!r}).") from None
    if not sealed:
        raise DamagedError(f"{manifest_path} is damaged: its own hash does not match.")
    if path.name != name:
        raise DamagedError(f"{manifest_path} is of step {step}, its folder is {path.name}.")
    if not _is_complete([each.path.name for each in files]):
        raise DamagedError(f"{manifest_path} does not list all files of a checkpoint.")
    return Manifest(step, version, files)


def _manifest_file(path: Path, entry: dict[str, Any], version: int) -> ManifestFile:
    """A file of a manifest. Raises ValueError, KeyError or TypeError if the entry is damaged."""
    name, size = entry["name"], entry["size"]
    if Path(name).name != name or name.startswith("."):
        raise DamagedError(
            f"{path / 'manifest.json'} names {name!r}, which is not a file beside it."
        )
    if version == 1:
        return ManifestFile(path / name, size, entry["sha256"], None)
    parts = [(length, digest) for length, digest in entry["parts"]]
    if not all(type(n) is int and n > 0 and _SHA256.fullmatch(digest) for n, digest in parts):
        raise ValueError(f"invalid parts of {name}")
    if sum(length for length, _ in parts) != size:
        raise ValueError(f"the parts of {name} do not have {size} bytes")
    return ManifestFile(path / name, size, None, parts)


def folder_name(step: int) -> str:
    """The name of a checkpoint."""
    return f"step-{step:08d}"


def tensor_file(group: str, number: int = 1, count: int = 1) -> str:
    """The name of file `number`, from 1, of the `count` files of a group's tensors."""
    return f"{group}{f'-{number:05}-of-{count:05}' if count > 1 else ''}.safetensors"


def group_of(name: str) -> str | None:
    """The group of tensors that a file holds; None for other files."""
    match = _TENSOR_FILE.fullmatch(name)
    return match and match[1]


def _is_complete(names: list[str]) -> bool:
    """True if these are the names of all files that a checkpoint needs."""
    counts = {match[1]: int(match[2] or 1) for match in map(_TENSOR_FILE.fullmatch, names) if match}
    needed = {
        tensor_file(group, number, counts.get(group, 1))
        for group in {"model", "optimizer", *counts}
        for number in range(1, counts.get(group, 1) + 1)
    }
    return not (needed | {"state.json"}) - set(names)


def seal_file(path: Path) -> dict[str, Any]:
    """Sync a file to the disk; return its manifest entry."""
    return seal(path, section_lengths(path))


def write_manifest(folder: Path, step: int, files: list[dict[str, Any]]) -> None:
    """Write and sync the manifest: the last file of a checkpoint."""
    files = sorted(files, key=lambda each: each["name"])
    manifest = {"format": _FORMATS[-1], "step": step, "files": files}
    manifest["sha256"] = _seal(manifest)
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    sync(path)


def _seal(manifest: dict[str, Any]) -> str:
    """Hash of the manifest's content, so that damage to the manifest itself is detected."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
