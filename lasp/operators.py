"""Lightning attention as operators of torch: opaque to torch.compile and to checkpointing.

    lasp::enter    the local state of k, v; the exchange; the state that enters this rank
    lasp::start, lasp::finish    the same in two, for work in between
    lasp::attend   one pass over q, k, v from that state, writing o once
    lasp::attend_backward   the local gradient of the state, its exchange in the other direction
                   with dq computed meanwhile, then dk and dv

`enter`, `attend` and `attend_backward` of this module are what these operators run, for a caller at
whom nobody looks: torch's dispatcher costs the host microseconds per call.

Arithmetic (`lasp.ops`) and exchange (`lasp.exchange`) meet here and nowhere else. What `enter`,
`start` and `finish` return is small; a recomputation that keeps it (see `parallel.recompute`)
communicates nothing.

The last four arguments of each say where the tokens are: `where` = (name of the group or None,
method of exchange, layout, tokens of every rank or None).
"""

from __future__ import annotations

import itertools
import weakref
from functools import lru_cache

import torch

from lasp import exchange as exchanges
from lasp import ops, shard
from lasp.arguments import group_of, state_dtype
from lasp.exchange import AffineMap, Line
from lasp.ops.documents import decay_rates, document_offsets
from lasp.ops.strides import with_unit_stride
from lasp.pieces import Dense, Packed, cut_documents, stacked

__all__ = ["attend", "attend_backward", "enter"]

# exp of anything less is zero.
_UNDERFLOW = {torch.float32: -104.0, torch.float64: -746.0}
# Exchanges between `start` and `finish`, by ticket.
_started: dict[int, _Entering] = {}
_tickets = itertools.count()

_WHERE = "str? group_name, str method, str layout, int[]? shard_lengths"
_ENTER = (
    "(Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    f"float scale, bool with_final, bool needs_grad, {_WHERE})"
)
torch.library.define("lasp::enter", f"{_ENTER} -> (Tensor, Tensor, Tensor)")
torch.library.define("lasp::start", f"{_ENTER} -> (Tensor, Tensor)")
torch.library.define(
    "lasp::finish",
    "(Tensor ticket, Tensor k, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, "
    f"bool with_final, {_WHERE}) -> (Tensor, Tensor)",
)
torch.library.define(
    "lasp::attend",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor entering, "
    f"Tensor segment_states, Tensor? cu_seqlens, float scale, {_WHERE}) -> Tensor",
)
torch.library.define(
    "lasp::attend_backward",
    "(Tensor do, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
    "Tensor? initial_state, Tensor entering, Tensor segment_states, Tensor? cu_seqlens, "
    f"float scale, bool with_dkv, bool with_dinitial, {_WHERE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


class _Entering:
    """The state that enters this rank, on its way.

    Everything of `enter` that comes before the first wait happens in the constructor, the rest in
    `finish`.
    """

    def __init__(
        self, k, v, log_decay, initial_state, cu_seqlens, scale, with_final, needs_grad, *where
    ):
        group, method, layout, lengths = _resolve(where)
        if group is None:
            decay_rates(log_decay)
            self.pieces = _pieces(k, cu_seqlens, None, layout, lengths)
        else:
            self.pieces, rates, comparison = _compare(
                group, k, v, log_decay, cu_seqlens, scale, needs_grad, method, layout, lengths
            )
        self.log_decay, self.with_final = log_decay, with_final
        self.num_states = _num_states(k, cu_seqlens)
        self.pending = self.total = self.given = None
        self.segment_states = _empty(k)
        if initial_state is None and not with_final:
            self.pieces = self.pieces.at_edges()
        k, v = self.pieces.fold(k), self.pieces.fold(v)
        with_total = group is not None or with_final
        if with_total or ops.needs_segment_states(k, v, cu_seqlens=self.pieces.offsets):
            self.segment_states, self.total = ops.chunk_states(
                k,
                v,
                log_decay,
                cu_seqlens=self.pieces.offsets,
                state_rows=self.pieces.held(False, False),
                with_total=with_total,
            )
            if self.segment_states is None:
                self.segment_states = _empty(k)
        if with_total:
            self.given = self.pieces.given(initial_state, False)
        if group is not None:
            comparison.confirm()
            line = Line(group, layout, False, self.pieces.crossing, ops.send_recv_state)
            self.pending = _cross(
                self.pieces, self.total, self.given, log_decay, rates, line, method
            )

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what `_entering_rows` needs, state after the last token); see `enter`."""
        compact = final = None
        entering = self.given
        if self.pending is not None:
            received = self.pending.finish()
            packed = isinstance(self.pieces, Packed)
            if packed:
                compact = stacked(received, self.total)
            if self.with_final or not packed:
                entering = self.pieces.entering(self.given, received, False)
            if not packed and entering is not None:
                # An operator may not return its own input.
                compact = entering.clone() if entering is self.given else entering
        if self.with_final:
            rows = self.total
            if entering is not None:
                decay = _decay_over(self.log_decay, self.pieces.row_lengths(), rows)
                rows = torch.addcmul(rows, decay, entering)
            elif self.pending is not None:
                # NCCL may still be reading it, and what is returned may be written to.
                rows = rows.clone()
            final = self.pieces.taken(rows, self.num_states, False)
        if compact is None:
            compact = self.segment_states.new_empty(0)
        return compact, final


def enter(*arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(entering state, states at the borders of segments, state after the last token).

    What is not there is an empty tensor: the entering state without a group, or where nothing ever
    enters a batch of sequences; the segment states where one pass needs none. The final state is
    None where it is not asked for (the operator's is empty). The entering state is one row per
    sequence and piece, initial states included; or, of packed documents, what each piece received.
    """
    state = _Entering(*arguments)
    entering, final_state = state.finish()
    return entering, state.segment_states, final_state


