"""How packed documents are divided into segments."""

from itertools import pairwise

import pytest

from lasp.ops.triton.segments import ALL, NONE, DocumentStates, SegmentChoice, divide

OFFSETS = (0, 0, 70, 75, 203, 203, 300)


def divided(length, states=ALL):
    choice = SegmentChoice(length, num_boundaries=(OFFSETS[-1] - 1) // length)
    return divide(1, OFFSETS[-1], OFFSETS, choice, states)


@pytest.mark.parametrize("segment", [32, 64, 128, 512])
def test_packed_segments_hold_every_token_once_and_the_longest_come_first(segment):
    made = divided(segment)
    segments = made.tables[: made.num_segments].tolist()
    spans = [(first, min(stop, first + segment)) for _, first, _, stop, _ in segments]
    assert sorted(t for span in spans for t in range(*span)) == list(range(OFFSETS[-1]))
    lengths = [stop - first for first, stop in spans]
    assert lengths == sorted(lengths, reverse=True)
    assert {document for document, *_ in segments} == set(range(len(OFFSETS) - 1))
    # A segment that is not its document's last has a row of the states of its own.
    rows = [row for _, first, _, stop, row in segments if first + segment < stop]
    assert len(set(rows)) == len(rows) <= made.num_boundaries
    assert all(0 <= row < made.num_boundaries for row in rows)


@pytest.mark.parametrize("states", [ALL, NONE, DocumentStates((5, 1)), DocumentStates((2,))])
@pytest.mark.parametrize("segment", [32, 64, 512])
def test_combined_documents_come_first(segment, states):
    made = divided(segment, states)
    documents = made.tables[made.num_segments :].tolist()
    lengths = [stop - start for start, stop in pairwise(OFFSETS)]
    with_state = range(len(lengths)) if states.documents is None else states.documents
    wanted = [n for n, length in enumerate(lengths) if length > 2 * segment or n in with_state]
    assert made.num_states == len(with_state) and made.num_combined == len(wanted)
    state_of = {n: row for row, n in enumerate(with_state)}
    others = [n for n in range(len(lengths)) if n not in wanted]
    for n, (first, count, last, state, _) in zip(wanted + others, documents, strict=True):
        assert state == state_of.get(n, -1)
        assert count * segment + last == lengths[n] and (count == 0 or 0 < last <= segment)
        rows = [
            row
            for _, _, start, stop, row in made.tables[: made.num_segments].tolist()
            if (start, stop) == OFFSETS[n : n + 2]
        ]
        assert min(rows) == first


def test_documents_without_a_state_share_a_row_of_zeros():
    made = divided(64, DocumentStates((3,), zeros=True))
    assert made.num_states == 2
    for state, _, start, stop, _ in made.tables[: made.num_segments].tolist():
        assert state == (0 if (start, stop) == OFFSETS[3:5] else 1)
