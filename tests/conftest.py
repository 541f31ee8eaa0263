"""Shared fixtures: the pool of ranks, poisoned memory, and the skip of GPU tests without a GPU."""

from pathlib import Path

import pytest
import torch

from tests import gpu
from tests.distributed import Pool
from tests.poison import ALLOCATORS, poisoned

GPU_TESTS = Path(gpu.__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(gpu.TEST_TIMEOUT))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, this machine has none"))


@pytest.fixture(scope="session")
def pool():
    """Processes for distributed tests; see tests/distributed.py."""
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty and its kin return NaN, so that an element nobody writes is seen."""

    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
