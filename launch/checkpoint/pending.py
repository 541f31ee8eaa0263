"""A checkpoint that is being written, by this rank."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class PendingSave:
    """One rank's part of a checkpoint that is being written.

    Args:
        step: of the checkpoint.
        staging: its folder.
        write: writes this rank's files there and returns their manifest entries.
        background: run `write` in a thread, else before the constructor returns.

    Attributes:
        files: what `write` returned.
        problem: why it failed; None if it did not.
    """

    def __init__(
        self, step: int, staging: Path, write: Callable[[], list[dict[str, Any]]], background: bool
    ) -> None:
        self.step = step
        self.staging = staging
        self.files: list[dict[str, Any]] = []
        self.problem: str | None = None
        self._unexpected: BaseException | None = None
        self._write = write
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True)
        if background:
            self._thread.start()
        else:
            self._run()

    @property
    def is_done(self) -> bool:
        """True once this rank has nothing left to write."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Block until `is_done`."""
        if self._thread.ident is not None:
            self._thread.join()

    def raise_unexpected(self) -> None:
        """Raise an exception that is not the disk's fault."""
        if self._unexpected is not None:
            raise self._unexpected

    def _run(self) -> None:
        try:
            self.files = self._write()
        except OSError as error:
            self.problem = str(error)
        except BaseException as error:
            self.problem, self._unexpected = repr(error), error
