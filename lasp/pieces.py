"""A rank's tokens as pieces of the sequence, and its states as rows.

A *piece* is what one place of the sequence (`lasp.shard`) holds: all tokens of a rank, or in zigzag
the first and the second half of them. A *row* is what `lasp.ops` starts from one state: an entry of
the batch, or a packed document as far as it lies in a piece. States at borders between ranks are
lists with one entry [B, H, D, E] per piece; states inside are tensors [rows, H, D, E].

`Dense`, `Packed` and `Edges` answer the same questions: how the operator sees the tokens, which
state leaves a piece, and which row a state enters. With `reverse` everything runs from the end:
what then enters a row is the gradient of the state after its last token.

Packed documents count by their index in the global sequence. A document begins in the place that
holds its first token; an empty one in the place that holds the next token, or in the last.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from lasp import shard

__all__ = ["Dense", "Edges", "Packed", "cut_documents", "stacked"]


@dataclass(frozen=True)
class Dense:
    """A batch of sequences, [B, T, H, D] on this rank.

    In zigzag the two halves along T become two entries of the batch next to each other: a view.

    Attributes:
        lengths: tokens of each piece.
    """

    lengths: tuple[int, ...]
    offsets = crossing = None

    def at_edges(self) -> Dense:
        """These pieces, where nobody outside gives or takes the states of their rows."""
        return self

    def held(self, entering: bool, reverse: bool) -> tuple[int, ...] | None:
        """The rows that have a state, entering or leaving, for `lasp.ops`; None: all."""
        return None

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T, ...] as `lasp.ops` is to see them."""
        if len(self.lengths) == 1:
            return x
        return x.unflatten(1, (2, self.lengths[0])).flatten(0, 1)

    def unfold(self, y: torch.Tensor) -> torch.Tensor:
        """Undo `fold`."""
        return y if len(self.lengths) == 1 else y.unflatten(0, (-1, 2)).flatten(1, 2)

    def leaving(self, rows: torch.Tensor, piece: int, reverse: bool) -> torch.Tensor:
        """[B, H, D, E] of the row by which a state leaves the piece."""
        return rows if len(self.lengths) == 1 else rows.unflatten(0, (-1, 2))[:, piece]

    def given(self, states: torch.Tensor | None, reverse: bool) -> torch.Tensor | None:
        """Rows of the states that enter from outside: initial states [B, H, D, E], on the first
        rank, or the gradients of its final states, on any; None: there are none."""
        if states is None or len(self.lengths) == 1:
            return states
        nothing = torch.zeros_like(states)
        return torch.stack([nothing, states] if reverse else [states, nothing], 1).flatten(0, 1)

    def entering(
        self,
        given: torch.Tensor | None,
        received: list[torch.Tensor | None],
        reverse: bool,
    ) -> torch.Tensor | None:
        """Rows of all states that enter: those given, and one received per piece or None.

        None where nothing enters at all.
        """
        if all(each is None for each in received):
            return given
        if len(self.lengths) > 1:
            some = next(each for each in received if each is not None)
            received = [torch.zeros_like(some) if each is None else each for each in received]
            received = [torch.stack(received, 1).flatten(0, 1)]
        return received[0] if given is None else given + received[0]

    def taken(self, rows: torch.Tensor, num_states: int, reverse: bool) -> torch.Tensor:
        """The rows of the states that leave: final states, or the gradients of initial ones."""
        return self.leaving(rows, 0 if reverse else len(self.lengths) - 1, reverse).contiguous()

    def passes(self, piece: int) -> bool:
        """Whether what enters the piece leaves it again, decayed."""
        return True

    def row_lengths(self) -> int:
        """Tokens of every row."""
        return self.lengths[0]


class Span(NamedTuple):
    """Rows and documents of one piece: row start + i is a part of document first_document + i."""

    start: int
    stop: int
    first_document: int
    num_documents: int
    # Whether a document crosses the piece's left border, and its right one.
    begun: bool
    unfinished: bool
    # The first so many rows end what this rank holds of their document: all of them, or all but
    # the last, where the rank's second piece goes on with it, or none of a piece without tokens
    # that lies inside a document.
    num_final: int


