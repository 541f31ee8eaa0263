"""Causal softmax attention over the same shards, for the softmax layers of a hybrid (LASP-2H).

Where linear attention sends a state, softmax attention needs every earlier key and value: each rank
gathers them in one collective (arXiv 2502.07563) while it attends to its own tokens; then it
attends to the earlier ones and joins the two by log-sum-exp. Nothing of all tokens is kept for the
backward: it gathers keys and values again, under the same work on its own tokens, and sends each
rank the gradients of that rank's keys and values.

The forward is one operator (`lasp::softmax_attend`), opaque to torch.compile and to activation
checkpointing: a recomputation that keeps its outputs (see `parallel.recompute`) repeats neither the
collective nor the quadratic work.

Legend: B batch, T queries here, S keys here, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.distributed import ProcessGroup

from lasp.arguments import group_of, member_or_alone
from lasp.exchange import guard, tokens
from lasp.ops.documents import document_offsets
from lasp.ops.softmax import Piece, attend, attend_backward
from lasp.ops.strides import with_unit_stride
from lasp.shard import place_borders, places
from lasp.softmax_arguments import find_softmax_problem

__all__ = ["gather_past", "softmax_attention"]


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Causal softmax attention, over one device or many.

        o_t = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts,   w_ts = exp(scale * q_t . k_s)

    With `group` each rank passes its part of the sequence, and lengths may differ, and be zero. One
    all-gather brings the keys and values of all ranks, in their dtype (LASP-2H, arXiv 2502.07563);
    their gradients go back the same way, each in that dtype, and are summed in
    float32. No T x T matrix is stored; while it runs, each rank holds the keys and values of the
    global sequence (grouped heads make that H / G times less), in the backward also their
    gradients.

    Args:
        q: [B, T, H, D], bfloat16, float16 or float32 (on the CPU also float64); D in 1..256.
        k, v: [B, S, G, D], dtype of q. H is a multiple of G: key head g serves the H / G query
            heads from g * H / G on. S > T: the first S - T tokens are a past whose queries were
            answered before; those of q are the last.
        scale: factor on the scores; None: 1 / sqrt(D).
        cu_seqlens: int32 [N + 1], boundaries of packed documents in the global sequence (B must be
            1); tokens see their own document only. The same on all ranks. Best on the CPU.
        group: ranks over which the sequence is cut; None: it is all here.
        layout: "contiguous": parts in group-rank order. "zigzag": of 2P parts rank r holds parts r
            and 2P - 1 - r, one after the other and equally long, so that all ranks have the same
            work.
        shard_lengths: S of every rank, in group order. None: the ranks ask each other, from host
            to host, in every call.

    Returns:
        o [B, T, H, D] in the dtype of q.

    Raises:
        ValueError: on bad input, and on every rank of `group` if the ranks disagree.
    """
    if group is not None:
        group = member_or_alone(group)
    problem = find_softmax_problem(q, k, v, scale, cu_seqlens, group, layout, shard_lengths)
    if problem is not None:
        if group is not None:
            guard.compare(group, {}, problem=problem).confirm()
        raise ValueError(problem)
    o, _, _ = _SoftmaxAttention.apply(
        *(with_unit_stride(x) for x in (q, k, v)),
        cu_seqlens,
        1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        None if group is None else group.group_name,
        layout,
        None if shard_lengths is None or group is None else list(shard_lengths),
    )
    return o