@torch.library.impl("lasp::enter", "CompositeExplicitAutograd")
def _enter(*arguments):
    return _or_empty(*enter(*arguments))


@torch.library.impl("lasp::start", "CompositeExplicitAutograd")
def _start(*arguments):
    """(segment states, ticket for `finish`: an int64 scalar on the CPU)."""
    state = _Entering(*arguments)
    number = next(_tickets)
    _started[number] = state
    ticket = torch.tensor(number)
    # Nobody can attend any more, as after an exception: what came is not kept.
    weakref.finalize(ticket, _started.pop, number, None)
    return state.segment_states, ticket


@torch.library.impl("lasp::finish", "CompositeExplicitAutograd")
def _finish(ticket, k, v, initial_state, cu_seqlens, with_final, *where):
    """(entering state, final state) of what `start` began, once."""
    state = _started.pop(int(ticket), None)
    if state is None:
        raise ValueError("a started state can be attended to once: call start_state again.")
    return _or_empty(*state.finish())


def attend(q, k, v, log_decay, initial_state, entering, segment_states, cu_seqlens, scale, *where):
    """o [B, T, H, E] from what `enter` returned."""
    group, _, layout, lengths = _resolve(where)
    pieces = _pieces(q, cu_seqlens, group, layout, lengths)
    before, held = _entering_rows(pieces, initial_state, entering)
    o = ops.scan(
        *(pieces.fold(x) for x in (q, k, v)),
        log_decay,
        scale=scale,
        initial_state=before,
        segment_states=_present(segment_states),
        cu_seqlens=pieces.offsets,
        state_rows=held,
    )
    return pieces.unfold(o)


torch.library.impl("lasp::attend", "CompositeExplicitAutograd", attend)


def attend_backward(
    do,
    dfinal,
    q,
    k,
    v,
    log_decay,
    initial_state,
    entering,
    segment_states,
    cu_seqlens,
    scale,
    with_dkv,
    with_dinitial,
    *where,
):
    """(dq, dk, dv, gradient of initial_state); None (the operator's: empty) where not asked for."""
    group, method, layout, lengths = _resolve(where)
    pieces = _pieces(q, cu_seqlens, group, layout, lengths)
    num_states = _num_states(q, cu_seqlens)
    q, k, v, do = (pieces.fold(x) for x in (q, k, v, with_unit_stride(do)))
    common = dict(scale=scale, cu_seqlens=pieces.offsets)
    segment_grads = pending = given = dinitial = None
    after = pieces.at_edges() if dfinal is None and not with_dinitial else pieces
    if with_dkv:
        with_total = group is not None or with_dinitial
        if with_total or ops.needs_segment_states(q, do, cu_seqlens=pieces.offsets):
            segment_grads, total = ops.chunk_states(
                q,
                do,
                log_decay,
                state_rows=after.held(False, True),
                reverse=True,
                with_total=with_total,
                **common,
            )
        given = after.given(dfinal, True)
        if group is not None:
            line = Line(group, layout, True, pieces.crossing, ops.send_recv_state)
            rates = decay_rates(log_decay)
            pending = _cross(after, total, given, log_decay, rates, line, method)

    # dq needs the saved state only: it runs while the gradient of the state travels.
    before, held = _entering_rows(pieces, initial_state, entering)
    dq = ops.scan(
        do,
        v,
        k,
        log_decay,
        initial_state=_transposed(before),
        segment_states=_transposed(_present(segment_states)),
        state_rows=held,
        **common,
    )
    dq = pieces.unfold(dq)
    if not with_dkv:
        return dq, None, None, None

    leaving = given
    if pending is not None:
        leaving = after.entering(given, pending.finish(), True)
    if with_dinitial:
        if leaving is not None:
            decay = _decay_over(log_decay, pieces.row_lengths(), total)
            total = torch.addcmul(total, decay, leaving)
        dinitial = pieces.taken(total, num_states, True)
    held = None if leaving is None else after.held(True, True)
    states = dict(initial_state=leaving, segment_states=_present(segment_grads), state_rows=held)
    dk, dv = ops.scan_dkdv(q, k, v, do, log_decay, **states, **common)
    return dq, pieces.unfold(dk), pieces.unfold(dv), dinitial


