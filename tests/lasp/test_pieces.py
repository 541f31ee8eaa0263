"""Which documents, and which parts of them, a rank holds."""

import random
from itertools import pairwise

import pytest
import torch

from lasp import shard
from lasp.partition import partition_documents as cut_documents


def test_a_cut_by_hand():
    # Ranks hold tokens 0-3 and 8-11, and 4-7; the second document runs through three places.
    first, second = (cut_documents((0, 3, 9, 12), (8, 4), rank, "zigzag") for rank in (0, 1))
    assert first.boundary_documents == second.boundary_documents == (None, 1, 1, 1, None)
    assert first.cu_seqlens == (0, 3, 4, 5, 8) and second.cu_seqlens == (0, 2, 4)
    assert [(s.start, s.stop, s.first_document) for s in first.spans] == [(0, 2, 0), (2, 4, 1)]
    assert [s.continues for s in first.spans] == [False, True]
    # The first rank's second piece ends what it holds of the document, not its first.
    assert [s.num_final for s in first.spans] == [1, 2]
    assert second.passes_through(0) and second.passes_through(1) and not first.passes_through(0)


@pytest.mark.parametrize("layout", shard.LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_and_document_has_one_place(layout, seed):
    chance = random.Random(seed)
    for _ in range(100):
        size = chance.choice([1, 2, 3, 4])
        lengths = tuple(2 * chance.choice([0, 0, 1, 3]) for _ in range(size))
        total = sum(lengths)
        inner = sorted(chance.randint(0, total) for _ in range(chance.randrange(5)))
        check_cut((0, *inner, total), lengths, layout)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", shard.LAYOUTS)
def test_states_only_boundaries_are_those_of_all_rows(layout, reverse):
    chance = random.Random(0)
    for _ in range(100):
        size = chance.choice([1, 2, 3, 4])
        lengths = tuple(2 * chance.choice([0, 1, 3]) for _ in range(size))
        inner = sorted(chance.randint(0, sum(lengths)) for _ in range(chance.randrange(8)))
        for rank in range(size):
            check_edges(cut_documents((0, *inner, sum(lengths)), lengths, rank, layout), reverse)


def check_edges(cut, reverse):
    edges, num_rows = cut.only_boundaries(), len(cut.cu_seqlens) - 1
    rows = torch.randn(num_rows, 1, 2, 3)
    leaving = rows[list(edges.state_rows(entering=False, reverse=reverse))]
    for piece in range(len(cut.chunk_lengths)):
        expected = cut.state_out(rows, piece, reverse)
        torch.testing.assert_close(edges.state_out(leaving, piece, reverse), expected, rtol=0, atol=0)
    received = [
        torch.randn(1, 1, 2, 3) if (span.unfinished if reverse else span.continues) else None
        for span in cut.spans
    ]
    received = cut.stack(received, rows)
    expected, entering = (each.rows_in(None, received, reverse) for each in (cut, edges))
    if expected is None:
        assert entering is None
        return
    held = edges.state_rows(entering=True, reverse=reverse)
    assert len(entering) == len(held) + 1
    found = [entering[held.index(n) if n in held else -1] for n in range(num_rows)]
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=0)


def check_cut(offsets, lengths, layout):
    document_of = [
        n for n, (start, stop) in enumerate(pairwise(offsets)) for _ in range(start, stop)
    ]
    borders = shard.chunk_boundaries(lengths, layout)
    begun = []
    for rank, length in enumerate(lengths):
        cut = cut_documents(offsets, lengths, rank, layout)
        assert cut.cu_seqlens[-1] == sum(cut.chunk_lengths) == length
        held = shard.chunks_of_rank(rank, len(lengths), layout)
        tokens = [t for place in held for t in range(borders[place], borders[place + 1])]
        for span in cut.spans:
            for row in range(span.start, span.stop):
                here = tokens[cut.cu_seqlens[row] : cut.cu_seqlens[row + 1]]
                expected = span.first_document + row - span.start
                assert {document_of[t] for t in here} <= {expected}
        started = []
        for rows, documents in cut._rows_and_documents(ending=False):
            numbers = range(documents.start, documents.stop)
            started += numbers
            for row, n in zip(range(rows.start, rows.stop), numbers, strict=True):
                here = tokens[cut.cu_seqlens[row] : cut.cu_seqlens[row + 1]]
                assert not here or here[0] == offsets[n]
        begun += started
        ended = [n for _, d in cut._rows_and_documents(ending=True) for n in range(d.start, d.stop)]
        empty = [n for n in started if offsets[n] == offsets[n + 1]]
        # Those with tokens here, each once; not those that only pass through.
        assert sorted(ended) == sorted({document_of[t] for t in tokens} | set(empty))
    assert sorted(begun) == list(range(len(offsets) - 1))
