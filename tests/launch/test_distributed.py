"""Collectives of small values, and one error that ends all ranks."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from launch import distributed
from launch.distributed import DistContext, RankInfo
from launch.exit_codes import (
    CheckpointError,
    ConfigError,
    DataError,
    RemoteRankError,
    UserError,
)
from parallel.mesh import ParallelDims

RANKS = 4


def make_ctx(group):
    rank = dist.get_rank(group)
    dims = ParallelDims.resolve(RANKS)
    ctx = DistContext(RankInfo(rank, rank, "gloo", torch.device("cpu"), dims), None)
    ctx.gradient_group = group
    return ctx


def all_of_it(group):
    ctx = make_ctx(group)
    loss = math.nan if ctx.rank == 2 else 1.0
    return {
        "gather": ctx.gather({"rank": ctx.rank, "text": "x" * ctx.rank}),
        "on rank 0": ctx.gather_on_rank0({"rank": ctx.rank, "text": "y" * ctx.rank}),
        "first of two": ctx.first(f"rank {ctx.rank}" if ctx.rank in (1, 3) else None),
        "first of none": ctx.first(None),
        "equal": ctx.compare({"a": 1, "b": math.nan}),
        "flags": ctx.sum_numbers(not math.isfinite(loss), ctx.rank == 3, dtype=torch.int32),
        "first": ctx.on_rank0(lambda: ["decided", ctx.rank]),
        "agree": ctx.all_or_raise(lambda: ctx.rank * 10),
    }


def test_every_rank_gets_the_same_values(pool):
    results = pool.run(all_of_it, size=RANKS)
    for rank, result in enumerate(results):
        assert result["gather"] == [{"rank": r, "text": "x" * r} for r in range(RANKS)]
        everyone = [{"rank": r, "text": "y" * r} for r in range(RANKS)]
        assert result["on rank 0"] == (everyone if rank == 0 else None)
        assert result["first of two"] == (1, "rank 1")
        assert result["first of none"] is None
        assert result["flags"] == [1, 1]
        assert result["first"] == ["decided", 0]
        assert result["agree"] == rank * 10


def test_a_single_process_sums_without_its_device():
    # A tensor on "meta" has no values: looking at one would raise, as it would wait on a GPU.
    info = RankInfo(0, 0, "nccl", torch.device("meta"), ParallelDims.resolve(1))
    assert DistContext(info, None).sum_numbers(2, True, dtype=torch.int64) == [2, 1]


def failing(group, bad_ranks):
    ctx = make_ctx(group)

    def work():
        if ctx.rank in bad_ranks:
            raise DataError(f"rank {ctx.rank} found train.bin damaged")

    caught = []
    # Twice, to see that a failure leaves the ranks in step.
    for _ in range(2):
        try:
            ctx.all_or_raise(work)
        except UserError as error:
            caught.append((type(error), str(error), error.exit_code))
    try:
        ctx.fail(CheckpointError("all saw it"))
    except UserError as error:
        caught.append((type(error), str(error), error.exit_code))
    return caught


def test_an_error_on_any_rank_ends_all_and_is_reported_once(pool):
    for rank, caught in enumerate(pool.run(failing, (1, 3), size=RANKS)):
        kind = DataError if rank == 1 else RemoteRankError
        assert caught[:2] == [(kind, "rank 1 found train.bin damaged", 73)] * 2
        assert caught[2] == (CheckpointError if rank == 0 else RemoteRankError, "all saw it", 70)


def refusing_rank0(group):
    ctx = make_ctx(group)

    def refuse():
        raise DataError("rank 0 found no data")

    try:
        ctx.on_rank0(refuse)
    except UserError as error:
        return type(error), str(error), error.exit_code


def test_an_error_of_rank_0_ends_all(pool):
    results = pool.run(refusing_rank0, size=RANKS)
    assert results[0] == (DataError, "rank 0 found no data", 73)
    assert results[1:] == [(RemoteRankError, "rank 0 found no data", 73)] * (RANKS - 1)


def differing(group):
    ctx = make_ctx(group)
    try:
        ctx.compare({"the digest of the data": "b" if ctx.rank == 2 else "a"})
    except UserError as error:
        return type(error), str(error)


def test_ranks_that_differ_are_named(pool):
    results = pool.run(differing, size=RANKS)
    assert results[0][0] is ConfigError
    assert 'the digest of the data is "a" on ranks 0, 1 and 3, "b" on rank 2' in results[0][1]
    assert [kind for kind, _ in results[1:]] == [RemoteRankError] * (RANKS - 1)


class Collectives:
    """In place of torch.distributed: `size` ranks that pass the same, and the bytes that this one
    receives in each call."""

    def __init__(self, size, rank):
        self.size, self.rank, self.received = size, rank, []

    def patch(self):
        names = {"all_reduce": self.reduce, "broadcast": self.reduce, "gather": self.gather}
        return mock.patch.multiple(dist, **names), mock.patch.object(
            distributed, "all_gather_flat", self.all_gather
        )

    def reduce(self, tensor, *args):
        self.received.append(tensor.nbytes)

    def gather(self, tensor, rows, dst):
        self.received.append(0 if rows is None else self.size * tensor.nbytes)
        for row in rows or ():
            row.copy_(tensor)

    def all_gather(self, tensor, group):
        self.received.append(self.size * tensor.nbytes)
        return tensor.repeat(self.size), mock.Mock()


def received(size, rank, method, *args):
    """Bytes that a rank of `size` receives in each collective of a method of DistContext."""
    info = RankInfo(rank, rank, "gloo", torch.device("cpu"), ParallelDims.resolve(size))
    ctx = DistContext(info, None)
    ctx.gradient_group = object()
    collectives = Collectives(size, rank)
    first, second = collectives.patch()
    with first, second:
        getattr(ctx, method)(*args)
    return collectives.received


@pytest.mark.parametrize("size", [64, 512])
def test_what_ranks_receive_does_not_grow_with_their_number(size):
    text = "x" * 1000
    length = len(text) + 2
    for rank in (0, size - 1):
        assert received(size, rank, "all_or_raise", lambda: text) == [8]
        assert received(size, rank, "first", None) == [8]
        assert received(size, rank, "compare", {"a": text}) == [16]
    assert received(size, 0, "on_rank0", lambda: text) == [8, length + len("[, null]")]
    # Only rank 0 has what it asked all others for.
    assert received(size, size - 1, "gather_on_rank0", text) == [8, 0]
    assert received(size, 0, "gather_on_rank0", text) == [8, size * length]
    assert received(size, size - 1, "gather", text) == [8, size * length]