@dataclass(frozen=True)
class Packed:
    """Documents packed into one row of tokens, [1, T, H, D] on this rank.

    Attributes:
        lengths: tokens of each piece.
        offsets: boundaries of the rows among this rank's tokens.
        spans: the rows of each piece.
        crossing: for each border between places, the document that crosses it, or None.
    """

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    spans: tuple[Span, ...]
    crossing: tuple[int | None, ...]

    def at_edges(self) -> Edges:
        return Edges(self.lengths, self.offsets, self.spans, self.crossing)

    def held(self, entering: bool, reverse: bool) -> tuple[int, ...] | None:
        return None

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def unfold(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def leaving(self, rows: torch.Tensor, piece: int, reverse: bool) -> torch.Tensor:
        span = self.spans[piece]
        row = span.start if reverse else span.stop - 1
        return rows[row : row + 1]

    def given(self, states: torch.Tensor | None, reverse: bool) -> torch.Tensor | None:
        if states is None or self._whole:
            return states
        rows = self._zeros(states)
        for mine, theirs in self._outer(reverse):
            rows[mine] = states[theirs]
        return rows

    def entering(
        self,
        given: torch.Tensor | None,
        received: list[torch.Tensor | None],
        reverse: bool,
    ) -> torch.Tensor | None:
        some = [each for each in received if each is not None]
        if not some:
            return given
        rows = self._zeros(some[0]) if given is None else given.clone()
        for span, each in zip(self.spans, received, strict=True):
            if each is not None:
                row = span.stop - 1 if reverse else span.start
                rows[row : row + 1] += each
        return rows

    def taken(self, rows: torch.Tensor, num_states: int, reverse: bool) -> torch.Tensor:
        if self._whole:
            return rows
        states = rows.new_zeros(num_states, *rows.shape[1:])
        for mine, theirs in self._outer(not reverse):
            states[theirs] = rows[mine]
        return states

    def passes(self, piece: int) -> bool:
        span = self.spans[piece]
        return span.begun and span.unfinished and span.stop == span.start + 1

    def row_lengths(self) -> torch.Tensor:
        # Differences as integers: offsets may exceed what float32 tells apart.
        return torch.tensor(self.offsets).diff()

    @property
    def _whole(self):
        """Whether rows are the documents."""
        return len(self.crossing) == 2

    def _zeros(self, states):
        return states.new_zeros(len(self.offsets) - 1, *states.shape[1:])

    def _outer(self, reverse):
        """(rows, documents) that begin here; with `reverse`, that end what is here of them."""
        for span in self.spans:
            skipped = int(span.begun and not reverse)
            count = (span.num_final if reverse else span.num_documents) - skipped
            if count > 0:
                row, document = span.start + skipped, span.first_document + skipped
                yield slice(row, row + count), slice(document, document + count)


class Edges(Packed):
    """`Packed` where no states come from outside, and none are asked for: those alone exist that
    cross the borders of pieces, however many documents there are.

    States that leave have a row for each piece; those that enter one more, of zeros, for all rows
    that start from nothing.
    """

    def held(self, entering: bool, reverse: bool) -> tuple[int, ...]:
        if entering != reverse:
            return tuple(span.start for span in self.spans)
        return tuple(span.stop - 1 for span in self.spans)

    def leaving(self, rows: torch.Tensor, piece: int, reverse: bool) -> torch.Tensor:
        return rows[piece : piece + 1]

    def entering(
        self,
        given: torch.Tensor | None,
        received: list[torch.Tensor | None],
        reverse: bool,
    ) -> torch.Tensor | None:
        assert given is None
        some = next((each for each in received if each is not None), None)
        if some is None:
            return None
        return stacked([*received, None], some)


def stacked(states: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """Rows of states [1, H, D, E], of zeros for None; `like` has states of the same sizes."""
    zeros = None
    if any(each is None for each in states):
        zeros = like.new_zeros(1, *like.shape[1:])
    return torch.cat([zeros if each is None else each for each in states])


@lru_cache(maxsize=256)
def cut_documents(
    offsets: tuple[int, ...], lengths: tuple[int, ...], rank: int, layout: str
) -> Packed:
    """The part of packed documents that a rank holds.

    Args:
        offsets: boundaries of the documents in the global sequence, from 0 to its tokens.
        lengths: tokens of every rank; together as many.
    """
    borders = shard.place_borders(lengths, layout)
    assert borders[-1] == offsets[-1], (borders, offsets)
    crossing = tuple(_document_across(offsets, border) for border in borders)
    held = shard.places(rank, len(lengths), layout)
    rows, spans, documents = [0], [], []
    for place in held:
        start, stop = borders[place], borders[place + 1]
        begun, unfinished = crossing[place] is not None, crossing[place + 1] is not None
        first = crossing[place] if begun else bisect_left(offsets, start)
        is_last = place + 2 == len(borders)
        end = len(offsets) - 1 if is_last else bisect_left(offsets, stop)
        # A piece in which no document lies has one row without tokens.
        stops = [min(x, stop) for x in offsets[first + 1 : end + 1]] or [stop]
        shift, first_row = rows[-1] - start, len(rows) - 1
        rows += [x + shift for x in stops]
        # What only passes through an empty piece has no token here that a final state comes after.
        num_final = 0 if begun and start == stop else end - first
        spans.append(
            Span(first_row, len(rows) - 1, first, end - first, begun, unfinished, num_final)
        )
        documents.append(range(first, end))
    if len(held) == 2 and documents[0] and documents[1] and documents[0][-1] == documents[1][0]:
        spans[0] = spans[0]._replace(num_final=spans[0].num_final - 1)
    pieces = tuple(borders[place + 1] - borders[place] for place in held)
    return Packed(pieces, tuple(rows), tuple(spans), crossing)


def _document_across(offsets, border):
    """The document with tokens on both sides of a border, or None."""
    document = bisect_left(offsets, border) - 1
    inside = 0 <= document < len(offsets) - 1 and border < offsets[document + 1]
    return document if inside else None
