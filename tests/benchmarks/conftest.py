"""Fixtures of the tests of benchmarks that train: those of the launcher's tests."""

from tests.launch.conftest import data, one_process

__all__ = ["data", "one_process"]
