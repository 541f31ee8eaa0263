"""Ranks whose kernels run in Triton's interpreter."""

import pytest

from tests.distributed import Pool
from tests.operator.backends import INTERPRETED


@pytest.fixture(scope="module")
def interpreters():
    """Ranks in which the Triton kernels run on the CPU."""
    pool = Pool((1, 2), environment=INTERPRETED)
    yield pool
    pool.stop()
