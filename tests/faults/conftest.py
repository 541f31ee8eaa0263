"""Faults during a run. A few of each kind run in `make test`; the cases marked `faults` are many of
the same kind, for `make test-faults`."""

# What the launcher's tests use: a small data folder, and this process as a job of its own.
from tests.launch.conftest import data, one_process

__all__ = ["data", "one_process"]
