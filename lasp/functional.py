"""The algorithm of attention over ranks: local state -> exchange -> scan, forward and backward.

Linear attention (LASP, arXiv 2404.02882):

    state_fwd   local state of k, v; its exchange; the state that enters this rank
    attn_fwd    one pass over q, k, v from that state, which writes o once
    attn_bwd    local gradient of the state; its exchange in the other direction, with dq computed
                meanwhile; then dk and dv, and the gradient of a decay per token

Softmax attention (LASP-2H, arXiv 2502.07563), where every earlier key and value is needed:

    softmax_fwd   all-gather of keys and values under the attention to local tokens, then the rest
    softmax_bwd   the same again, and the gradients of keys and values back to their ranks

Only this module combines arithmetic (`lasp.ops`) with communication (`lasp.exchange`). What
`state_fwd` returns is small; a recomputation that keeps it (`parallel.activation_checkpoint`)
communicates nothing.

Legend: B batch, T tokens here, H heads, D key size, E value size, N sequences; softmax: S keys
here, G key heads.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from lasp import exchange, ops, replay
from lasp.context import CPContext
from lasp.decay import Decay
from lasp.exchange import ChunkChain, Transition, comm, consistency
from lasp.ops import sdpa
from lasp.ops.host_values import document_boundaries, with_unit_stride
from lasp.partition import (
    BatchPartition,
    BoundaryPartition,
    PackedPartition,
    SoftmaxPartition,
    local_partition,
)

__all__ = ["attn_bwd", "attn_fwd", "gather_past", "softmax_bwd", "softmax_fwd", "state_fwd"]

# At or above this many values of k or v, the scan for dq takes longer than an exchange beside it.
_LONG_SCAN = 2**25


def state_fwd(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | Decay | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    scale: float,
    output_final_state: bool,
    needs_grad: bool,
    context: CPContext,
) -> tuple[torch.Tensor | None, ...]:
    """The states of a forward: (state_in, segment_states, final_state, call_number), None where
    absent.

    state_in [B or 1 times chunks, H, D, E]: received from earlier ranks, without initial states.
    segment_states: what `attn_fwd` needs of k, v beside it. final_state [N, H, D, E]: after this
    rank's last token. call_number [1], int64 on the host: what the backward passes to its check.

    Raises:
        ValueError: decays, boundaries or lengths that do not fit; on every rank if ranks disagree.
    """
    decay, group = Decay.of(log_decay), context.group
    call_number = None
    if group is None:
        _ = decay.rates  # Raises for values that are not allowed.
        partition = local_partition(k.shape[1], cu_seqlens, context)
    else:
        with replay.unseen():
            partition, check = _start_check(
                k, v, decay, cu_seqlens, scale=scale, needs_grad=needs_grad, context=context
            )
            call_number = check.as_tensor()
    if initial_state is None and not output_final_state:
        partition = partition.only_boundaries()
    backend = ops.backend(k)
    decay.bind(partition, backend)
    num_states = _num_states(k, cu_seqlens)
    k, v = partition.fold(k), partition.fold(v)
    with_total = group is not None or output_final_state
    state_in = final_state = None
    segment_states, local_state = backend.chunk_states(
        k,
        v,
        decay.operand,
        cu_seqlens=partition.cu_seqlens,
        state_rows=partition.state_rows(entering=False, reverse=False),
        with_total=with_total,
    )
    if group is not None:
        with replay.unseen():
            check.wait()
        replay.note_check(check.call)
        initial = partition.rows_in(initial_state, None, False)
        pending = _start_exchange(local_state, initial, decay, partition, context, reverse=False)
        state_in = partition.stack(pending.wait(), local_state)
    if output_final_state:
        rows = partition.rows_in(initial_state, state_in, False)
        final_rows = _add_decayed(local_state, rows, decay, reverse=False)
        if final_rows is local_state and group is not None:
            # NCCL may still be reading it, and the caller may write to what is returned.
            final_rows = local_state.clone()
        final_state = partition.final_states(final_rows, num_states, False)
    return state_in, segment_states, final_state, call_number


def attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | Decay | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    state_in: torch.Tensor | None,
    segment_states: torch.Tensor | None,
    scale: float,
    context: CPContext,
) -> torch.Tensor:
    """o [B, T, H, E] from what `state_fwd` returned."""
    partition, backend = local_partition(q.shape[1], cu_seqlens, context), ops.backend(q)
    state, state_rows = _scan_state(partition, initial_state, state_in)
    o = backend.scan(
        partition.fold(q),
        partition.fold(k),
        partition.fold(v),
        Decay.of(log_decay).bind(partition, backend).operand,
        scale=scale,
        initial_state=state,
        segment_states=segment_states,
        cu_seqlens=partition.cu_seqlens,
        state_rows=state_rows,
    )
    return partition.unfold(o)


def attn_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor | None,
    dfinal_state: torch.Tensor | None,
    state_in: torch.Tensor | None,
    segment_states: torch.Tensor | None,
    call_number: torch.Tensor | None,
    scale: float,
    needs_dkdv: bool,
    needs_ddecay: bool,
    needs_dinitial: bool,
    context: CPContext,
) -> tuple[torch.Tensor | None, ...]:
    """(dq, dk, dv, gradients of log_decay and initial_state); None where it is not needed.

    Those of log_decay and initial_state need dk and dv.

    Raises:
        ValueError: ranks run the backwards of different calls; on every rank.
    """
    group, backend = context.group, ops.backend(q)
    partition = local_partition(q.shape[1], cu_seqlens, context)
    decay = Decay(log_decay).bind(partition, backend)
    num_states = _num_states(q, cu_seqlens)
    fold, unfold = partition.fold, partition.unfold
    q, k, v, do = fold(q), fold(k), fold(v), fold(with_unit_stride(do))
    common = dict(scale=scale, cu_seqlens=partition.cu_seqlens)
    pending = ddecay = dinitial = None
    grads = partition
    # The gradient of a decay starts, in a row that a state enters, from the state's gradient.
    needs_leaving = needs_dinitial or (needs_ddecay and initial_state is not None)
    if dfinal_state is None and not needs_leaving:
        grads = partition.only_boundaries()
    with_total = group is not None or needs_leaving
    if needs_dkdv:
        if group is not None:
            with replay.unseen():
                check = consistency.start_backward_check(group, "lightning_attention", call_number)
        segment_grads, local_grad = backend.chunk_states(
            q,
            do,
            decay.operand,
            state_rows=grads.state_rows(entering=False, reverse=True),
            reverse=True,
            with_total=with_total,
            **common,
        )
        dfinal_rows = grads.rows_in(dfinal_state, None, True)
        if group is not None:
            with replay.unseen():
                check.wait()
            replay.note_check(check.call)
            pending = _start_exchange(local_grad, dfinal_rows, decay, grads, context, reverse=True)

    # dq needs the saved state only: it is computed during the exchange of the gradient.
    state, state_rows = _scan_state(partition, initial_state, state_in)
    dq = backend.scan(
        do,
        v,
        k,
        decay.operand,
        dot_with=q if needs_ddecay else None,
        initial_state=None if state is None else state.mT,
        segment_states=None if segment_states is None else segment_states.mT,
        state_rows=state_rows,
        **common,
    )
    if not needs_dkdv:
        return unfold(dq), None, None, None, None
    dq, q_dots = dq if needs_ddecay else (dq, None)

    grad_rows, received = dfinal_rows, None
    if pending is not None:
        received = grads.stack(pending.wait(), local_grad)
        grad_rows = grads.rows_in(dfinal_state, received, True)
    if needs_dinitial:
        rows = _add_decayed(local_grad, grad_rows, decay, reverse=True)
        dinitial = grads.final_states(rows, num_states, True)
    grad_state_rows = None if grad_rows is None else grads.state_rows(entering=True, reverse=True)
    dk, dv, k_dots = backend.scan_dkdv(
        q,
        k,
        v,
        do,
        decay.operand,
        initial_state=grad_rows,
        segment_states=segment_grads,
        state_rows=grad_state_rows,
        with_dots=needs_ddecay,
        **common,
    )
    if needs_ddecay:
        entering = state_in
        if grads is partition:
            entering = partition.rows_in(initial_state, state_in, False)
        ddecay = backend.decay_gradient(
            q_dots,
            k_dots,
            decay.operand,
            start=_decay_gradient_start(entering, local_grad, received, grad_rows, decay, grads),
            segment_states=(segment_states, segment_grads),
            entering=((state, state_rows), (grad_rows, grad_state_rows)),
            cu_seqlens=partition.cu_seqlens,
        )
        ddecay = unfold(ddecay)
    return unfold(dq), unfold(dk), unfold(dv), ddecay, dinitial


def softmax_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    scale: float,
    needs_grad: bool,
    context: CPContext,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(o [B, T, H, D], lse [B, H, T], number of keys of every rank, int64 [P] on the host,
    call_number as that of `state_fwd`)."""
    group, lengths, call_number = context.group, (k.shape[1],), None
    if group is not None:
        check = _start_softmax_check(
            q, k, cu_seqlens, scale=scale, needs_grad=needs_grad, context=context
        )
        # Before anything is gathered: an all-gather of other sizes would hang.
        check.wait()
        call_number = check.as_tensor()
        lengths = context.shard_lengths or consistency.gather_numbers(group, k.shape[1])
    partition = SoftmaxPartition.of(lengths, q.shape[1], cu_seqlens, context)
    options = dict(scale=scale, repeats=partition.repeats)
    pending = _start_gather(partition, k, v, group)
    o, lse = sdpa.attn_fwd(q, k, v, partition.local_blocks(), **options)
    if pending is not None:
        rows = _in_order(partition, pending, *partition.span_read_by(partition.rank))
        keys, values = _keys_and_values(rows)
        blocks = partition.remote_blocks()
        sdpa.attn_fwd(q, keys, values, blocks, **options, merge_into=(o, lse))
    lengths = torch.tensor(partition.lengths, dtype=torch.int64, device="cpu")
    return o.contiguous(), lse.contiguous(), lengths, call_number


