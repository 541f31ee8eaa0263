"""The operator over two GPUs of one host, with NCCL."""

import pytest
import torch

from tests.distributed import Pool
from tests.lasp import test_sequence_parallel as on_cpu

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA GPUs of one host"
)


@pytest.fixture(scope="module")
def pool():
    pool = Pool({2: (0, 1)}, backend="nccl")
    yield pool
    pool.stop()


@pytest.mark.parametrize("method", on_cpu.METHODS)
@pytest.mark.parametrize("how", ["even", "uneven"])
@pytest.mark.parametrize("total", [1, 100, 5000])
def test_equals_one_rank(pool, total, how, method):
    on_cpu.check(pool, 2, total, how, method, dtype=torch.float32)


@pytest.mark.parametrize("field", ["dtype", "heads", "decay", "scale", "exchange"])
def test_disagreement_is_a_value_error_on_both(pool, field):
    for outcome in pool.outcomes(on_cpu.disagree, field, size=2, timeout=40):
        with pytest.raises(ValueError, match=on_cpu.FIELDS[field]):
            raise outcome


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "kept"])
def test_checkpointing(pool, how):
    sends = {"reentrant": [2, 1], "non-reentrant": [2, 1], "kept": [1, 1]}[how]
    results = pool.run(on_cpu.checkpointed, how, size=2)
    assert all(equal for equal, _ in results)
    assert [count for _, count in results] == sends
