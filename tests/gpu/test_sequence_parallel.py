"""The operator over two GPUs of one host, with NCCL."""

import pytest
import torch

from lasp import shard
from tests.lasp import sharded
from tests.lasp.exchange import test_guard, test_messages
from tests.lasp.sharded import METHODS, Problem

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA GPUs of one host"
)


@pytest.mark.parametrize("layout", shard.LAYOUTS)
def test_equals_one_rank(pool, layout):
    # Few lengths: each rank compiles kernels for every one.
    documents = (0, 1700, 1700, 5000)
    problems = [
        Problem(5000, method, layout, lengths, each, dtype=torch.float32, split=split)
        for method in METHODS
        for lengths, each, split in (
            (None, None, False),
            ((4998, 2), None, True),
            (None, documents, True),
            ((2, 4998), documents, False),
        )
    ]
    sharded.check(pool, 2, *problems, Problem(2, layout=layout, dtype=torch.float32))


@pytest.mark.parametrize(
    "field, known",
    [("dtype", True), ("heads", False), ("decay", True), ("exchange", True), ("lengths", False)],
)
def test_disagreement_is_a_value_error_on_both(pool, field, known):
    test_guard.check_disagreement(pool, field, known, size=2)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "kept"])
def test_checkpointing(pool, how, split):
    sends = {"reentrant": [2, 1], "non-reentrant": [2, 1], "kept": [1, 1]}[how]
    results = pool.run(test_messages.checkpointed, how, split, size=2)
    assert all(equal for equal, _ in results)
    assert [count for _, count in results] == sends