def softmax_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    lengths: torch.Tensor,
    call_number: torch.Tensor | None,
    scale: float,
    context: CPContext,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv); `lengths` and `call_number` as `softmax_fwd` returned them."""
    if context.group is not None:
        consistency.start_backward_check(context.group, "softmax_attention", call_number).wait()
    do = with_unit_stride(do)
    partition = SoftmaxPartition.of(lengths.tolist(), q.shape[1], cu_seqlens, context)
    options = dict(scale=scale, repeats=partition.repeats)
    pending = _start_gather(partition, k, v, context.group)
    dq, dk, dv = sdpa.attn_bwd(do, q, k, v, o, lse, partition.local_blocks(), **options)
    if pending is not None:
        rows = _in_order(partition, pending, *partition.span_read_by(partition.rank))
        keys, values = _keys_and_values(rows)
        remote = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        into = (dq, *_keys_and_values(remote))
        blocks = partition.remote_blocks()
        sdpa.attn_bwd(do, q, keys, values, o, lse, blocks, **options, into=into)
        del rows, keys, values
        dk, dv = _return_gradients(partition, remote, dk, dv, context.group)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def gather_past(k: torch.Tensor, v: torch.Tensor, context: CPContext) -> torch.Tensor:
    """Keys and values [2, B, S', G, D] of all tokens up to this rank's last."""
    if context.group is None:
        return torch.stack((k, v))
    lengths = context.shard_lengths or consistency.gather_numbers(context.group, k.shape[1])
    partition = SoftmaxPartition.of(lengths, k.shape[1], None, context)
    pending = comm.gather_rows(_as_rows(k, v), partition.lengths, context.group)
    stop = max(chunk.stop for chunk in partition.chunks if chunk.rank == partition.rank)
    return _in_order(partition, pending, 0, stop).permute(1, 2, 0, 3, 4).contiguous()


def _start_check(k, v, decay, cu_seqlens, *, scale, needs_grad, context):
    """(this rank's partition, a check that all ranks make the same call).

    Local lengths may differ between ranks, unless every rank has to know them all.
    """
    rates = boundaries = partition = problem = None
    try:
        rates = decay.rates
        boundaries = document_boundaries(cu_seqlens, None)
        partition = local_partition(k.shape[1], cu_seqlens, context)
    except ValueError as error:
        problem = str(error)
    sizes = (k.shape[0], *k.shape[2:], v.shape[-1])
    call = _call_signature(sizes, k.dtype, boundaries, rates, scale, needs_grad, *context[1:])
    check = consistency.PendingCheck(context.group, call, problem=problem)
    if problem is not None:
        check.wait()
    return partition, check


# Keyed by values, never by tensors: a decay that was changed in place is another call.
@lru_cache(maxsize=256)
def _call_signature(
    sizes, dtype, boundaries, rates, scale, needs_grad, exchange, layout, shard_lengths
):
    return consistency.CallSignature(
        {
            "operation": "lightning_attention",
            "batch, heads, size of k and v": sizes,
            "dtype": dtype,
            "exchange": exchange,
            "layout": layout,
            "shard_lengths": shard_lengths,
            "cu_seqlens": boundaries,
            "log_decay": rates,
            "scale": scale,
            "whether gradients of k and v are needed": needs_grad,
        }
    )


def _start_softmax_check(q, k, cu_seqlens, *, scale, needs_grad, context):
    """A check that all ranks make the same call."""
    boundaries = problem = None
    try:
        boundaries = document_boundaries(cu_seqlens, None)
    except ValueError as error:
        problem = str(error)
    call = {
        "operation": "softmax_attention",
        "batch, heads, key heads, head size": (q.shape[0], *q.shape[2:], k.shape[2]),
        "cu_seqlens": boundaries,
        "dtype": q.dtype,
        "layout": context.layout,
        "scale": scale,
        "shard_lengths": context.shard_lengths,
        "whether a gradient is needed": needs_grad,
    }
    return consistency.PendingCheck(context.group, call, problem=problem)


def _start_exchange(
    local_state: torch.Tensor,
    states: torch.Tensor | None,
    decay: Decay,
    partition: BatchPartition | PackedPartition,
    context: CPContext,
    *,
    reverse: bool,
) -> exchange.PendingExchange:
    """Start the exchange of the states that leave this rank's chunks.

    Args:
        local_state: rows of the states of this rank's own tokens.
        states: rows of the states that enter from outside the sequence, or None.
    """
    rows = _add_decayed(local_state, states, decay, reverse=reverse)
    transitions = []
    for i in range(len(partition.chunk_lengths)):
        passes = partition.passes_through(i)
        factor = decay.chunk_factor(i, rows, reverse=reverse) if passes else None
        transitions.append(Transition(partition.state_out(rows, i, reverse), factor))
    _, num_heads, D, E = local_state.shape
    num_values = sum(partition.chunk_lengths) * num_heads * max(D, E)
    return exchange.start(
        transitions,
        ChunkChain(
            context.group,
            context.layout,
            reverse,
            partition.boundary_documents,
            ops.send_recv_state,
        ),
        method=context.exchange,
        # The backward computes dq meanwhile.
        overlapped=reverse and num_values >= _LONG_SCAN,
    )


def _add_decayed(local_state, states, decay, *, reverse):
    """Rows of the states that leave: local_state + what remains of those that enter, or None."""
    if states is None:
        return local_state
    return torch.addcmul(local_state, decay.row_factors(local_state, reverse=reverse), states)


def _decay_gradient_start(entering, local_grad, received, grad_rows, decay, grads):
    """[rows, H]: the gradient of a decay per token at the first token of each row, None for zeros.

    It is the dot product of the state that enters the row with that state's gradient.

    Args:
        entering: rows of states; with a `BoundaryPartition`, one for each chunk.
        local_grad: rows of their gradients by the row's own tokens.
        received, grad_rows: gradients of the states that leave, per chunk and per row, or None.
    """
    if entering is None:
        return None
    if not isinstance(grads, BoundaryPartition):
        start = torch.empty(local_grad.shape[:2], dtype=local_grad.dtype, device=local_grad.device)
        factors = None if grad_rows is None else decay.row_factors(local_grad, reverse=True)
        replay.note_call(_write_dots, start, entering, local_grad, factors, grad_rows)
        return start
    start = local_grad.new_zeros(len(grads.cu_seqlens) - 1, local_grad.shape[1])
    for i, span in enumerate(grads.spans):
        factor = None
        if grads.passes_through(i):
            factor = decay.chunk_factor(i, local_grad, reverse=True)
        state_in = None if factor is None else received[i : i + 1]
        leaving = Transition(local_grad[i : i + 1], factor).apply(state_in)
        start[span.start] = (entering[i] * leaving[0]).sum((-2, -1))
    return start


def _write_dots(start, entering, local_grad, factors, grad_rows):
    """Write the dot products [rows, H] of states and their gradients, local_grad + factors *
    grad_rows or local_grad alone."""
    leaving = local_grad if grad_rows is None else torch.addcmul(local_grad, factors, grad_rows)
    torch.sum(entering * leaving, (-2, -1), out=start)


def _scan_state(partition, initial_state, state_in):
    """(rows of the states that enter, which rows they are) for a forward scan."""
    if isinstance(partition, BatchPartition):
        return partition.rows_in(initial_state, state_in, False), None
    if state_in is None:
        return initial_state, None
    if initial_state is None:
        partition = partition.only_boundaries()
    rows = partition.rows_in(initial_state, state_in, False)
    return rows, None if rows is None else partition.state_rows(entering=True, reverse=False)


def _num_states(x, cu_seqlens):
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _start_gather(partition, k, v, group) -> comm.PendingRows | None:
    """Start to gather keys and values as rows [S, 2, B, G, D]; None if no rank needs another's."""
    if not partition.exchanges:
        return None
    return comm.gather_rows(_as_rows(k, v), partition.lengths, group)


def _in_order(partition, pending, first: int, last: int) -> torch.Tensor:
    """The gathered rows of tokens [first, last) of the global sequence, [S', 2, B, G, D]."""
    of_rank = pending.wait()
    if len(partition.chunks) == len(of_rank) and len(set(partition.lengths)) == 1:
        # They lie in order and without gaps: no copy.
        return pending.rows[first:last]
    parts = [(chunk.rank, chunk.rows_in(first, last)) for chunk in partition.chunks]
    parts = [of_rank[rank][slice(*rows)] for rank, rows in parts if rows is not None]
    return torch.cat(parts) if parts else of_rank[0][:0]


def _return_gradients(partition, remote, dk, dv, group) -> tuple[torch.Tensor, torch.Tensor]:
    """Send the gradients of other ranks' keys and values to them; (dk, dv) with those received.

    Args:
        remote: [S', 2, B, G, D], of the span that this rank reads.
        dk, dv: of this rank's keys and values, by the queries of the same chunk.
    """
    ranks = range(len(partition.lengths))
    first = partition.span_read_by(partition.rank)[0]
    read = [partition.rows_read_by(partition.rank, owner) for owner in ranks]
    starts = [
        (chunk.start + start - chunk.rows[0] - first, stop - start)
        for of_owner in read
        for chunk, (start, stop) in of_owner
    ]
    if starts != sorted(starts):
        # In the order of the ranks that own them; contiguous shards are already in order.
        remote = torch.cat([remote.narrow(0, *each) for each in starts])
    sent = [sum(stop - start for _, (start, stop) in of_owner) for of_owner in read]
    expected = [
        [rows for _, rows in partition.rows_read_by(reader, partition.rank)] for reader in ranks
    ]
    lengths = [sum(stop - start for start, stop in spans) for spans in expected]
    received = comm.all_to_all_rows(remote, sent, lengths, group)
    total = _as_rows(dk, dv).to(torch.promote_types(dk.dtype, torch.float32))
    for spans, rows in zip(expected, received, strict=True):
        done = 0
        for start, stop in spans:
            total[start:stop] += rows[done : done + stop - start]
            done += stop - start
    return tuple(x.to(dk.dtype) for x in _keys_and_values(total))


def _as_rows(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[S, 2, B, G, D]: the key and the value of a token lie together."""
    return torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1)


def _keys_and_values(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [B, S, G, D] of rows [S, 2, B, G, D]."""
    return tuple(x.transpose(0, 1) for x in rows.unbind(1))
