"""Command lines, by tyro."""

import contextlib
import io
from typing import Any

import tyro

from launch.exit_codes import ConfigError


def parse(kind: Any, argv: list[str] | None, prog: str, **options: Any) -> Any:
    """The arguments of a command line, by tyro; `options` are those of tyro.cli.

    Raises:
        ConfigError: an unknown flag or a wrong value.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=argv, prog=prog, **options)
    except SystemExit as stop:
        # --help ends here too, with code 0 and its text on stdout.
        if not stop.code:
            raise
        raise ConfigError(f"invalid command line.\n{captured.getvalue().rstrip()}") from None
