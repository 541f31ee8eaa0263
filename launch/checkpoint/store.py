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
        manifest.json           hashes of the others; see launch/checkpoint/manifest.py
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from launch.checkpoint.manifest import folder_name, group_of, read_manifest, write_manifest
from launch.checkpoint.parts import DamagedError, sync, thread_pool
from launch.checkpoint.shards import TensorFiles
from launch.exit_codes import DISK_FAILED, CheckpointError, UserError
from launch.files import is_running, parse_json

_STEP_FOLDER = re.compile(r"step-(\d{8})")
# Leftovers of a process that was killed while saving or removing; the number is its process id.
_LEFTOVER = re.compile(r"\.(?:staging|removed)-step-\d{8}-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk with a valid manifest. Reading a file checks it; files of format 1 must
    have been checked by `verify` before."""

    path: Path
    step: int

    def open(self, group: str) -> TensorFiles:
        """The tensors of a group, "model", "optimizer" or "states", read region by region. Raises
        DamagedError."""
        files = read_manifest(self.path).files
        try:
            return TensorFiles(each.open() for each in files if group_of(each.path.name) == group)
        except CheckpointError:
            raise
        except (ValueError, KeyError, SafetensorError) as error:
            raise DamagedError(
                f"{self.path}: tensors of {group} cannot be read: {error}."
            ) from None

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, in full, on the CPU. Raises DamagedError."""
        return {name: stored[()] for name, stored in self.open(group).items()}

    def state(self) -> dict[str, Any]:
        """The content of state.json. Raises DamagedError."""
        files = read_manifest(self.path).files
        file = next(each for each in files if each.path.name == "state.json").open()
        try:
            state = parse_json(file.read(0, file.size))
        except ValueError as error:
            raise DamagedError(f"{file.path} is damaged ({error!r}).") from None
        if not isinstance(state, dict):
            raise DamagedError(f"{file.path} is damaged: it holds no JSON object.")
        return state


class DiskError(UserError):
    """Checkpoints cannot be written."""

    exit_code = DISK_FAILED


def inspect(path: Path) -> Checkpoint:
    """The checkpoint in a folder, whose files are checked when they are read; those of format 1
    now. Raises DamagedError for a manifest or a size that is wrong."""
    manifest = read_manifest(path)
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
    manifest = read_manifest(path)
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
            return verify(path / folder_name(step))
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
        # Those that another rank could not read, whatever this one sees.
        self._refused: set[Path] = set()
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
        final = self.folder / folder_name(step)
        if final.exists():
            if self._is_valid(final):
                raise CheckpointError(f"{final} exists already; checkpoints are never overwritten.")
            os.rename(final, final.with_name(f".refused-{final.name}-{time.time_ns()}"))
        staging = self.folder / f".staging-{final.name}-{os.getpid()}"
        self.discard(staging)
        staging.mkdir(parents=True)
        try:
            check_room(staging, nbytes)
        except OSError:
            self.discard(staging)
            raise
        return staging

    def commit(self, step: int, staging: Path, files: list[dict[str, Any]]) -> Path:
        """Turn a staging folder into the checkpoint of `step`; keep it and, of the other valid
        ones, the newest keep_latest_k - 1.

        Args:
            files: `seal_file` of every file in the folder.

        Raises:
            OSError: the disk failed; nothing is committed, the staging folder is removed.
        """
        final = self.folder / folder_name(step)
        try:
            write_manifest(staging, step, files)
            sync(staging)
            os.rename(staging, final)
        except BaseException:
            self.discard(staging)
            raise
        self._refused.discard(final)
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
            path = self.folder / folder_name(step)
            try:
                if failed and str(path) in failed:
                    self._refused.add(path)
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
        if path in self._refused:
            return False
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
            if match and not is_running(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, saved: Path) -> None:
        """Remove valid checkpoints beyond keep_latest_k; never the one that was just saved,
        whatever its step."""
        if not self._keep:
            return
        paths = [self.folder / folder_name(step) for step in self.steps()]
        others = [path for path in paths if path != saved and self._is_valid(path)]
        for path in others[: len(others) - (self._keep - 1)]:
            # Renamed first: half a deletion must not look like a damaged checkpoint.
            hidden = path.parent / f".removed-{path.name}-{os.getpid()}"
            with contextlib.suppress(OSError):
                os.rename(path, hidden)
                shutil.rmtree(hidden, ignore_errors=True)
                self._verified.pop(path, None)


def check_writable(folder: Path, nbytes: int) -> None:
    """Check, without leaving anything behind, that checkpoints can be written to a folder, which
    need not exist yet.

    Raises:
        DiskError: they cannot, or one of `nbytes` does not fit.
    """
    try:
        while not os.path.lexists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
            file.flush()
        check_room(folder, nbytes)
    except OSError as error:
        raise DiskError(
            f"checkpoints cannot be written to {folder}: {error.strerror}. Free space, choose "
            "another job.dump_folder, or train with --checkpoint.no-enable."
        ) from None


def check_room(folder: Path, nbytes: int) -> None:
    """Raise OSError if the disk of an existing folder has less room than that."""
    usage = shutil.disk_usage(folder)
    # Some network file systems know no sizes.
    if usage.total and usage.free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {nbytes / 1e9:.3f} GB, {usage.free / 1e9:.3f} GB are free",
            str(folder),
        )


def _signature(path: Path) -> tuple[tuple[str, int, int], ...]:
    stats = ((each.name, each.stat()) for each in path.iterdir())
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
