"""Atomic checkpoints on disk.

A checkpoint is a folder `step-00000100`. It appears by one rename of a staging folder, after every
byte and the manifest with its hashes are on disk, and is never written to again. Tensors are
safetensors, the rest JSON: reading them cannot execute code. Every byte that is read must match the
manifest, before the first step is taken. Ranks that hold shards of the weights write a file each,
model-00001-of-00002.safetensors and so on; see launch/checkpoint/shards.py.

    step-00000100/
        model.safetensors       weights by name
        optimizer.safetensors   moments by name
        states.safetensors      with training.carry_state: recurrent states by sequence and layer
        state.json              step, samples consumed, random states, config, tokenizer
        manifest.json           {"format": 2, "step": 100, "files": [{name, size, parts}, ...]}

Files are hashed in parts (launch/checkpoint/parts.py). In format 1 each has one "sha256".
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from launch.checkpoint.parts import DamagedError, PartedFile, Parts, seal, sync, thread_pool
from launch.checkpoint.shards import TensorFiles, section_lengths
from launch.exit_codes import CheckpointError

_STEP_FOLDER = re.compile(r"step-(\d{8})")
_TENSOR_FILE = re.compile(r"(model|optimizer|states)(?:-\d{5}-of-(\d{5}))?\.safetensors")
# Leftovers of a process that was killed while saving or removing; the number is its process id.
_LEFTOVER = re.compile(r"\.(?:staging|removed)-step-\d{8}-(\d+)")
_FORMATS = (1, 2)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# About 100 bytes for each 16 MiB of tensors; a larger file is something else.
_MANIFEST_LIMIT = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk with a valid manifest. Reading a file checks it; files of format 1 must
    have been checked by `verify` before."""

    path: Path
    step: int

    def open(self, group: str) -> TensorFiles:
        """The tensors of a group, "model", "optimizer" or "states", read region by region. Raises
        DamagedError."""
        files = _read_manifest(self.path).files
        try:
            return TensorFiles(each.open() for each in files if _group(each.path.name) == group)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise DamagedError(
                f"{self.path}: tensors of {group} cannot be read: {error}."
            ) from None

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, in full, on the CPU. Raises DamagedError."""
        return {name: stored[()] for name, stored in self.open(group).items()}

    def state(self) -> dict[str, Any]:
        """The content of state.json. Raises DamagedError."""
        files = _read_manifest(self.path).files
        file = next(each for each in files if each.path.name == "state.json").open()
        try:
            state = json.loads(file.read(0, file.size))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{file.path} is damaged ({error!r}).") from None
        if not isinstance(state, dict):
            raise DamagedError(f"{file.path} is damaged: it holds no JSON object.")
        return state


@dataclass(frozen=True)
class _File:
    """A file as the manifest has it; `sha256` of all of it in format 1, else `parts`."""

    path: Path
    size: int
    sha256: str | None
    parts: Parts | None

    def open(self) -> PartedFile:
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
class _Manifest:
    step: int
    version: int
    files: list[_File]


def _read_manifest(path: Path) -> _Manifest:
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
        manifest = json.loads(file.read(0, file.size))
        sealed = manifest["sha256"] == _seal(manifest)
        step, version = manifest["step"], manifest["format"]
        if sealed and version not in _FORMATS:
            raise DamagedError(
                f"{manifest_path} has format {version}, this code reads {_FORMATS}: use the "
                "version of lasp that wrote it, or a newer one."
            )
        files = [_manifest_file(path, each, version) for each in manifest["files"]]
        name = _folder_name(step)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{manifest_path} is damaged ({error!r}).") from None
    if not sealed:
        raise DamagedError(f"{manifest_path} is damaged: its own hash does not match.")
    if path.name != name:
        raise DamagedError(f"{manifest_path} is of step {step}, its folder is {path.name}.")
    if not _is_complete([each.path.name for each in files]):
        raise DamagedError(f"{manifest_path} does not list all files of a checkpoint.")
    return _Manifest(step, version, files)


def _manifest_file(path: Path, entry: dict[str, Any], version: int) -> _File:
    """A file of a manifest. Raises ValueError, KeyError or TypeError if the entry is damaged."""
    name, size = entry["name"], entry["size"]
    if Path(name).name != name or name.startswith("."):
        raise DamagedError(
            f"{path / 'manifest.json'} names {name!r}, which is not a file beside it."
        )
    if version == 1:
        return _File(path / name, size, entry["sha256"], None)
    parts = [(length, digest) for length, digest in entry["parts"]]
    if not all(type(n) is int and n > 0 and _SHA256.fullmatch(digest) for n, digest in parts):
        raise ValueError(f"invalid parts of {name}")
    if sum(length for length, _ in parts) != size:
        raise ValueError(f"the parts of {name} do not have {size} bytes")
    return _File(path / name, size, None, parts)


def inspect(path: Path) -> Checkpoint:
    """The checkpoint in a folder, whose files are checked when they are read; those of format 1
    now. Raises DamagedError for a manifest or a size that is wrong."""
    manifest = _read_manifest(path)
    if manifest.version == 1:
        return verify(path)
    for each in manifest.files:
        each.open()
    return Checkpoint(path, manifest.step)


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        DamagedError: a missing, unreadable, truncated or changed file, named; a manifest that is
            damaged or names files outside the folder.
    """
    manifest = _read_manifest(path)
    checks = []
    for each in manifest.files:
        if each.parts is None:
            each.open()
            checks.append(each.check_sha256)
        else:
            checks += each.open().checks()
    with thread_pool() as pool:
        for check in [pool.submit(check) for check in checks]:
            check.result()
    return Checkpoint(path, manifest.step)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a step folder, or the newest valid one in a folder of a run's checkpoints.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if os.path.lexists(path / "manifest.json"):
        return verify(path)
    refused: list[str] = []
    try:
        steps = CheckpointStore(path).steps()
    except (OSError, ValueError) as error:
        steps, refused = [], [str(error)]
    for step in reversed(steps):
        try:
            return verify(path / _folder_name(step))
        except DamagedError as error:
            refused.append(str(error))
    why = f" ({'; '.join(refused)})" if refused else ""
    raise CheckpointError(
        f"checkpoint {path} holds no valid checkpoint{why}: give a step folder, or the folder "
        "of a run's checkpoints, such as outputs/quickstart/checkpoint."
    )


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

    def begin(self, step: int, nbytes: int = 0) -> Path:
        """Create a staging folder to write files of `nbytes` in all to.

        An invalid folder of the same step is moved aside, a valid one is never replaced. The first
        call removes what a killed process left behind.

        Raises:
            CheckpointError: a valid checkpoint of this step exists.
            OSError: the disk failed, or has too little room.
        """
        if not self._cleaned:
            self._remove_leftovers()
            self._cleaned = True
        check_room(self.folder, nbytes)
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
        """Turn a staging folder into the checkpoint of `step`; keep it and, of the other valid
        ones, the newest keep_latest_k - 1.

        Args:
            files: `seal_file` of every file in the folder.

        Raises:
            OSError: the disk failed; nothing is committed, the staging folder is removed.
        """
        final = self.folder / _folder_name(step)
        try:
            _write_manifest(staging, step, files)
            sync(staging)
            os.rename(staging, final)
        except BaseException:
            self.discard(staging)
            raise
        sync(self.folder)
        # Neither an old checkpoint that cannot be read or removed, nor one that cannot be looked at
        # again, makes this a failed save.
        with contextlib.suppress(OSError):
            self._verified[final] = _signature(final)
            self._remove_old(final)
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

    def find(
        self,
        resume: str,
        *,
        check: Callable[[Path], Checkpoint] = verify,
        failed: Mapping[str, str] | None = None,
    ) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to resume from, and why newer ones were refused.

        Args:
            resume: "auto" (None if there are no checkpoints), "must" (an error instead), "never"
                (None) or the path of a step folder.
            check: `verify`, or `inspect` if all that is read of the checkpoint is read in full.
            failed: paths of checkpoints that turned out not to be valid, and why.

        Raises:
            CheckpointError: nothing to resume from, none of the checkpoints there is valid, or a
                named one is not.
        """
        try:
            steps = self.steps()
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror}.") from None
        if resume == "never":
            if steps:
                raise CheckpointError(
                    f"checkpoint.resume is never but {self.folder} already holds checkpoints: "
                    "choose another job.dump_folder, or resume auto."
                )
            return None, []
        if resume not in ("auto", "must"):
            return self._find_named(Path(resume), steps, check), []
        refused: list[str] = []
        for step in reversed(steps):
            path = self.folder / _folder_name(step)
            try:
                if failed and str(path) in failed:
                    raise DamagedError(failed[str(path)])
                return check(path), refused
            except DamagedError as error:
                refused.append(str(error))
        if refused:
            raise CheckpointError(
                f"checkpoint.resume is {resume}, but none of the {len(refused)} checkpoints in "
                f"{self.folder} is valid ({'; '.join(refused)}): mend them, or choose another "
                "job.dump_folder to start from scratch."
            )
        if resume == "must":
            raise CheckpointError(
                f"checkpoint.resume is must, but {self.folder} holds no valid checkpoint."
            )
        return None, []

    def trust(self, path: Path) -> None:
        """Note that a checkpoint has been read: retention need not read it again."""
        with contextlib.suppress(OSError):
            self._verified[path] = _signature(path)

    def _find_named(
        self, path: Path, steps: list[int], check: Callable[[Path], Checkpoint]
    ) -> Checkpoint:
        if not os.path.isdir(path):
            raise CheckpointError(
                f"checkpoint.resume {path}: no such folder; give auto, never, must or the path of "
                "a step folder."
            )
        found = check(path)
        is_own = path.resolve().parent == self.folder.resolve()
        later = [step for step in steps if step > found.step or not is_own]
        if later:
            raise CheckpointError(
                f"resuming from {path} would overwrite the checkpoints from step {later[0]} on "
                f"in {self.folder}: choose another job.dump_folder."
            )
        return found

    def _is_valid(self, path: Path) -> bool:
        """True if the files match their hashes. What this process has written, read or checked
        before is not read again unless sizes or times have changed."""
        try:
            if self._verified.get(path) != _signature(path):
                verify(path)
                self._verified[path] = _signature(path)
        except (OSError, CheckpointError):
            return False
        return True

    def _remove_leftovers(self) -> None:
        """Remove the leftovers of processes that were killed while saving or removing."""
        for path in self.folder.glob(".*-step-*"):
            match = _LEFTOVER.fullmatch(path.name)
            if match and not _is_running(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, saved: Path) -> None:
        """Remove valid checkpoints beyond keep_latest_k; never the one that was just saved,
        whatever its step."""
        if not self._keep:
            return
        paths = [self.folder / _folder_name(step) for step in self.steps()]
        others = [path for path in paths if path != saved and self._is_valid(path)]
        for path in others[: len(others) - (self._keep - 1)]:
            # Renamed first: half a deletion must not look like a damaged checkpoint.
            hidden = path.parent / f".removed-{path.name}-{os.getpid()}"
            with contextlib.suppress(OSError):
                os.rename(path, hidden)
                shutil.rmtree(hidden, ignore_errors=True)
                self._verified.pop(path, None)


def check_room(folder: Path, nbytes: int) -> None:
    """Raise OSError if the disk of a folder, which need not exist yet, has less room than that."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    # Some network file systems know no sizes.
    if usage.total and usage.free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint of {nbytes / 1e9:.2f} GB does not fit in the {usage.free / 1e9:.2f} GB "
            f"that are free in {folder}",
        )


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
    return seal(path, section_lengths(path))


def _write_manifest(folder: Path, step: int, files: list[dict[str, Any]]) -> None:
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


def _signature(path: Path) -> tuple[tuple[str, int, int], ...]:
    stats = ((each.name, each.stat()) for each in path.iterdir())
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
