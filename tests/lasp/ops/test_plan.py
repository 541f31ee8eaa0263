"""How packed documents are cut into segments."""

from itertools import pairwise

import pytest
import torch

from lasp.ops.triton import plan

OFFSETS = (0, 0, 70, 75, 203, 203, 300)


def packed_plan(segment, states=plan.ALL):
    k = torch.empty(1, OFFSETS[-1], 2, 16)
    return plan.make_plan(k, k, OFFSETS, segment, states)


@pytest.mark.parametrize("segment", [32, 64, 128, 512])
def test_packed_segments_hold_every_token_once_and_the_longest_come_first(segment):
    made = packed_plan(segment)
    segments = made.tables[: made.num_segments].tolist()
    spans = [(first, min(stop, first + segment)) for _, first, _, stop, _ in segments]
    assert sorted(t for span in spans for t in range(*span)) == list(range(OFFSETS[-1]))
    lengths = [stop - first for first, stop in spans]
    assert lengths == sorted(lengths, reverse=True)
    assert {document for document, *_ in segments} == set(range(len(OFFSETS) - 1))
    # A segment that is not its document's last leaves its state in a slot of its own.
    slots = [slot for _, first, _, stop, slot in segments if first + segment < stop]
    assert len(set(slots)) == len(slots) <= made.num_slots
    assert all(0 <= slot < made.num_slots for slot in slots)


@pytest.mark.parametrize("states", [plan.ALL, plan.NONE, plan.States((5, 1)), plan.States((2,))])
@pytest.mark.parametrize("segment", [32, 64, 512])
def test_what_is_combined_comes_first(segment, states):
    made = packed_plan(segment, states)
    documents = made.tables[made.num_segments :].tolist()
    lengths = [stop - start for start, stop in pairwise(OFFSETS)]
    held = range(len(lengths)) if states.held is None else states.held
    wanted = [n for n, length in enumerate(lengths) if length > 2 * segment or n in held]
    assert made.num_states == len(held) and made.num_combined == len(wanted)
    state_of = {n: row for row, n in enumerate(held)}
    others = [n for n in range(len(lengths)) if n not in wanted]
    for n, (first, count, last, state, _) in zip(wanted + others, documents, strict=True):
        assert state == state_of.get(n, -1)
        assert count * segment + last == lengths[n] and (count == 0 or 0 < last <= segment)
        slots = [
            slot
            for _, _, start, stop, slot in made.tables[: made.num_segments].tolist()
            if (start, stop) == OFFSETS[n : n + 2]
        ]
        assert min(slots) == first


def test_a_row_of_zeros_stands_for_documents_that_nothing_enters():
    made = packed_plan(64, plan.States((3,), zeros=True))
    assert made.num_states == 2
    for state, _, start, stop, _ in made.tables[: made.num_segments].tolist():
        assert state == (0 if (start, stop) == OFFSETS[3:5] else 1)
