"""How packed documents are cut into segments."""

import pytest
import torch

from lasp.ops.triton import plan

OFFSETS = (0, 0, 70, 75, 203, 203, 300)


def packed_plan(offsets, segment):
    k = torch.empty(1, offsets[-1], 2, 16)
    return plan.make_plan(k, k, offsets, segment)


@pytest.mark.parametrize("segment", [32, 64, 128, 512])
def test_packed_segments_hold_every_token_once_and_the_longest_come_first(segment):
    made = packed_plan(OFFSETS, segment)
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


@pytest.mark.parametrize(("segment", "combined"), [(32, 3), (64, 0), (512, 0)])
def test_documents_with_several_borders_come_first(segment, combined):
    made = packed_plan(OFFSETS, segment)
    documents = made.tables[made.num_segments :].tolist()
    slots = [count for _, count, *_ in documents]
    assert slots == sorted(slots, reverse=True)
    assert made.num_combined == combined == sum(count > 1 for count in slots)
    for first, count, last, document, _ in documents:
        start, stop = OFFSETS[document : document + 2]
        assert stop - start == count * segment + last
        held = [row for row in made.tables[: made.num_segments].tolist() if row[0] == document]
        assert min(slot for *_, slot in held) == first