@torch.no_grad()
def gather_past(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Keys and values [2, B, S', G, D] of all tokens up to this rank's last: what later tokens need
    as a past. Arguments as of `softmax_attention`; no gradient flows through it."""
    group = None if group is None else member_or_alone(group)
    if group is None:
        return torch.stack((k, v))
    lengths = shard_lengths or guard.gather_numbers(group, k.shape[1])
    plan = _Plan.of(group, lengths, layout, k, k, None)
    pending = tokens.gather_rows(_as_rows(k, v), plan.lengths, group)
    stop = max(place.stop for place in plan.places if place.rank == plan.rank)
    return _in_order(plan, pending, 0, stop).permute(1, 2, 0, 3, 4).contiguous()


class _SoftmaxAttention(torch.autograd.Function):
    """One node, so that every rank runs the collectives of both directions, in the same order."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, scale, needs_grad, group_name, layout, shard_lengths):
        o, lse, lengths = torch.ops.lasp.softmax_attend(
            q, k, v, cu_seqlens, scale, needs_grad, group_name, layout, shard_lengths
        )
        ctx.save_for_backward(q, k, v, cu_seqlens, o, lse, lengths)
        ctx.options = scale, group_name, layout
        ctx.mark_non_differentiable(lse, lengths)
        return o, lse, lengths

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, *_):
        grads = torch.ops.lasp.softmax_attend_backward(do, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None, None


torch.library.define(
    "lasp::softmax_attend",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool needs_grad, "
    "str? group_name, str layout, SymInt[]? shard_lengths) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lasp::softmax_attend_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor o, Tensor lse, "
    "Tensor lengths, float scale, str? group_name, str layout) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("lasp::softmax_attend", "CompositeExplicitAutograd")
def _attend(q, k, v, cu_seqlens, scale, needs_grad, group_name, layout, shard_lengths):
    """(o, lse [B, H, T], keys of every rank int64 [P] on the host)."""
    group = group_of(group_name)
    if group is not None:
        _agree(group, q, k, cu_seqlens, scale, needs_grad, layout, shard_lengths)
        lengths = shard_lengths or guard.gather_numbers(group, k.shape[1])
    else:
        lengths = [k.shape[1]]
    plan = _Plan.of(group, lengths, layout, q, k, cu_seqlens)
    common = dict(scale=scale, steady=plan.steady)
    pending = _start_gather(plan, k, v, group)
    o, lse = attend(q, k, v, plan.own_pieces(), **common)
    if pending is not None:
        rows = _in_order(plan, pending, *plan.span_read_by(plan.rank))
        keys, values = _keys_and_values(rows)
        attend(q, keys, values, plan.remote_pieces(), **common, joined=(o, lse))
    return o.contiguous(), lse.contiguous(), torch.tensor(lengths, dtype=torch.int64)


@torch.library.impl("lasp::softmax_attend_backward", "CompositeExplicitAutograd")
def _attend_backward(do, q, k, v, cu_seqlens, o, lse, lengths, scale, group_name, layout):
    """(dq, dk, dv)."""
    do = with_unit_stride(do)
    group = group_of(group_name)
    plan = _Plan.of(group, lengths.tolist(), layout, q, k, cu_seqlens)
    common = dict(scale=scale, steady=plan.steady)
    pending = _start_gather(plan, k, v, group)
    dq, dk, dv = attend_backward(do, q, k, v, o, lse, plan.own_pieces(), **common)
    if pending is not None:
        rows = _in_order(plan, pending, *plan.span_read_by(plan.rank))
        keys, values = _keys_and_values(rows)
        remote = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        into = (dq, *_keys_and_values(remote))
        attend_backward(do, q, keys, values, o, lse, plan.remote_pieces(), **common, into=into)
        del rows, keys, values
        dk, dv = _return_gradients(plan, remote, dk, dv, group)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@torch.library.register_fake("lasp::softmax_attend")
def _attend_fake(q, k, v, cu_seqlens, scale, needs_grad, group_name, layout, shard_lengths):
    B, T, H, _ = q.shape
    lse = q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    ranks = 1 if group_name is None else torch.distributed.get_world_size(group_of(group_name))
    return q.new_empty(q.shape), lse, torch.empty(ranks, dtype=torch.int64, device="cpu")


@torch.library.register_fake("lasp::softmax_attend_backward")
def _attend_backward_fake(do, q, k, v, cu_seqlens, o, lse, lengths, scale, group_name, layout):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@dataclass(frozen=True)
class _Place:
    """Tokens that lie together in the global sequence and on one rank.

    Attributes:
        rank: who holds them.
        rows: [start, stop) among the rank's keys.
        start: of the first of them in the global sequence.
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
class _Plan:
    """Who attends to what, as integers that all ranks compute alike.

    Attributes:
        places: all of them, in the order of the global sequence.
        offsets: document boundaries, or None.
        rank: this one.
        past: keys here that come before the first query.
    """

    places: tuple[_Place, ...]
    offsets: tuple[int, ...] | None
    lengths: tuple[int, ...]
    rank: int
    past: int

    @classmethod
    def of(cls, group, lengths, layout, q, k, cu_seqlens) -> _Plan:
        # Alone, a rank's two places follow each other.
        layout = "contiguous" if group is None else layout
        borders, held = place_borders(tuple(lengths), layout), {}
        for rank in range(len(lengths)):
            row = 0
            for place in places(rank, len(lengths), layout):
                stop = row + borders[place + 1] - borders[place]
                held[place] = _Place(rank, (row, stop), borders[place])
                row = stop
        return cls(
            places=tuple(held[place] for place in sorted(held)),
            offsets=document_offsets(cu_seqlens, borders[-1]),
            lengths=tuple(lengths),
            rank=0 if group is None else torch.distributed.get_rank(group),
            past=k.shape[1] - q.shape[1],
        )

    @property
    def steady(self) -> bool:
        """Whether lengths repeat from call to call: documents and a growing past do not."""
        return self.offsets is None and not self.past

    def own_pieces(self) -> list[Piece]:
        """Queries of this rank against keys of the same place."""
        pieces = []
        for place in self.places:
            start, stop = place.rows
            if place.rank != self.rank or stop - start <= self.past:
                continue
            queries = (0, stop - self.past)
            if self.past and queries == (0, 1):
                # The only query of a decoding step sees all keys: one piece.
                pieces.append(Piece(queries, (0, stop), causal=False))
            elif self.past:
                pieces.append(Piece(queries, (0, self.past), causal=False))
                pieces.append(Piece(queries, (self.past, stop), causal=True))
            elif self.offsets is None:
                pieces.append(Piece(place.rows, place.rows, causal=True))
            else:
                for document in pairwise(self.offsets):
                    rows = place.rows_in(*document)
                    if rows is not None:
                        pieces.append(Piece(rows, rows, causal=True))
        return pieces

    def remote_pieces(self) -> list[Piece]:
        """Queries of this rank against keys of earlier places; these count from the first that
        this rank reads."""
        first = self.span_read_by(self.rank)[0]
        pieces = []
        for place in self.places:
            keys = self._earlier_keys(place)
            if place.rank != self.rank or keys is None:
                continue
            # Only the queries of a document that began before.
            start, stop = place.rows_in(keys[0], self._document_of(place)[1])
            queries = (max(start - self.past, 0), stop - self.past)
            if queries[0] < queries[1]:
                pieces.append(Piece(queries, (keys[0] - first, keys[1] - first), causal=False))
        return pieces

    def span_read_by(self, rank: int) -> tuple[int, int]:
        """The part of the global sequence that holds all earlier keys a rank needs; (0, 0) if it
        needs none."""
        spans = [self._earlier_keys(place) for place in self.places if place.rank == rank]
        spans = [span for span in spans if span is not None]
        return min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)

    def rows_read_by(self, reader: int, owner: int) -> list[tuple[_Place, tuple[int, int]]]:
        """Which of the owner's rows lie in the span that a rank reads, place by place."""
        span = self.span_read_by(reader)
        held = [(place, place.rows_in(*span)) for place in self.places if place.rank == owner]
        return [(place, rows) for place, rows in held if rows is not None]

    def _earlier_keys(self, place: _Place) -> tuple[int, int] | None:
        """What the tokens of a place need of the global sequence before it, if anything."""
        first = self._document_of(place)[0]
        return (first, place.start) if first < place.start < place.stop else None

    def _document_of(self, place: _Place) -> tuple[int, int]:
        """The document that holds the first token of a place."""
        if self.offsets is None:
            return 0, self.places[-1].stop
        after = min(bisect_right(self.offsets, place.start), len(self.offsets) - 1)
        return self.offsets[after - 1], self.offsets[after]


def _start_gather(plan, k, v, group) -> tokens.PendingRows | None:
    """Begin to gather keys and values as rows [S, 2, B, G, D]; None if no rank needs another's."""
    if not any(any(plan.span_read_by(rank)) for rank in range(len(plan.lengths))):
        return None
    return tokens.gather_rows(_as_rows(k, v), plan.lengths, group)


def _in_order(plan, pending, first: int, last: int) -> torch.Tensor:
    """What was gathered of tokens [first, last) of the global sequence, [S', 2, B, G, D]."""
    of_rank = pending.finish()
    if len(plan.places) == len(of_rank) and len(set(plan.lengths)) == 1:
        # They lie in order and without gaps: no copy.
        return pending.rows[first:last]
    parts = [(place.rank, place.rows_in(first, last)) for place in plan.places]
    parts = [of_rank[rank][slice(*rows)] for rank, rows in parts if rows is not None]
    return torch.cat(parts) if parts else of_rank[0][:0]


def _return_gradients(plan, remote, dk, dv, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Send the gradients of other ranks' keys and values home; (dk, dv) with those that come.

    Args:
        remote: [S', 2, B, G, D], of the span that this rank reads.
        dk, dv: of this rank's keys and values, by the queries of the same place.
    """
    ranks = range(len(plan.lengths))
    first = plan.span_read_by(plan.rank)[0]
    read = [plan.rows_read_by(plan.rank, owner) for owner in ranks]
    starts = [
        (place.start + start - place.rows[0] - first, stop - start)
        for of_owner in read
        for place, (start, stop) in of_owner
    ]
    if starts != sorted(starts):
        # In the order of the ranks that own them; contiguous shards have it already.
        remote = torch.cat([remote.narrow(0, *each) for each in starts])
    sent = [sum(stop - start for _, (start, stop) in of_owner) for of_owner in read]
    expected = [[rows for _, rows in plan.rows_read_by(reader, plan.rank)] for reader in ranks]
    lengths = [sum(stop - start for start, stop in spans) for spans in expected]
    received = tokens.swap_rows(remote, sent, lengths, group)
    total = _as_rows(dk, dv).to(torch.promote_types(dk.dtype, torch.float32))
    for spans, rows in zip(expected, received, strict=True):
        done = 0
        for start, stop in spans:
            total[start:stop] += rows[done : done + stop - start]
            done += stop - start
    return tuple(x.to(dk.dtype) for x in _keys_and_values(total))


def _as_rows(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[S, 2, B, G, D]: what belongs to a token lies together."""
    return torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1)


def _keys_and_values(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [B, S, G, D] of rows [S, 2, B, G, D]."""
    return tuple(x.transpose(0, 1) for x in rows.unbind(1))


def _agree(group, q, k, cu_seqlens, scale, needs_grad, layout, shard_lengths) -> None:
    """Raise ValueError on every rank unless all ranks of the group call alike."""
    offsets = problem = None
    try:
        offsets = document_offsets(cu_seqlens, None)
    except ValueError as error:
        problem = str(error)
    call = {
        "batch, heads, key heads, head size": (q.shape[0], *q.shape[2:], k.shape[2]),
        "cu_seqlens": offsets,
        "dtype": q.dtype,
        "layout": layout,
        "scale": scale,
        "shard_lengths": None if shard_lengths is None else tuple(shard_lengths),
        "whether a gradient is needed": needs_grad,
    }
    # Confirmed before anything is gathered: a gathering of other sizes would hang.
    guard.compare(group, call, problem=problem).confirm()
