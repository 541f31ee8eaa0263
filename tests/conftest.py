"""Shared fixtures: pools of ranks, poisoned memory, and the skip of GPU tests without a GPU."""

from pathlib import Path

import pytest
import torch

from tests.cleanup import end_descendants_with_this_process
from tests.distributed import Pool
from tests.poison import poison

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config):
    end_descendants_with_this_process()


def pytest_collection_modifyitems(items):
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, this machine has none"))


@pytest.fixture(scope="session")
def pool():
    """Processes for jobs of one to four ranks; see tests/distributed.py."""
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def pool8():
    """Processes for jobs of eight ranks."""
    pool = Pool((8,))
    yield pool
    pool.stop()


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin return NaN, so that an element that is never written is seen."""
    with poison():
        yield
