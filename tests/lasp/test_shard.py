"""Which tokens a rank owns."""

import pytest
import torch
import torch.distributed as dist

from lasp import SequenceShard
from lasp import shard as shards


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


def parts(group, total, layout):
    shard = SequenceShard.split(total, group, layout=layout)
    x = torch.arange(2 * total).reshape(2, total)
    assert torch.equal(shard.take(x)[0], shard.positions())
    assert shard.take(x.t(), dim=0).shape[0] == shard.length
    return shard.ranges, shard.take(x), shard.is_first, shard.is_last


@pytest.mark.parametrize("total, size", [(16, 2), (10, 3), (2, 4), (0, 2), (24, 4)])
def test_zigzag_mirrors_the_sequence(pool, total, size):
    results = pool.run(parts, total, "zigzag", size=size)
    for rank, (ranges, _, first, last) in enumerate(results):
        (start, stop), (mirrored_start, mirrored_stop) = ranges
        assert (mirrored_start, mirrored_stop) == (total - stop, total - start)
        assert ranges == shards.token_ranges(total, size, rank, "zigzag")
        assert first == last == (rank == 0)
    order = shards.token_order(total, size, "zigzag")
    joined = torch.cat([of_rank for _, of_rank, *_ in results], dim=1)
    x = torch.arange(2 * total).reshape(2, total)
    assert torch.equal(joined, x[:, order])
    assert torch.equal(joined[:, order.argsort()], x)


def test_even_zigzag_is_that_of_softmax_context_parallelism():
    # Rank r of P: chunks r and 2P-1-r of 2P.
    assert shards.token_order(8, 2, "zigzag").tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert shards.chunks_of_rank(1, 4, "zigzag") == (1, 6)
    assert shards.chunk_boundaries((4, 2, 0), "zigzag") == (0, 2, 3, 3, 3, 4, 6)
    assert shards.chunk_boundaries((4, 1, 0)) == (0, 4, 5, 5)


def test_what_zigzag_cannot_cut():
    with pytest.raises(ValueError, match="split of 7 tokens.*even.*Pad"):
        shards.split_lengths(7, 2, "zigzag")
    with pytest.raises(ValueError, match="holds 3 tokens in zigzag"):
        shards.chunk_boundaries((4, 3), "zigzag")
    with pytest.raises(ValueError, match="layout is 'spiral': choose one of contiguous, zigzag"):
        shards.chunks_of_rank(0, 2, "spiral")
    with pytest.raises(ValueError, match="first half.*got 2..6 of 8"):
        SequenceShard(2, 6, 8, layout="zigzag")
    with pytest.raises(ValueError, match="two ranges and no slice"):
        SequenceShard(0, 4, 8, layout="zigzag").token_slice  # noqa: B018
    with pytest.raises(ValueError, match="x has 5 entries along dimension 1, the sequence 8"):
        SequenceShard.whole(8).take(torch.zeros(1, 5))


def lengths(group):
    return SequenceShard.split(23, group).lengths


def test_an_even_cut_knows_all_lengths(pool):
    assert pool.run(lengths, size=3) == [(8, 8, 7)] * 3
    with pytest.raises(ValueError, match=r"\[3, 4\] sum up to 7, not to the total of 8"):
        SequenceShard(0, 8, 8, lengths=(3, 4))
