"""The package versions of a measurement."""

from __future__ import annotations

import importlib.metadata

__all__ = ["installed", "line"]


def installed(*packages: str) -> dict[str, str | None]:
    """package -> version, None if it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def line(found: dict[str, str | None]) -> str:
    """The installed ones in one line, for the head of a table."""
    return ", ".join(f"{package} {version}" for package, version in found.items() if version)
