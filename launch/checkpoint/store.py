"""Atomic checkpoints on disk.

A checkpoint is a folder `step-00000100`. It appears by one rename of a staging folder, after every
byte and the manifest with its hashes are on disk, and is never written to again. Tensors are
safetensors, the rest JSON: reading them cannot execute code. All files must match the manifest
before a single tensor is copied. Ranks that hold shards of the weights write a file each,
model-00001-of-00002.safetensors and so on; see launch/checkpoint/shards.py.

    step-00000100/
        model.safetensors       weights by name
        optimizer.safetensors   moments by name
        states.safetensors      with training.carry_state: recurrent states by sequence and layer
        state.json              step, samples consumed, random states, config, tokenizer
        manifest.json           {"format": 1, "step": 100, "files": [{name, size, sha256}, ...]}
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoint.shards import TensorFiles
from launch.exit_codes import CheckpointError
from launch.files import read_json

_STEP_FOLDER = re.compile(r"step-(\d{8})")
_TENSOR_FILE = re.compile(r"(model|optimizer|states)(?:-\d{5}-of-(\d{5}))?\.safetensors")
# Leftovers of a process that was killed while saving or removing; the number is its process id.
_LEFTOVER = re.compile(r"\.(?:staging|removed)-step-\d{8}-(\d+)")
_FORMAT = 1
# A manifest is a few lines; a huge file is something else.
_MANIFEST_LIMIT = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int

    def open(self, group: str) -> TensorFiles:
        """The tensors of a group, "model", "optimizer" or "states", read region by region. Raises
        ValueError."""
        manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        names = [each["name"] for each in manifest["files"]]
        return TensorFiles(self.path / name for name in names if _group(name) == group)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, in full, on the CPU. Raises ValueError."""
        return {name: stored[()] for name, stored in self.open(group).items()}

    def state(self) -> dict[str, Any]:
        """The content of state.json."""
        path = self.path / "state.json"
        try:
            state = read_json(path)
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}).") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} is damaged: it holds no JSON object.")
        return state


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
        manifest = read_json(manifest_path)
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
                f"{file} has {file.stat().st_size} bytes, the manifest has {size}: truncated."
            )
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file} does not match its hash: its content has changed.")
    return Checkpoint(path, step)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a step folder, or the newest valid one in a folder of a run's checkpoints.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (path / "manifest.json").exists():
        return verify(path)
    found, refused = CheckpointStore(path).find("auto")
    if found is None:
        why = f" ({'; '.join(refused)})" if refused else ""
        raise CheckpointError(
            f"checkpoint {path} holds no valid checkpoint{why}: give a step folder, or the folder "
            "of a run's checkpoints, such as outputs/quickstart/checkpoint."
        )
    return found


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: created when the first checkpoint is saved.
        keep_latest_k: valid checkpoints to keep; 0 keeps all.
    """

    def __init__(self, folder: Path, keep_latest_k: int = 0) -> None:
        self.folder = folder
        self._keep = keep_latest_k
        # Checkpoints already hashed, by the files' sizes and times: retention asks at every save.
        self._verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}
        self._cleaned = False

    def begin(self, step: int) -> Path:
        """Create a staging folder to write files to.

        An invalid folder of the same step is moved aside, a valid one is never replaced. The first
        call removes what a killed process left behind.

        Raises:
            CheckpointError: a valid checkpoint of this step exists.
            OSError: the disk failed.
        """
        if not self._cleaned:
            self._remove_leftovers()
            self._cleaned = True
        final = self.folder / _folder_name(step)
        if final.exists():
            if self._is_valid(final):
                raise CheckpointError(f"{final} exists already; checkpoints are never overwritten.")
            os.rename(final, final.with_name(f".refused-{final.name}-{time.time_ns()}"))
        staging = self.folder / f".staging-{final.name}-{os.getpid()}"
        self.discard(staging)
        staging.mkdir(parents=True)
        return staging

    def commit(self, step: int, staging: Path, files: list[dict[str, Any]]) -> Path:
        """Turn a staging folder into the checkpoint of `step`; remove all but the newest
        keep_latest_k.

        Args:
            files: `seal_file` of every file in the folder.

        Raises:
            OSError: the disk failed; nothing is committed, the staging folder is removed.
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
        is_own = path.resolve().parent == self.folder.resolve()
        later = [step for step in self.steps() if step > found.step or not is_own]
        if later:
            raise CheckpointError(
                f"resuming from {path} would overwrite the checkpoints from step {later[0]} on "
                f"in {self.folder}: choose another job.dump_folder."
            )
        return found

    def _is_valid(self, path: Path) -> bool:
        if self._verified.get(path) != _signature(path):
            try:
                verify(path)
            except CheckpointError:
                return False
            self._verified[path] = _signature(path)
        return True

    def _remove_leftovers(self) -> None:
        """Remove the leftovers of processes that were killed while saving or removing."""
        for path in self.folder.glob(".*-step-*"):
            match = _LEFTOVER.fullmatch(path.name)
            if match and not _is_running(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self) -> None:
        if not self._keep:
            return
        paths = [self.folder / _folder_name(step) for step in self.steps()]
        valid = [path for path in paths if self._is_valid(path)]
        for path in valid[: -self._keep]:
            # Renamed first: half a deletion must not look like a damaged checkpoint.
            hidden = path.parent / f".removed-{path.name}-{os.getpid()}"
            # The new one is on disk: failing to remove an old one is not a failed save.
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
    # A restarted job in a container often gets the number of the previous one.
    return process != os.getpid()


def tensor_file(group: str, number: int = 1, count: int = 1) -> str:
    """The name of file `number`, from 1, of the `count` files of a group's tensors."""
    return f"{group}{f'-{number:05}-of-{count:05}' if count > 1 else ''}.safetensors"


def _group(name: str) -> str | None:
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
    """Hash of the manifest's content, so that damage to the manifest itself is detected."""
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
