"""Which documents, and which parts of them, a rank holds."""

import random
from itertools import pairwise

import pytest

from lasp import shard
from lasp.pieces import cut_documents


def test_a_cut_by_hand():
    # Ranks hold tokens 0-3 and 8-11, and 4-7; the second document runs through three places.
    first, second = (cut_documents((0, 3, 9, 12), (8, 4), rank, "zigzag") for rank in (0, 1))
    assert first.crossing == (None, 1, None, 1, None) or first.crossing[1:4] == (1, 1, 1)
    assert first.offsets == (0, 3, 4, 5, 8) and second.offsets == (0, 2, 4)
    assert [(s.start, s.stop, s.first_document) for s in first.spans] == [(0, 2, 0), (2, 4, 1)]
    assert [s.begun for s in first.spans] == [False, True]
    # The first rank's second piece ends what it holds of the document, not its first.
    assert [s.num_final for s in first.spans] == [1, 2]
    assert second.passes(0) and second.passes(1) and not first.passes(0)


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


def check_cut(offsets, lengths, layout):
    document_of = [
        n for n, (start, stop) in enumerate(pairwise(offsets)) for _ in range(start, stop)
    ]
    borders = shard.place_borders(lengths, layout)
    begun = []
    for rank, length in enumerate(lengths):
        cut = cut_documents(offsets, lengths, rank, layout)
        assert cut.offsets[-1] == sum(cut.lengths) == length
        held = shard.places(rank, len(lengths), layout)
        tokens = [t for place in held for t in range(borders[place], borders[place + 1])]
        for span in cut.spans:
            for row in range(span.start, span.stop):
                here = tokens[cut.offsets[row] : cut.offsets[row + 1]]
                expected = span.first_document + row - span.start
                assert {document_of[t] for t in here} <= {expected}
        for rows, documents in cut._outer(reverse=False):
            begun += range(documents.start, documents.stop)
            for row, n in zip(range(rows.start, rows.stop), begun[-1:], strict=False):
                here = tokens[cut.offsets[row] : cut.offsets[row + 1]]
                assert not here or rows.stop - rows.start > 1 or here[0] == offsets[n]
        ended = [n for _, d in cut._outer(reverse=True) for n in range(d.start, d.stop)]
        assert len(ended) == len(set(ended)) and set(ended) >= {document_of[t] for t in tokens}
    assert sorted(begun) == list(range(len(offsets) - 1))
