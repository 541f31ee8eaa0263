"""How a call's tokens are divided: over ranks into chunks, and on a rank into rows of one state.

A *chunk* is a contiguous range of the sequence on one rank (`lasp.shard`: one per rank, or two in
zigzag). A *row* is one independent sequence for `lasp.ops`, with one initial state: an entry of the
batch, or the part of a packed document in a chunk.

`BatchPartition`, `PackedPartition` and `BoundaryPartition` serve linear attention: they map states
[B, H, D, E] that cross chunks to rows [rows, H, D, E] and back. With `reverse` everything runs from
the end: what then enters a row is the gradient of the state after its last token.
`SoftmaxPartition` serves softmax attention: it says which queries see which keys.

Packed documents count by their index in the global sequence. A document begins in the chunk that
holds its first token; an empty one in the chunk that holds the next token, or in the last.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from lasp import shard
from lasp.context import CPContext
from lasp.ops.host_values import document_boundaries
from lasp.ops.sdpa import ScoreBlock

__all__ = [
    "BatchPartition",
    "BoundaryPartition",
    "PackedPartition",
    "SoftmaxPartition",
    "local_partition",
    "partition_documents",
]


@dataclass(frozen=True)
class BatchPartition:
    """A batch of sequences, [B, T, H, D] on this rank.

    In zigzag the two chunks along T become two neighbouring entries of the batch: a view.

    Attributes:
        chunk_lengths: tokens of each chunk.
    """

    chunk_lengths: tuple[int, ...]
    cu_seqlens = boundary_documents = None

    def only_boundaries(self) -> BatchPartition:
        """This partition for a call whose rows have no initial and no final states."""
        return self

    def state_rows(self, *, entering: bool, reverse: bool) -> tuple[int, ...] | None:
        """The rows that have a state, entering or leaving, for `lasp.ops`; None: all."""
        return None

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T, ...] as `lasp.ops` takes them: in zigzag [2B, T / 2, ...], each entry of
        the batch folded into its two chunks."""
        if len(self.chunk_lengths) == 1:
            return x
        return x.unflatten(1, (2, self.chunk_lengths[0])).flatten(0, 1)

    def unfold(self, y: torch.Tensor) -> torch.Tensor:
        """Undoes `fold`."""
        return y if len(self.chunk_lengths) == 1 else y.unflatten(0, (-1, 2)).flatten(1, 2)

    def state_out(self, rows: torch.Tensor, chunk: int, reverse: bool) -> torch.Tensor:
        """[B, H, D, E], the row whose state leaves the chunk."""
        return rows if len(self.chunk_lengths) == 1 else rows.unflatten(0, (-1, 2))[:, chunk]

    def stack(self, received: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor | None:
        """The states that entered this rank's chunks, as one tensor; None if none did.

        Args:
            received: [B, H, D, E] per chunk, or None.
            like: rows of states.
        """
        if len(received) == 1 or all(each is None for each in received):
            return received[0]
        some = next(each for each in received if each is not None)
        filled = [torch.zeros_like(some) if each is None else each for each in received]
        return torch.stack(filled, 1).flatten(0, 1)

    def rows_in(
        self, states: torch.Tensor | None, received: torch.Tensor | None, reverse: bool
    ) -> torch.Tensor | None:
        """Rows of the states that enter; None if none enters.

        Args:
            states: initial states [B, H, D, E], on the first rank; in reverse the gradients of
                this rank's final states.
            received: as `stack` returned it.
        """
        if states is not None and len(self.chunk_lengths) == 2:
            zeros = torch.zeros_like(states)
            states = torch.stack([zeros, states] if reverse else [states, zeros], 1).flatten(0, 1)
        if states is None or received is None:
            return states if received is None else received
        return states + received

    def final_states(self, rows: torch.Tensor, num_states: int, reverse: bool) -> torch.Tensor:
        """The final states (reverse: gradients of initial states) from the rows that leave."""
        chunk = 0 if reverse else len(self.chunk_lengths) - 1
        return self.state_out(rows, chunk, reverse).contiguous()

    def passes_through(self, chunk: int) -> bool:
        """True if a state that enters the chunk leaves it again, decayed."""
        return True

    def row_lengths(self) -> int:
        """Tokens of every row."""
        return self.chunk_lengths[0]


class Span(NamedTuple):
    """Rows and documents of one chunk: row start + i is a part of document first_document + i."""

    start: int
    stop: int
    first_document: int
    num_documents: int
    # True if a document crosses the chunk's left boundary, and its right one.
    continues: bool
    unfinished: bool
    # Number of leading rows that are the last part of their document on this rank: all rows, all
    # but the last if the rank's second chunk continues that document, or none if the chunk has no
    # tokens and lies inside a document.
    num_final: int


@dataclass(frozen=True)
class PackedPartition:
    """Documents packed into one row of tokens, [1, T, H, D] on this rank.

    Attributes:
        chunk_lengths: tokens of each chunk.
        cu_seqlens: boundaries of the rows among this rank's tokens.
        spans: the rows of each chunk.
        boundary_documents: for each boundary between chunks, the document that crosses it, or None.
    """

    chunk_lengths: tuple[int, ...]
    cu_seqlens: tuple[int, ...]
    spans: tuple[Span, ...]
    boundary_documents: tuple[int | None, ...]

    def only_boundaries(self) -> BoundaryPartition:
        return BoundaryPartition(
            self.chunk_lengths, self.cu_seqlens, self.spans, self.boundary_documents
        )

    def state_rows(self, *, entering: bool, reverse: bool) -> tuple[int, ...] | None:
        return None

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def unfold(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def state_out(self, rows: torch.Tensor, chunk: int, reverse: bool) -> torch.Tensor:
        span = self.spans[chunk]
        row = span.start if reverse else span.stop - 1
        return rows[row : row + 1]

    def stack(self, received: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        """[chunks, H, D, E], zeros where no state entered."""
        if any(each is None for each in received):
            zeros = like.new_zeros(1, *like.shape[1:])
            received = [zeros if each is None else each for each in received]
        return torch.cat(received)

    def rows_in(
        self, states: torch.Tensor | None, received: torch.Tensor | None, reverse: bool
    ) -> torch.Tensor | None:
        rows = states
        if states is not None and not self._rows_are_documents:
            rows = states.new_zeros(len(self.cu_seqlens) - 1, *states.shape[1:])
            for here, of_states in self._rows_and_documents(ending=reverse):
                rows[here] = states[of_states]
        if received is None or not any(self._receives(reverse)):
            return rows
        if rows is None:
            rows = received.new_zeros(len(self.cu_seqlens) - 1, *received.shape[1:])
        elif rows is states:
            rows = rows.clone()
        for i, receives in enumerate(self._receives(reverse)):
            if receives:
                row = self.spans[i].stop - 1 if reverse else self.spans[i].start
                rows[row] += received[i]
        return rows

    def final_states(self, rows: torch.Tensor, num_states: int, reverse: bool) -> torch.Tensor:
        if self._rows_are_documents:
            return rows
        states = rows.new_zeros(num_states, *rows.shape[1:])
        for here, of_states in self._rows_and_documents(ending=not reverse):
            states[of_states] = rows[here]
        return states

    def passes_through(self, chunk: int) -> bool:
        span = self.spans[chunk]
        return span.continues and span.unfinished and span.stop == span.start + 1

    def row_lengths(self) -> torch.Tensor:
        # Differences of integers: the boundaries may exceed what float32 tells apart.
        return torch.tensor(self.cu_seqlens).diff()

    @property
    def _rows_are_documents(self):
        return len(self.boundary_documents) == 2

    def _receives(self, reverse):
        """For each chunk, whether a state enters it."""
        return [span.unfinished if reverse else span.continues for span in self.spans]

    def _rows_and_documents(self, ending):
        """Slices (rows, documents) that begin on this rank, or that end what it holds of them."""
        for span in self.spans:
            skipped = 0 if ending else int(span.continues)
            count = (span.num_final if ending else span.num_documents) - skipped
            if count > 0:
                row, document = span.start + skipped, span.first_document + skipped
                yield slice(row, row + count), slice(document, document + count)


class BoundaryPartition(PackedPartition):
    """`PackedPartition` for a call without initial and final states: only the states that cross the
    boundaries of chunks exist, however many documents there are.

    Outgoing states have one row per chunk; incoming states have one extra row of zeros, shared by
    rows without an initial state.
    """

    def state_rows(self, *, entering: bool, reverse: bool) -> tuple[int, ...]:
        if entering != reverse:
            return tuple(span.start for span in self.spans)
        return tuple(span.stop - 1 for span in self.spans)

    def state_out(self, rows: torch.Tensor, chunk: int, reverse: bool) -> torch.Tensor:
        return rows[chunk : chunk + 1]

    def rows_in(
        self, states: torch.Tensor | None, received: torch.Tensor | None, reverse: bool
    ) -> torch.Tensor | None:
        assert states is None
        if received is None or not any(self._receives(reverse)):
            return None
        return torch.cat((received, received.new_zeros(1, *received.shape[1:])))


def local_partition(
    seq_len: int, cu_seqlens: torch.Tensor | None, context: CPContext
) -> BatchPartition | PackedPartition:
    """How this rank's `seq_len` tokens of a linear attention call are divided.

    Raises:
        ValueError: shard_lengths or cu_seqlens that do not fit this rank's tokens.
    """
    group, _, layout, lengths = context
    if group is None:
        boundaries = document_boundaries(cu_seqlens, seq_len)
        return _local_partition(seq_len, boundaries, None, 1, 0, "contiguous")
    boundaries = document_boundaries(cu_seqlens, None)
    return _local_partition(seq_len, boundaries, lengths, group.size(), group.rank(), layout)


# Keyed by numbers, so that it is right for every group of that size.
@lru_cache(maxsize=256)
def _local_partition(seq_len, boundaries, lengths, size, rank, layout):
    if lengths is None and boundaries is not None:
        lengths = shard.split_lengths(boundaries[-1], size, layout)
    if lengths is not None:
        _check_lengths(lengths, seq_len, rank, size, boundaries)
    if boundaries is not None:
        return partition_documents(boundaries, lengths, rank, layout)
    if layout == "contiguous":
        return BatchPartition((seq_len,))
    shard.chunk_boundaries((seq_len,), layout)
    return BatchPartition((seq_len // 2,) * 2)


def _check_lengths(lengths, seq_len, rank, size, boundaries):
    if len(lengths) != size:
        raise ValueError(
            f"shard_lengths has {len(lengths)} entries, the group {size} ranks: give the tokens of "
            "every rank, in group-rank order."
        )
    if lengths[rank] != seq_len:
        raise ValueError(
            f"rank {rank} of the group holds {seq_len} tokens, but its shard is {lengths[rank]}: "
            "with cu_seqlens the ranks hold lasp.shard.split_lengths of its last entry, unless "
            "shard_lengths says otherwise."
        )
    if boundaries is not None and sum(lengths) != boundaries[-1]:
        raise ValueError(
            f"shard_lengths are {sum(lengths)} tokens together, but cu_seqlens ends at "
            f"{boundaries[-1]}: it holds the boundaries of the global sequence."
        )


def partition_documents(
    cu_seqlens: tuple[int, ...], lengths: tuple[int, ...], rank: int, layout: str
) -> PackedPartition:
    """The part of packed documents that a rank holds.

    Args:
        cu_seqlens: boundaries of the documents in the global sequence, from 0 to its tokens.
        lengths: tokens of every rank; together as many.
    """
    boundaries = shard.chunk_boundaries(lengths, layout)
    assert boundaries[-1] == cu_seqlens[-1], (boundaries, cu_seqlens)
    crossing = tuple(_document_across(cu_seqlens, boundary) for boundary in boundaries)
    chunks = shard.chunks_of_rank(rank, len(lengths), layout)
    rows, spans, documents = [0], [], []
    for chunk in chunks:
        start, stop = boundaries[chunk], boundaries[chunk + 1]
        continues, unfinished = crossing[chunk] is not None, crossing[chunk + 1] is not None
        first = crossing[chunk] if continues else bisect_left(cu_seqlens, start)
        is_last = chunk + 2 == len(boundaries)
        end = len(cu_seqlens) - 1 if is_last else bisect_left(cu_seqlens, stop)
        # A chunk in which no document lies has one row without tokens.
        stops = [min(x, stop) for x in cu_seqlens[first + 1 : end + 1]] or [stop]
        shift, first_row = rows[-1] - start, len(rows) - 1
        rows += [x + shift for x in stops]
        # A document that only passes through an empty chunk has no tokens here, so it gets no final
        # state.
        num_final = 0 if continues and start == stop else end - first
        spans.append(
            Span(first_row, len(rows) - 1, first, end - first, continues, unfinished, num_final)
        )
        documents.append(range(first, end))
    if len(chunks) == 2 and documents[0] and documents[1] and documents[0][-1] == documents[1][0]:
        spans[0] = spans[0]._replace(num_final=spans[0].num_final - 1)
    chunk_lengths = tuple(boundaries[chunk + 1] - boundaries[chunk] for chunk in chunks)
    return PackedPartition(chunk_lengths, tuple(rows), tuple(spans), crossing)


def _document_across(cu_seqlens, boundary):
    """The document with tokens on both sides of a boundary, or None."""
    document = bisect_left(cu_seqlens, boundary) - 1
    inside = 0 <= document < len(cu_seqlens) - 1 and boundary < cu_seqlens[document + 1]
    return document if inside else None


class Chunk(NamedTuple):
    """Tokens that lie together in the global sequence and on one rank.

    Attributes:
        rank: the rank that holds them.
        rows: [start, stop) among the rank's keys.
        start: the first of them in the global sequence.
    """

    rank: int
    rows: tuple[int, int]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.rows[1] - self.rows[0]

    def rows_in(self, first: int, last: int) -> tuple[int, int] | None:
        """Its rows that lie in [first, last) of the global sequence, None if there are none."""
        start, stop = max(first, self.start), min(last, self.stop)
        shift = self.rows[0] - self.start
        return (start + shift, stop + shift) if start < stop else None


@dataclass(frozen=True)
class SoftmaxPartition:
    """Which queries see which keys, as integers that all ranks compute alike.

    Attributes:
        chunks: all of them, in the order of the global sequence.
        boundaries: document boundaries, or None.
        lengths: keys of every rank.
        rank: this one.
        past: keys here that come before the first query.
    """

    chunks: tuple[Chunk, ...]
    boundaries: tuple[int, ...] | None
    lengths: tuple[int, ...]
    rank: int
    past: int

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        num_queries: int,
        cu_seqlens: torch.Tensor | None,
        context: CPContext,
    ) -> SoftmaxPartition:
        """The partition of a call with `num_queries` queries here and `lengths` keys per rank."""
        group, lengths = context.group, tuple(lengths)
        # On one device the two chunks follow each other.
        layout = "contiguous" if group is None else context.layout
        rank = 0 if group is None else group.rank()
        boundaries, held = shard.chunk_boundaries(lengths, layout), {}
        for owner in range(len(lengths)):
            row = 0
            for chunk in shard.chunks_of_rank(owner, len(lengths), layout):
                stop = row + boundaries[chunk + 1] - boundaries[chunk]
                held[chunk] = Chunk(owner, (row, stop), boundaries[chunk])
                row = stop
        chunks = tuple(held[chunk] for chunk in sorted(held))
        documents = document_boundaries(cu_seqlens, boundaries[-1])
        return cls(chunks, documents, lengths, rank, lengths[rank] - num_queries)

    @property
    def repeats(self) -> bool:
        """True if lengths repeat over calls; False for packed documents or a growing past."""
        return self.boundaries is None and not self.past

    @property
    def exchanges(self) -> bool:
        """True if any rank needs keys of another one."""
        return any(any(self.span_read_by(rank)) for rank in range(len(self.lengths)))

    def local_blocks(self) -> list[ScoreBlock]:
        """Queries of this rank against keys of the same chunk."""
        blocks = []
        for chunk in self.chunks:
            start, stop = chunk.rows
            if chunk.rank != self.rank or stop - start <= self.past:
                continue
            queries = (0, stop - self.past)
            if self.past and queries == (0, 1):
                # The only query of a decoding step sees all keys: one block.
                blocks.append(ScoreBlock(queries, (0, stop), causal=False))
            elif self.past:
                blocks.append(ScoreBlock(queries, (0, self.past), causal=False))
                blocks.append(ScoreBlock(queries, (self.past, stop), causal=True))
            elif self.boundaries is None:
                blocks.append(ScoreBlock(chunk.rows, chunk.rows, causal=True))
            else:
                for document in pairwise(self.boundaries):
                    rows = chunk.rows_in(*document)
                    if rows is not None:
                        blocks.append(ScoreBlock(rows, rows, causal=True))
        return blocks

    def remote_blocks(self) -> list[ScoreBlock]:
        """Queries of this rank against keys of earlier chunks, which count from the first that this
        rank reads."""
        first = self.span_read_by(self.rank)[0]
        blocks = []
        for chunk in self.chunks:
            keys = self._earlier_keys(chunk)
            if chunk.rank != self.rank or keys is None:
                continue
            # Only the queries of a document that began before.
            start, stop = chunk.rows_in(keys[0], self._document_of(chunk)[1])
            queries = (max(start - self.past, 0), stop - self.past)
            if queries[0] < queries[1]:
                blocks.append(ScoreBlock(queries, (keys[0] - first, keys[1] - first), causal=False))
        return blocks

    def span_read_by(self, rank: int) -> tuple[int, int]:
        """The range of the sequence with all earlier keys that a rank needs; (0, 0): none."""
        spans = [self._earlier_keys(chunk) for chunk in self.chunks if chunk.rank == rank]
        spans = [span for span in spans if span is not None]
        return min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)

    def rows_read_by(self, reader: int, owner: int) -> list[tuple[Chunk, tuple[int, int]]]:
        """The owner's rows in the span that `reader` reads, chunk by chunk."""
        span = self.span_read_by(reader)
        held = [(chunk, chunk.rows_in(*span)) for chunk in self.chunks if chunk.rank == owner]
        return [(chunk, rows) for chunk, rows in held if rows is not None]

    def _earlier_keys(self, chunk: Chunk) -> tuple[int, int] | None:
        """The range before a chunk that its tokens need, if any."""
        first = self._document_of(chunk)[0]
        return (first, chunk.start) if first < chunk.start < chunk.stop else None

    def _document_of(self, chunk: Chunk) -> tuple[int, int]:
        """The document that holds the first token of a chunk."""
        if self.boundaries is None:
            return 0, self.chunks[-1].stop
        after = min(bisect_right(self.boundaries, chunk.start), len(self.boundaries) - 1)
        return self.boundaries[after - 1], self.boundaries[after]
