"""How documents are divided into segments: one program scans one segment.

A document is a row of a dense batch, or one of the documents packed into a batch of one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class SegmentChoice(NamedTuple):
    """How documents are divided into segments, each of which one program scans.

    Attributes:
        length: tokens per segment.
        num_boundaries: rows of the segment states, one per boundary between two segments of a
            document (packed: at most so many are used). 0: a scan needs no chunk states.
        folded: the sum over earlier segments is folded into the scan: a segment state holds what
            one segment adds. Else a kernel sums them first, and it holds all that crosses the
            boundary.
    """

    length: int
    num_boundaries: int = 0
    folded: bool = False


class DocumentStates(NamedTuple):
    """Which packed documents have an initial state, or have their local state computed.

    Attributes:
        documents: row i of the states is that of documents[i]; None: row n of document n.
        zeros: the states have one more row, of zeros, for all other documents.
    """

    documents: tuple[int, ...] | None = None
    zeros: bool = False

    def row_of(self, num_documents: int) -> list[int]:
        """The row of every document; -1: none."""
        if self.documents is None:
            return list(range(num_documents))
        rows = [len(self.documents) if self.zeros else -1] * num_documents
        for row, document in enumerate(self.documents):
            rows[document] = row
        return rows

    def num_rows(self, num_documents: int) -> int:
        """How many rows the states have."""
        return num_documents if self.documents is None else len(self.documents) + self.zeros


ALL, NONE = DocumentStates(), DocumentStates(documents=())


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of a call.

    Dense: each of `num_documents` batch rows has `per_row` segments. Packed: `tables` holds on the
    host, in int64, one row (state, first token, document start, document stop, boundary) per
    segment, the longest first: programs start in this order, and the short ones fill what the long
    ones leave. Then one row (first boundary, boundaries, tokens in the last segment, state, first
    token) per document, the combined ones first. A document always has a segment, an empty document
    one without tokens. `state` is the document's row among `num_states` initial or local states;
    -1: it has none.

    Segment states have a row for every boundary between two segments of a document,
    `num_boundaries` or fewer in all. It holds what one segment adds, and the scan sums these, if
    `folded`; else all that crosses the boundary. The combine kernel computes that, and local
    states, for `num_combined` documents: if packed, for those with more than one boundary or a
    local state.
    """

    num_documents: int
    num_states: int
    num_segments: int
    num_boundaries: int
    num_combined: int
    length: int
    per_row: int
    folded: bool
    tables: torch.Tensor | None

    @cached_property
    def single(self) -> bool:
        """True if every document is one segment, so that no segment state is ever read."""
        return self.num_segments == self.num_documents

    @cached_property
    def packed(self) -> bool:
        """True for packed documents."""
        return self.tables is not None

    def device_tables(
        self, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Copies of the segment and document tables on `device`, without waiting for them.

        Copied in every call on purpose: a cached copy would belong to one stream, or to a graph.
        """
        if self.tables is None:
            return None, None
        tables = self.tables.to(device, non_blocking=True)
        return tables[: self.num_segments], tables[self.num_segments :]


@lru_cache(maxsize=256)
def divide(
    batch: int,
    seq_len: int,
    cu_seqlens: tuple[int, ...] | None,
    choice: SegmentChoice,
    states: DocumentStates = ALL,
    pinned: bool = False,
) -> Segments:
    """The segments of [B, T, ...] operands; `pinned`: the tables will be copied to a GPU."""
    length = max(choice.length, 1)
    if cu_seqlens is None:
        per_row = max(1, -(-seq_len // length))
        return Segments(
            num_documents=batch,
            num_states=batch,
            num_segments=batch * per_row,
            num_boundaries=choice.num_boundaries,
            num_combined=batch,
            length=length,
            per_row=per_row,
            folded=choice.folded,
            tables=None,
        )
    assert (batch, cu_seqlens[0], cu_seqlens[-1]) == (1, 0, seq_len), (batch, seq_len, cu_seqlens)
    segments: list[tuple[int, ...]] = []
    documents: list[tuple[int, ...]] = []
    rows = states.row_of(len(cu_seqlens) - 1)
    for document, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        assert start <= stop, cu_seqlens
        count = max(1, -(-(stop - start) // length))
        last = stop - start - (count - 1) * length
        boundary, row = len(segments) - document, rows[document]
        documents.append((boundary, count - 1, last, row, start))
        segments += [(row, start + i * length, start, stop, boundary + i) for i in range(count)]
    segments.sort(key=lambda row: min(row[3] - row[1], length), reverse=True)
    documents.sort(key=_is_combined, reverse=True)
    tables = torch.tensor(segments + documents, dtype=torch.int64).view(-1, 5)
    if pinned:
        # A copy from pageable memory would make the host wait.
        tables = tables.pin_memory()
    return Segments(
        num_documents=len(documents),
        num_states=states.num_rows(len(documents)),
        num_segments=len(segments),
        num_boundaries=choice.num_boundaries,
        num_combined=sum(map(_is_combined, documents)),
        length=length,
        per_row=0,
        folded=False,
        tables=tables,
    )


def _is_combined(document: tuple[int, ...]) -> bool:
    """True if a document's row has more than one boundary, or a state."""
    _, boundaries, _, state, _ = document
    return boundaries > 1 or state >= 0


@triton.jit
def locate_segment(
    p_table,
    i_s,
    T,
    segments_per_row,
    segment_length,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Return a segment's (document, batch row, first token, tokens, tokens outside, boundary).

    `outside` counts the document's tokens on the side that the scan comes from. If there are any,
    `i_boundary` is the row of the segment states that enters. Dense documents are batch rows and
    need no table: their segments follow from arithmetic.
    """
    if PACKED:
        p_row = p_table + i_s.to(tl.int64) * 5
        i_n = tl.load(p_row)
        start = tl.load(p_row + 1)
        document_start = tl.load(p_row + 2)
        document_stop = tl.load(p_row + 3)
        i_boundary = tl.load(p_row + 4)
        i_b = i_n * 0
    else:
        i_n = (i_s // segments_per_row).to(tl.int64)
        start = (i_s % segments_per_row).to(tl.int64) * segment_length
        document_start = start * 0
        document_stop = document_start + T
        i_b = i_n
        i_boundary = i_n * (segments_per_row - 1) + i_s % segments_per_row
    # Chunk arithmetic is 32-bit: a segment has fewer than 2**31 tokens, the whole tensor need not.
    count = tl.minimum(document_stop - start, segment_length).to(tl.int32)
    # No state enters a document's first segment (reverse: last): only the others have a boundary.
    if REVERSE:
        outside = document_stop - start - count
    else:
        outside = start - document_start
        i_boundary -= 1
    return i_n, i_b, start, count, outside, i_boundary
