"""Collectives of small values, and one error that ends all ranks."""

import math

import torch
import torch.distributed as dist

from launch.distributed import DistContext, RankInfo
from launch.exit_codes import CheckpointError, DataError, RemoteRankError, UserError
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
        "flags": ctx.sum_numbers(not math.isfinite(loss), ctx.rank == 3, dtype=torch.int32),
        "first": ctx.on_rank0(lambda: ["decided", ctx.rank]),
        "agree": ctx.all_or_raise(lambda: ctx.rank * 10),
    }


def test_every_rank_gets_the_same_values(pool):
    results = pool.run(all_of_it, size=RANKS)
    for rank, result in enumerate(results):
        assert result["gather"] == [{"rank": r, "text": "x" * r} for r in range(RANKS)]
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
