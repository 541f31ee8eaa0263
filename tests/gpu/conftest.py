"""Ranks over NCCL for the tests on GPUs."""

import pytest

from tests.distributed import Pool
from tests.gpu import RANKS_TIMEOUT


@pytest.fixture(scope="module")
def pool():
    """One process on each of two GPUs, which leave them with the module."""
    pool = Pool({2: (0, 1)}, backend="nccl", timeout=RANKS_TIMEOUT)
    yield pool
    pool.stop()
