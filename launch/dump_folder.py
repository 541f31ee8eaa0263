"""The folder for a run's output, of which one run at a time is the owner."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from launch.exit_codes import ConfigError

# A job that was killed may take a moment to end after the next one has started.
_PATIENCE_SECONDS = 10.0


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
