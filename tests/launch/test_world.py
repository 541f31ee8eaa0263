"""What ranks agree on: sums, reports, and one error that ends all of them."""

import math

import torch
import torch.distributed as dist

from launch.errors import CheckpointError, DataError, EchoError, UserError
from launch.world import Place, World
from parallel.mesh import ParallelDims

RANKS = 4


def make_world(group):
    rank = dist.get_rank(group)
    dims = ParallelDims.resolve(RANKS)
    world = World(Place(rank, rank, "gloo", torch.device("cpu"), dims), None)
    world.gradient_group = group
    return world


def all_of_it(group):
    world = make_world(group)
    loss = math.nan if world.rank == 2 else 1.0
    return {
        "gather": world.gather({"rank": world.rank, "text": "x" * world.rank}),
        "flags": world.total(not math.isfinite(loss), world.rank == 3, dtype=torch.int32),
        "first": world.first_decides(lambda: ["decided", world.rank]),
        "agree": world.agree(lambda: world.rank * 10),
    }


def test_every_rank_learns_the_same(pool):
    results = pool.run(all_of_it, size=RANKS)
    for rank, result in enumerate(results):
        assert result["gather"] == [{"rank": r, "text": "x" * r} for r in range(RANKS)]
        # The NaN of one rank is counted, not drowned.
        assert result["flags"] == [1, 1]
        assert result["first"] == ["decided", 0]
        assert result["agree"] == rank * 10


def test_one_process_counts_without_its_device():
    # A tensor on "meta" has no values: looking at one would raise, as it would wait on a GPU.
    place = Place(0, 0, "nccl", torch.device("meta"), ParallelDims.resolve(1))
    assert World(place, None).total(2, True, dtype=torch.int64) == [2, 1]


def failing(group, bad_ranks):
    world = make_world(group)

    def work():
        if world.rank in bad_ranks:
            raise DataError(f"rank {world.rank} found train.bin damaged")

    caught = []
    # Twice, to see that a failure leaves the ranks in step.
    for _ in range(2):
        try:
            world.agree(work)
        except UserError as error:
            caught.append((type(error), str(error), error.exit_code))
    try:
        world.fail(CheckpointError("all saw it"))
    except UserError as error:
        caught.append((type(error), str(error), error.exit_code))
    return caught


def test_an_error_on_any_rank_ends_all_and_is_told_once(pool):
    for rank, caught in enumerate(pool.run(failing, (1, 3), size=RANKS)):
        kind = DataError if rank == 1 else EchoError
        assert caught[:2] == [(kind, "rank 1 found train.bin damaged", 73)] * 2
        assert caught[2] == (CheckpointError if rank == 0 else EchoError, "all saw it", 70)
