"""How the work is cut: tiles per kernel (a static table) and segments per document.

Nothing here is measured at run time. Every rank reads the same table, so every rank runs the same
kernels and the same inputs give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from lasp.ops.triton.tiles import DTYPES, MAX_CHUNK, MAX_HEAD_DIM

# How many programs of the scan, of 64 value columns each (the Hopper kernel's count twice, those of
# 256 columns four times), run at once on 132 multiprocessors. A sequence is cut into as many
# segments as fill these: more only add states to write and borders to cross. On an H200 the Hopper
# scan of 131,072 tokens, 16 heads of 128, takes 0.512 ms in 8 segments, 0.516 in 16, 0.549 in 64;
# with 256 keys 0.779 in 8, 0.776 in 16, 0.789 in 32.
SLOTS = 264
MULTIPROCESSORS = 132
# From so many values of q, k or v on, a launch more costs less than a launch that does more: one
# kernel combines the states of segments, and the Hopper scan is worth its slower launch. Forward
# and backward on an H200, above and below it: 0.046 and 0.094 ms at (1, 4096, 16, 128), else 0.053
# and 0.126; 0.057 and 0.133 at (1, 2048, 16, 256), else 0.096 and 0.255. At half of that the host
# is the slower in any case, and a call without the Hopper scan costs it 20 us less.
LARGE_VALUES = 2**23
# Shorter segments would move more bytes of states than of tokens.
MIN_SEGMENT = 256
# Documents differ in length: shorter segments even out what the multiprocessors get.
PACKED_SPLIT = 4


@dataclass(frozen=True)
class Launch:
    """One kernel's tile sizes: `key` and `value` block of the state, `chunk` tokens per step."""

    key: int
    value: int
    chunk: int
    num_warps: int
    num_stages: int


# Keyed by (key dim rounded up to 64, 128 or 256; bytes per element). Value dims are cut into
# blocks of `value`, so they need no key of their own. Four warps in 16-bit: more than one warpgroup
# hits a wait race in triton 3.6 (not in Gluon, where every wait and barrier is written out). Chunks
# of 64 in 16-bit: 32 rows would drop wgmma for mma.sync.
SCAN = {
    # 90% of the copy roofline on an H200 at (1, 32768, 32, 64) in 8 segments; two stages 73%.
    (64, 2): Launch(64, 64, 64, 4, 3),
    # Two programs on a multiprocessor, 65% of the copy roofline on an H200 at (1, 131072, 16, 128).
    # A third stage leaves room for one (43%), as do 128 values with 8 warps (46%); 32 values 42%.
    (128, 2): Launch(128, 64, 64, 4, 2),
    (256, 2): Launch(256, 64, 64, 4, 2),
    # Exact float32 products are plain FMAs, unrolled: larger tiles make ptxas give up on registers.
    (64, 4): Launch(64, 32, 16, 4, 1),
    # Eight warps are safe without wgmma, and avoid 450 bytes of spills.
    (128, 4): Launch(128, 16, 16, 8, 1),
    (256, 4): Launch(256, 16, 16, 8, 1),
}
STATE = {
    # A whole 64 x 64 state; the value block stays at 64 so that small E wastes little.
    (64, 2): Launch(64, 64, 64, 4, 3),
    # 128 x 128 reads k and v once for the usual head; 204 registers, no spills. With five stages a
    # program has a multiprocessor to itself: the forward takes 0.692 ms on an H200 at
    # (1, 131072, 16, 128), with four stages 0.736, with three 0.734.
    (128, 2): Launch(128, 128, 64, 4, 5),
    # Two key blocks read v twice, the second time from L2; one block of 256 would spill.
    (256, 2): Launch(128, 128, 64, 4, 3),
    (64, 4): Launch(64, 32, 32, 4, 1),
    (128, 4): Launch(64, 32, 32, 4, 1),
    (256, 4): Launch(64, 32, 32, 4, 1),
}
# Below LARGE_VALUES, and up to so many borders per document, the scan adds the states of earlier
# segments up itself, from L2.
MAX_FOLD = 15
# Elements of the state that one combine program carries through a document's segments: small, so
# that 16 heads of 128 x 128 still make 512 programs with several segments' loads in flight each.
COMBINE_BLOCK = 512


def scan_launch(key_dim: int, dtype: torch.dtype) -> Launch:
    """Tiles of the scan for operands of `key_dim` and `dtype`."""
    return SCAN[_dim_class(key_dim), _width(dtype)]


