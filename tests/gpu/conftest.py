"""Ranks over NCCL for the tests on GPUs."""

import pytest

from tests.distributed import Pool


@pytest.fixture(scope="module")
def pool():
    """One process on each of two GPUs; both end with the module."""
    pool = Pool((2,), backend="nccl")
    yield pool
    pool.stop()
