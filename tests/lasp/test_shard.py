"""Which tokens a rank owns."""

import pytest
import torch.distributed as dist

from lasp import SequenceShard


def test_whole():
    shard = SequenceShard.whole(10)
    assert (shard.start, shard.stop, shard.length, shard.rank, shard.size) == (0, 10, 10, 0, 1)
    assert shard.is_first and shard.is_last and shard.token_slice == slice(0, 10)


def borders(group, total):
    shard = SequenceShard.split(total, group)
    assert shard.rank == dist.get_rank(group) and shard.size == dist.get_world_size(group)
    return shard.start, shard.stop, shard.is_first, shard.is_last


@pytest.mark.parametrize(
    "total, size, cuts",
    [(12, 4, [0, 3, 6, 9, 12]), (10, 3, [0, 4, 7, 10]), (2, 4, [0, 1, 2, 2, 2]), (0, 2, [0, 0, 0])],
)
def test_split_is_even_in_order_and_complete(pool, total, size, cuts):
    results = pool.run(borders, total, size=size)
    assert [(start, stop) for start, stop, _, _ in results] == list(
        zip(cuts, cuts[1:], strict=False)
    )
    assert [first for *_, first, _ in results] == [rank == 0 for rank in range(size)]
    assert [last for *_, last in results] == [rank == size - 1 for rank in range(size)]


@pytest.mark.parametrize("start, stop", [(-1, 3), (4, 3), (0, 11)])
def test_offsets_outside_the_sequence(start, stop):
    with pytest.raises(ValueError, match=f"start {start}, stop {stop}, total 10"):
        SequenceShard(start, stop, 10)


def test_a_part_needs_a_group():
    with pytest.raises(ValueError, match="tokens 0..5 of 10 are a part.*pass the process group"):
        SequenceShard(0, 5, 10)