def state_launch(key_dim: int, value_dim: int, dtype: torch.dtype, num_states: int) -> Launch:
    """Tiles of the state kernel for `num_states` states [key_dim, value_dim] from `dtype`."""
    launch = STATE[_dim_class(key_dim), _width(dtype)]
    # Too few to fill the GPU: smaller tiles put more loads in flight, the second ones from L2.
    for smaller in ({"value": 64}, {"value": 64, "key": 64}):
        blocks = -(-key_dim // launch.key) * -(-value_dim // launch.value)
        if launch.key > 64 and num_states * blocks < MULTIPROCESSORS:
            launch = replace(launch, **smaller)
    return launch


def _dim_class(dim: int) -> int:
    assert 1 <= dim <= MAX_HEAD_DIM, dim
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def _width(dtype: torch.dtype) -> int:
    assert dtype in DTYPES, dtype
    return dtype.itemsize


class States(NamedTuple):
    """Which packed documents have a state that enters from outside, or whose total is wanted.

    Attributes:
        held: row i of the states is that of document held[i]; None: row n of document n.
        zeros: one row more, of zeros, is that of all other documents.
    """

    held: tuple[int, ...] | None = None
    zeros: bool = False

    def rows(self, num_documents: int) -> list[int]:
        """The row of every document; -1: none."""
        if self.held is None:
            return list(range(num_documents))
        rows = [len(self.held) if self.zeros else -1] * num_documents
        for row, document in enumerate(self.held):
            rows[document] = row
        return rows

    def num_rows(self, num_documents: int) -> int:
        """How many rows the states have."""
        return num_documents if self.held is None else len(self.held) + self.zeros


ALL, NONE = States(), States(held=())


@dataclass(frozen=True, eq=False)
class Plan:
    """How documents are cut into segments.

    Dense: each of `num_documents` batch rows has `segments_per_row` segments. Packed: `tables` on
    the host holds, in int64, one row (state, first token, document start, document stop, slot) per
    segment, the longest first: programs start in this order, and the short ones fill what the long
    ones leave. Then one row (first slot, slots, tokens in the last segment, state, 0) per document,
    the combined ones first. A document always has a segment, an empty document one without tokens.
    `state` is the document's row among `num_states` initial states or totals; -1: it has none.

    Segment states have a slot for every border between two segments, `num_slots` or fewer in all.
    It holds what one segment adds, and the scan sums over slots, if `folded`; otherwise all that
    crosses the border. A kernel of its own adds that up, and totals, in `num_combined` documents:
    of packed ones those that have more than one slot or a total.
    """

    num_documents: int
    num_states: int
    num_segments: int
    num_slots: int
    num_combined: int
    segment_length: int
    segments_per_row: int
    folded: bool
    tables: torch.Tensor | None

    @property
    def single(self) -> bool:
        """Whether every document is one segment, so that no segment state is ever read."""
        return self.num_segments == self.num_documents

    @property
    def packed(self) -> bool:
        return self.tables is not None

    def device_tables(
        self, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Copies of the segment and document tables on `device`, without waiting for them.

        The copy is per call on purpose: a cached one would belong to one stream, or to a graph.
        """
        if self.tables is None:
            return None, None
        tables = self.tables.to(device, non_blocking=True)
        return tables[: self.num_segments], tables[self.num_segments :]


def is_large(rows: int, key_dim: int, value_dim: int) -> bool:
    """Whether the GPU and not the host is what a call waits for; `rows`: tokens times heads."""
    return rows * max(key_dim, value_dim) >= LARGE_VALUES


@lru_cache(maxsize=1024)
def choose_segment_length(
    seq_len: int, num_documents: int, packed: bool, key_dim: int, value_dim: int, num_heads: int
) -> int:
    """Tokens per segment for documents of `seq_len` tokens each (packed: together).

    Depends on shapes alone, never on where packed documents begin, so that a traced graph holds
    for any documents. Symmetric in the two head dims: the backward swaps them and must agree.
    """
    # Value blocks of the scan with the fewer of them: both directions then have enough programs.
    programs = num_heads * -(-min(key_dim, value_dim) // 64) * (1 if packed else num_documents)
    rows = seq_len * num_heads * (1 if packed else num_documents)
    # The Triton scan of such wide heads, which has the small inputs, runs alone on its processor.
    alone = max(key_dim, value_dim) > 128 and not is_large(rows, key_dim, value_dim)
    segments = max(1, SLOTS // (2 if alone else 1) // max(programs, 1))
    if packed:
        segments *= PACKED_SPLIT
    length = -(-seq_len // segments)
    # Whole chunks, so that only the last segment has a short one.
    length = -(-length // MAX_CHUNK) * MAX_CHUNK
    return min(max(length, MIN_SEGMENT), max(seq_len, 1))


def segment_state_rows(
    seq_len: int, num_documents: int, packed: bool, key_dim: int, value_dim: int, num_heads: int
) -> int:
    """Rows of the segment states that `prefix_states` returns; 0 where a scan needs none."""
    length = choose_segment_length(seq_len, num_documents, packed, key_dim, value_dim, num_heads)
    return _num_slots(seq_len, num_documents, packed, length)


def make_plan(
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: tuple[int, ...] | None,
    segment_length: int | None = None,
    states: States = ALL,
) -> Plan:
    """Plan for k [B, T, H, D] and v [B, T, H, E]; `segment_length` overrides the chosen one."""
    batch, seq_len, num_heads, key_dim = k.shape
    if segment_length is None:
        num_documents = batch if offsets is None else len(offsets) - 1
        segment_length = choose_segment_length(
            seq_len, num_documents, offsets is not None, key_dim, v.shape[-1], num_heads
        )
    fold = not is_large(batch * seq_len * num_heads, key_dim, v.shape[-1])
    return _plan(batch, seq_len, offsets, segment_length, fold, k.is_cuda, states)


def make_single_plan(
    k: torch.Tensor, offsets: tuple[int, ...] | None, states: States = ALL
) -> Plan:
    """Plan of one segment per document for k [B, T, H, D]."""
    return _plan(k.shape[0], k.shape[1], offsets, k.shape[1], False, k.is_cuda, states)


def _num_slots(seq_len: int, num_documents: int, packed: bool, segment_length: int) -> int:
    borders = (seq_len - 1) // segment_length if seq_len else 0
    # Each border has a whole segment of its own before it, so packing documents adds none.
    return borders if packed else borders * num_documents


def _is_combined(document: tuple[int, ...]) -> bool:
    """Whether a document's row has more than one slot, or a state."""
    _, slots, _, state, _ = document
    return slots > 1 or state >= 0


@lru_cache(maxsize=256)
def _plan(
    batch: int,
    seq_len: int,
    offsets: tuple[int, ...] | None,
    segment_length: int,
    fold: bool,
    pinned: bool,
    states: States,
) -> Plan:
    segment_length = max(segment_length, 1)
    if offsets is None:
        slots = _num_slots(seq_len, batch, False, segment_length)
        per_row = max(1, -(-seq_len // segment_length))
        folded = fold and 2 <= per_row - 1 <= MAX_FOLD
        return Plan(
            num_documents=batch,
            num_states=batch,
            num_segments=batch * per_row,
            num_slots=slots,
            num_combined=batch,
            segment_length=segment_length,
            segments_per_row=per_row,
            folded=folded,
            tables=None,
        )
    assert batch == 1 and offsets[0] == 0 and offsets[-1] == seq_len, (batch, seq_len, offsets)
    segments: list[tuple[int, ...]] = []
    documents: list[tuple[int, ...]] = []
    state_rows = states.rows(len(offsets) - 1)
    for document, (start, stop) in enumerate(itertools.pairwise(offsets)):
        assert start <= stop, offsets
        count = max(1, -(-(stop - start) // segment_length))
        last = stop - start - (count - 1) * segment_length
        slot, state = len(segments) - document, state_rows[document]
        documents.append((slot, count - 1, last, state, 0))
        segments += [
            (state, start + i * segment_length, start, stop, slot + i) for i in range(count)
        ]
    segments.sort(key=lambda row: min(row[3] - row[1], segment_length), reverse=True)
    documents.sort(key=_is_combined, reverse=True)
    tables = torch.tensor(segments + documents, dtype=torch.int64).view(-1, 5)
    if pinned:
        # A copy from pageable memory would make the host wait.
        tables = tables.pin_memory()
    return Plan(
        num_documents=len(documents),
        num_states=states.num_rows(len(documents)),
        num_segments=len(segments),
        num_slots=_num_slots(seq_len, len(documents), True, segment_length),
        num_combined=sum(map(_is_combined, documents)),
        segment_length=segment_length,
        segments_per_row=0,
        folded=False,
        tables=tables,
    )