@torch.library.impl("lasp::attend_backward", "CompositeExplicitAutograd")
def _attend_backward(*arguments):
    dq, dk, dv, dinitial = attend_backward(*arguments)
    dinitial = _empty(dq) if dinitial is None else dinitial
    return *_or_empty(dq, dk, dv), dinitial


@torch.library.register_fake("lasp::enter")
def _enter_fake(k, v, log_decay, initial_state, cu_seqlens, scale, with_final, needs_grad, *where):
    entering, final_state = _fake_states(k, v, initial_state, cu_seqlens, with_final, where)
    return entering, _fake_segment_states(k, v, cu_seqlens, where), final_state


@torch.library.register_fake("lasp::start")
def _start_fake(k, v, log_decay, initial_state, cu_seqlens, scale, with_final, needs_grad, *where):
    ticket = torch.empty((), dtype=torch.int64, device="cpu")
    return _fake_segment_states(k, v, cu_seqlens, where), ticket


@torch.library.register_fake("lasp::finish")
def _finish_fake(ticket, k, v, initial_state, cu_seqlens, with_final, *where):
    return _fake_states(k, v, initial_state, cu_seqlens, with_final, where)


@torch.library.register_fake("lasp::attend")
def _attend_fake(
    q, k, v, log_decay, initial_state, entering, segment_states, cu_seqlens, scale, *where
):
    return v.new_empty(v.shape)


@torch.library.register_fake("lasp::attend_backward")
def _attend_backward_fake(
    do,
    dfinal,
    q,
    k,
    v,
    log_decay,
    initial_state,
    entering,
    segment_states,
    cu_seqlens,
    scale,
    with_dkv,
    with_dinitial,
    *where,
):
    state = (_num_states(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3])
    dinitial = q.new_empty(state if with_dinitial else (0,), dtype=state_dtype(q.dtype))
    dk, dv = (x.new_empty(x.shape if with_dkv else (0,)) for x in (k, v))
    return q.new_empty(q.shape), dk, dv, dinitial


def _fake_states(k, v, initial_state, cu_seqlens, with_final, where):
    group, _, layout, _ = _resolve(where)
    pieces = 2 if layout == "zigzag" else 1
    shape = (k.shape[2], k.shape[3], v.shape[3])
    entering, final_state = _empty(k), _empty(k)
    starts = group is not None and group.rank() == 0 and layout == "contiguous"
    nothing_enters = starts and cu_seqlens is None and initial_state is None
    if group is not None and not nothing_enters:
        rows = pieces * (1 if cu_seqlens is not None else k.shape[0])
        entering = entering.new_empty(rows, *shape)
    if with_final:
        final_state = final_state.new_empty(_num_states(k, cu_seqlens), *shape)
    return entering, final_state


