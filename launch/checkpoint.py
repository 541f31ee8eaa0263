"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000100` that appears by one rename of a staging folder, after
every byte and the manifest with its hashes are on disk. It is never written to again. Tensors are
safetensors, the rest JSON; nothing on the way back in can execute code. What is read must match the
manifest before a single tensor is copied. Ranks that hold pieces of the weights write a file each,
model-00001-of-00002.safetensors and so on; see launch/pieces.py.

    step-00000100/
        model.safetensors       weights by name
        optimizer.safetensors   moments by name
        state.json              step, samples consumed, random states, config, tokenizer
        manifest.json           {"format": 1, "step": 100, "files": [{name, size, sha256}, ...]}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import CheckpointError
from launch.pieces import TensorFiles, piece_of, write_pieces

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "CheckpointStore", "seal_file", "tensor_file", "verify"]

_STEP_FOLDER = re.compile(r"step-(\d{8})")
_TENSOR_FILE = re.compile(r"(model|optimizer)(?:-\d{5}-of-(\d{5}))?\.safetensors")
# What a process leaves behind that is killed while it saves or removes; the number is its own.
_LEFTOVER = re.compile(r"\.(?:staging|removed)-step-\d{8}-(\d+)")
_FORMAT = 1
# A manifest is a few lines; a huge one is not ours.
_MANIFEST_LIMIT = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int

    def open(self, group: str) -> TensorFiles:
        """The stored tensors of "model" or "optimizer", to read parts of. Raises ValueError."""
        manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        names = [each["name"] for each in manifest["files"]]
        return TensorFiles(self.path / name for name in names if _group(name) == group)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of "model" or "optimizer", whole, on the CPU. Raises ValueError."""
        return {name: stored[()] for name, stored in self.open(group).items()}

    def state(self) -> dict[str, Any]:
        """What state.json says."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a missing, truncated or changed file, named; a manifest that is damaged or
            names files outside the folder.
    """
    manifest_path = path / "manifest.json"
    try:
        if manifest_path.stat().st_size > _MANIFEST_LIMIT:
            raise CheckpointError(f"{manifest_path} is larger than a manifest can be.")
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = [(each["name"], each["size"], each["sha256"]) for each in manifest["files"]]
        step, version = manifest["step"], manifest["format"]
        sealed = manifest["sha256"] == _seal(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{manifest_path} is missing: not a finished checkpoint.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{manifest_path} is damaged ({error!r}).") from None
    if not sealed:
        raise CheckpointError(f"{manifest_path} is damaged: its own hash does not match.")
    if version != _FORMAT:
        raise CheckpointError(f"{manifest_path} has format {version}, this code reads {_FORMAT}.")
    if path.name != _folder_name(step):
        raise CheckpointError(f"{manifest_path} is of step {step}, its folder is {path.name}.")
    if not _is_complete([name for name, _, _ in files]):
        raise CheckpointError(f"{manifest_path} does not list all files of a checkpoint.")
    for name, size, sha256 in files:
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"{manifest_path} names {name!r}, which is not a file beside it.")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, the manifest says {size}: truncated."
            )
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file} does not match its hash: its content has changed.")
    return Checkpoint(path, step)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: made when the first checkpoint is saved.
        keep_latest_k: valid checkpoints to keep; 0 keeps all.
    """

    def __init__(self, folder: Path, keep_latest_k: int = 0) -> None:
        self.folder = folder
        self._keep = keep_latest_k
        # What was hashed before, by the files' sizes and times: retention asks at every save.
        self._verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}
        self._cleaned = False

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
        """Write a checkpoint of one process: `begin`, the files, `commit`.

        Args:
            step: steps taken.
            tensors: {"model": {name: tensor}, "optimizer": {name: tensor}}.
            state: JSON.

        Raises:
            CheckpointError: a valid checkpoint of this step exists.
            OSError: the disk refused; nothing is committed, the staging folder is removed.
        """
        staging = self.begin(step)
        try:
            for group, each in tensors.items():
                pieces = {name: piece_of(value, is_first=True) for name, value in each.items()}
                write_pieces(staging / tensor_file(group), pieces)
            (staging / "state.json").write_text(json.dumps(state), encoding="utf-8")
            files = [seal_file(path) for path in sorted(staging.iterdir())]
        except BaseException:
            self.discard(staging)
            raise
        return self.commit(step, staging, files)

    def begin(self, step: int) -> Path:
        """A staging folder to write files to.

        An invalid folder of the same step is moved aside, a valid one is never replaced. The first
        call clears what a killed process left half done.

        Raises:
            CheckpointError: a valid checkpoint of this step exists.
            OSError: the disk refused.
        """
        if not self._cleaned:
            self._remove_leftovers()
            self._cleaned = True
        final = self.folder / _folder_name(step)
        if final.exists():
            if self._problem(final) is None:
                raise CheckpointError(f"{final} exists already; checkpoints are never overwritten.")
            _move_aside(final)
        staging = self.folder / f".staging-{final.name}-{os.getpid()}"
        self.discard(staging)
        staging.mkdir(parents=True)
        return staging

    def commit(self, step: int, staging: Path, files: list[dict[str, Any]]) -> Path:
        """Make a staging folder the checkpoint of `step`; the oldest beyond keep_latest_k go.

        Args:
            files: `seal_file` of every file in the folder.

        Raises:
            OSError: the disk refused; nothing is committed, the staging folder is removed.
        """
        final = self.folder / _folder_name(step)
        try:
            _write_manifest(staging, step, files)
            _sync(staging)
            os.rename(staging, final)
        except BaseException:
            self.discard(staging)
            raise
        _sync(self.folder)
        self._verified[final] = _signature(final)
        self._remove_old()
        return final

    def discard(self, staging: Path) -> None:
        """Remove a staging folder, if it is there."""
        shutil.rmtree(staging, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a folder, valid or not, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def find(self, resume: str) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to resume from, and why newer ones were refused.

        Args:
            resume: "auto" (None if there is no valid one), "must" (an error instead), "never"
                (None) or the path of a step folder.

        Raises:
            CheckpointError: nothing to resume from, or a named checkpoint that is not valid.
        """
        if resume == "never":
            if self.steps():
                raise CheckpointError(
                    f"checkpoint.resume is never but {self.folder} already holds checkpoints: "
                    "choose another job.dump_folder, or resume auto."
                )
            return None, []
        if resume not in ("auto", "must"):
            return self._find_named(Path(resume)), []
        refused: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = verify(self.folder / _folder_name(step))
            except CheckpointError as error:
                refused.append(str(error))
                continue
            self._verified[found.path] = _signature(found.path)
            return found, refused
        if resume == "must":
            why = f" ({'; '.join(refused)})" if refused else ""
            raise CheckpointError(
                f"checkpoint.resume is must, but {self.folder} holds no valid checkpoint{why}."
            )
        return None, refused

    def _find_named(self, path: Path) -> Checkpoint:
        if not path.is_dir():
            raise CheckpointError(
                f"checkpoint.resume {path}: no such folder; give auto, never, must or the path of "
                "a step folder."
            )
        found = verify(path)
        here = path.resolve().parent == self.folder.resolve()
        later = [step for step in self.steps() if step > found.step or not here]
        if later:
            raise CheckpointError(
                f"resuming from {path} would run over the checkpoints of step {later[0]} and later "
                f"in {self.folder}: choose another job.dump_folder."
            )
        return found

    def _problem(self, path: Path) -> str | None:
        if path in self._verified and self._verified[path] == _signature(path):
            return None
        try:
            verify(path)
        except CheckpointError as error:
            return str(error)
        self._verified[path] = _signature(path)
        return None

    def _remove_leftovers(self) -> None:
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match and not _is_running(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self) -> None:
        if not self._keep:
            return
        paths = [self.folder / _folder_name(step) for step in self.steps()]
        valid = [path for path in paths if self._problem(path) is None]
        for path in valid[: -self._keep]:
            # Out of sight first: half a deletion must not look like a damaged checkpoint.
            hidden = path.parent / f".removed-{path.name}-{os.getpid()}"
            # The new one is on disk: an old one too many is no failure to save.
            with contextlib.suppress(OSError):
                os.rename(path, hidden)
                shutil.rmtree(hidden, ignore_errors=True)
                self._verified.pop(path, None)


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    # A container often gives a restarted job the number of the one before.
    return process != os.getpid()


def _move_aside(path: Path) -> None:
    for number in range(1000):
        aside = path.parent / f".refused-{path.name}-{number}"
        if not aside.exists():
            os.rename(path, aside)
            return
    raise CheckpointError(f"{path.parent} holds 1000 refused checkpoints of one step: clean it.")


def tensor_file(group: str, number: int = 1, count: int = 1) -> str:
    """The name of file `number`, from 1, of the `count` that a group's tensors are cut over."""
    return f"{group}{f'-{number:05}-of-{count:05}' if count > 1 else ''}.safetensors"


def _group(name: str) -> str | None:
    match = _TENSOR_FILE.fullmatch(name)
    return match and match[1]


def _is_complete(names: list[str]) -> bool:
    """Whether files of these names are all that a checkpoint needs."""
    counts = {match[1]: int(match[2] or 1) for match in map(_TENSOR_FILE.fullmatch, names) if match}
    wanted = {
        tensor_file(group, number, counts.get(group, 1))
        for group in ("model", "optimizer")
        for number in range(1, counts.get(group, 1) + 1)
    }
    return not (wanted | {"state.json"}) - set(names)


def seal_file(path: Path) -> dict[str, Any]:
    """Bring a file to the disk; its entry in the manifest."""
    _sync(path)
    return {"name": path.name, "size": path.stat().st_size, "sha256": _sha256(path)}


def _write_manifest(folder: Path, step: int, files: list[dict[str, Any]]) -> None:
    """Write and sync the manifest: the last file of a checkpoint."""
    files = sorted(files, key=lambda each: each["name"])
    manifest = {"format": _FORMAT, "step": step, "files": files}
    manifest["sha256"] = _seal(manifest)
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(path)


def _seal(manifest: dict[str, Any]) -> str:
    """Hash of the manifest's content, so that damage to the manifest itself is seen."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(path: Path) -> tuple[tuple[str, int, int], ...]:
    stats = ((each.name, each.stat()) for each in path.iterdir())
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
