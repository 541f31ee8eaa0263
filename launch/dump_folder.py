"""The folder for a run's output, of which one run at a time is the owner."""

import fcntl
import os
import secrets
import socket
import time
from pathlib import Path
from typing import IO

from launch.distributed import DistContext
from launch.exit_codes import ConfigError

# A job that was killed may take a moment to end after the next one has started.
_PATIENCE_SECONDS = 10.0
# A network file system may show a new file a moment later on other hosts.
_VISIBLE_SECONDS = 10.0


def open_dump_folder(folder: Path) -> IO[str]:
    """Create a folder and lock it.

    Returns:
        An open file: the folder is locked until it is closed or this process ends, in whatever way.

    Raises:
        ConfigError: it cannot be made, or another process has locked it.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"job.dump_folder {folder} cannot be made or written ({reason}): choose a folder that "
            "this user may write to."
        ) from None
    if _locked(file, folder):
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def _locked(file: IO[str], folder: Path) -> bool:
    """Lock a file; False if its file system cannot. Raises ConfigError if another process has."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            # A record lock: it ends with the process, children do not inherit it, NFS knows it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                owner = file.read(200).strip() or "another process"
                raise ConfigError(
                    f"job.dump_folder {folder} is in use by {owner}: wait until that run has "
                    "ended, or choose another folder."
                ) from None
            time.sleep(0.2)
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error.strerror})", flush=True)
            return False


def check_shared(ctx: DistContext, folder: Path) -> None:
    """Check that all hosts of a job see the files that rank 0 writes to an existing folder.

    Raises:
        ConfigError: on all ranks; one of them does not.
    """
    hosts = ctx.hosts
    if hosts is None or not hosts.are_several:
        return
    # All ranks write their part of a checkpoint to the path that rank 0 names.
    path = ctx.on_rank0(lambda: str(_marker(folder)))

    def look() -> None:
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"job.dump_folder {folder} of {hosts.rank(0)} is not that of "
                    f"{hosts.rank(ctx.rank)}: checkpoints are written by all ranks, so put it on a "
                    "file system that all hosts mount at the same path, or train with "
                    "--checkpoint.no-enable."
                )
            time.sleep(0.05)

    try:
        ctx.all_or_raise(look)
    finally:
        if ctx.is_rank0:
            os.unlink(path)


def _marker(folder: Path) -> Path:
    path = folder / f".seen-{secrets.token_hex(8)}"
    try:
        path.touch()
    except OSError as error:
        raise ConfigError(f"job.dump_folder {folder} cannot be written: {error}.") from None
    return path