def _fake_segment_states(k, v, cu_seqlens, where):
    group_name, _, layout, _ = where
    if group_name is not None and layout == "zigzag" and cu_seqlens is None:
        pieces = Dense((k.shape[1] // 2,) * 2)
        k, v = pieces.fold(k), pieces.fold(v)
    return ops.fake_segment_states(k, v, cu_seqlens)


def _resolve(where):
    group_name, *rest = where
    return group_of(group_name), *rest


def _pieces(x, cu_seqlens, group, layout, lengths) -> Dense | Packed:
    """How this rank's tokens are cut; ValueError where the cut does not fit them."""
    seq_len = x.shape[1]
    if group is None:
        offsets = document_offsets(cu_seqlens, seq_len)
        return _cut(seq_len, offsets, None, 1, 0, "contiguous")
    lengths = None if lengths is None else tuple(lengths)
    offsets = document_offsets(cu_seqlens, None)
    return _cut(seq_len, offsets, lengths, group.size(), group.rank(), layout)


# By numbers, so that it is right for every group of that size.
@lru_cache(maxsize=256)
def _cut(seq_len, offsets, lengths, size, rank, layout):
    if lengths is None and offsets is not None:
        lengths = shard.split_lengths(offsets[-1], size, layout)
    if lengths is not None:
        _check_lengths(lengths, seq_len, rank, size, offsets)
    if offsets is not None:
        return cut_documents(offsets, lengths, rank, layout)
    if layout == "contiguous":
        return Dense((seq_len,))
    shard.place_borders((seq_len,), layout)
    return Dense((seq_len // 2,) * 2)


def _check_lengths(lengths, seq_len, rank, size, offsets):
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
    if offsets is not None and sum(lengths) != offsets[-1]:
        raise ValueError(
            f"shard_lengths are {sum(lengths)} tokens together, but cu_seqlens ends at "
            f"{offsets[-1]}: it holds the boundaries of the global sequence."
        )


def _compare(
    group, k, v, log_decay, cu_seqlens, scale, needs_grad, method, layout, lengths
) -> tuple[Dense | Packed, tuple[float, ...] | None, exchanges.guard.Comparison]:
    """This rank's pieces, its decay as floats, and a comparison under way: do all ranks call alike?

    Local lengths are no part of it, unless every rank has to know them all: they may differ.
    """
    rates = offsets = pieces = problem = None
    try:
        rates = decay_rates(log_decay)
        offsets = document_offsets(cu_seqlens, None)
        pieces = _pieces(k, cu_seqlens, group, layout, lengths)
    except ValueError as error:
        problem = str(error)
    B, _, *sizes = k.shape
    lengths = None if lengths is None else tuple(lengths)
    sizes = (B, *sizes, v.shape[-1])
    call = _call(sizes, k.dtype, method, layout, lengths, offsets, rates, scale, needs_grad)
    comparison = exchanges.guard.compare(group, call, problem=problem)
    if problem is not None:
        comparison.confirm()
    return pieces, rates, comparison


# Of values, never of tensors: a decay that was changed in place is another call.
@lru_cache(maxsize=256)
def _call(sizes, dtype, method, layout, lengths, offsets, rates, scale, needs_grad):
    return exchanges.guard.Call(
        {
            "batch, heads, size of k and v": sizes,
            "dtype": dtype,
            "exchange": method,
            "layout": layout,
            "shard_lengths": lengths,
            "cu_seqlens": offsets,
            "log_decay": rates,
            "scale": scale,
            "whether gradients of k and v are needed": needs_grad,
        }
    )


def _cross(pieces, total, given, log_decay, rates, line, method) -> exchanges.Pending:
    """Start the exchange of what leaves the pieces, with all that is known here worked in.

    total, given: rows of this rank's own states, and of those that enter from outside or None.
    rates: `decay_rates` of log_decay.
    """
    leaving = total
    if given is not None:
        decay = _decay_over(log_decay, pieces.row_lengths(), total)
        leaving = torch.addcmul(total, decay, given)
    maps = []
    for i, length in enumerate(pieces.lengths):
        forgets = rates is not None and max(rates) * length < _UNDERFLOW[total.dtype]
        local = pieces.leaving(leaving, i, line.reverse)
        maps.append(AffineMap(local, log_decay, length, pieces.passes(i) and not forgets))
    return exchanges.start(maps, line, method=method)


def _entering_rows(pieces, initial_state, entering):
    """(states that enter, of which rows they are), for `ops.scan`, from what `enter` returned."""
    if not entering.numel():
        return initial_state, None
    if isinstance(pieces, Dense):
        return entering, None
    if initial_state is None:
        pieces = pieces.at_edges()
    received = [entering[i : i + 1] if span.begun else None for i, span in enumerate(pieces.spans)]
    rows = pieces.entering(pieces.given(initial_state, False), received, False)
    return rows, None if rows is None else pieces.held(True, False)


def _decay_over(log_decay, lengths: int | torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """exp(log_decay * n) for n tokens, [H, 1, 1], or for the lengths of rows, [rows, H, 1, 1]."""
    if log_decay is None:
        return states.new_ones(states.shape[1], 1, 1)
    rates_H11 = log_decay.to(states.dtype)[:, None, None]
    if isinstance(lengths, int):
        return torch.exp(rates_H11 * lengths)
    lengths = lengths.to(states.device, non_blocking=True).to(states.dtype)
    return torch.exp(lengths[:, None, None, None] * rates_H11)


def _num_states(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _empty(x) -> torch.Tensor:
    """Where an operator has no state to return."""
    return x.new_empty(0, dtype=state_dtype(x.dtype))


def _or_empty(first, *others):
    return first, *(first.new_empty(0) if x is None else x for x in others)


def _present(states: torch.Tensor | None) -> torch.Tensor | None:
    return states if states is not None and states.numel() else None


def _transposed(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None else states.transpose(-1, -2)
