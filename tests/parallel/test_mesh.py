"""The degrees of the mesh must multiply to the number of processes."""

import itertools

import pytest
import torch.distributed as dist

from parallel.mesh import MESH_AXES, ParallelDims

DEGREES = (1, 2, 3)


@pytest.mark.parametrize("world_size", [1, 2, 6, 8, 12])
def test_only_degrees_whose_product_is_the_world_size_are_accepted(world_size):
    for degrees in itertools.product(DEGREES, repeat=4):
        replicate, shard, cp, tp = degrees
        named = dict(dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp)
        product = replicate * shard * cp * tp
        if product == world_size:
            dims = ParallelDims(**named, world_size=world_size)
            assert tuple(dims.degrees.values()) == degrees
            assert dims.dp == replicate * shard
        else:
            with pytest.raises(ValueError, match=f"= {product} != {world_size} processes"):
                ParallelDims(**named, world_size=world_size)
    assert not dist.is_initialized()


def test_the_equation_shows_every_number():
    dims = ParallelDims(dp_replicate=2, cp=4, world_size=8)
    assert dims.equation == "dp_replicate 2 x dp_shard 1 x cp 4 x tp 1 = 8 processes"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(world_size=8), (8, 1, 1, 1)),
        (dict(world_size=8, cp=2), (4, 1, 2, 1)),
        (dict(world_size=8, cp=2, tp=2, dp_replicate=1), (1, 2, 2, 2)),
        (dict(world_size=8, dp_shard=4), (2, 4, 1, 1)),
        (dict(world_size=1), (1, 1, 1, 1)),
        (dict(world_size=8, cp=-1), (1, 1, 8, 1)),
        (dict(world_size=8, cp=-1, dp_replicate=2), (2, 1, 4, 1)),
        (dict(world_size=8, dp_replicate=2), (2, 4, 1, 1)),
    ],
)
def test_minus_one_takes_the_ranks_that_the_others_leave(given, expected):
    assert tuple(ParallelDims.resolve(**given).degrees.values()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(world_size=2, cp=3), "cp 3 x tp 1 = 3 does not divide the 2 processes"),
        (dict(world_size=6, cp=4), "= 4 does not divide the 6 processes"),
        (dict(world_size=2, dp_replicate=1, dp_shard=1), "= 1 != 2 processes"),
        (dict(world_size=2, cp=0), "cp is 0"),
        (dict(world_size=2, cp=-2), "cp is -2"),
        (dict(world_size=2, tp=-1), "tp is -1"),
        (dict(world_size=3, cp=-1, dp_replicate=2), "= 2 does not divide the 3 processes"),
        (dict(world_size=2, dp_shard=0), "dp_shard is 0"),
    ],
)
def test_impossible_degrees_are_refused_with_their_numbers(given, message):
    with pytest.raises(ValueError, match=message):
        ParallelDims.resolve(**given)


def test_ranks_of_one_sequence_are_neighbours():
    dims = ParallelDims.resolve(8, cp=4)
    assert [dims.dp_rank(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert MESH_AXES.index("cp") > MESH_AXES.index("dp_shard")
