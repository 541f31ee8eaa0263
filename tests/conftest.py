"""Shared fixtures: the pool of ranks, poisoned memory, and the skip of GPU tests without a GPU."""

from pathlib import Path

import pytest
import torch

from tests.distributed import Pool

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items):
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
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

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
