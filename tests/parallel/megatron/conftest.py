"""Megatron on CPU processes of its own, because they are patched (see cpu_shim.py)."""

import importlib
import importlib.util

import pytest

from tests.distributed import Pool


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core"):
        return
    skip = pytest.mark.skip(reason="needs megatron-core: pip install -e '.[megatron]'")
    for item in items:
        if "tests/parallel/megatron" in item.path.as_posix():
            item.add_marker(skip)


def call(group, name, args, keywords):
    """Run on a rank: "function" of `cases`, or "module.function"; these modules import Megatron."""
    module, _, name = f"cases.{name}".rpartition(".")
    module = module.rpartition(".")[2]
    function = getattr(importlib.import_module(f"tests.parallel.megatron.{module}"), name)
    return function(*args, **keywords)


class MegatronPool:
    """Four processes that run functions of `cases` and `traps` by name."""

    def __init__(self, pool):
        self.pool = pool

    def run(self, name, *args, **keywords):
        """Results by rank."""
        return self.pool.run(call, name, args, keywords, size=4, timeout=300)


# Not for the session: threads of its groups would slow down all tests that follow.
@pytest.fixture(scope="package")
def megatron():
    pool = Pool((4,))
    yield MegatronPool(pool)
    pool.stop()
