"""Lightning attention, on one device and over ranks: the public functions.

`lightning_attention` is all of it in one call; `start_state` and `attend` are the same in two, with
the exchange of states under whatever runs between them. Inputs are checked here, the work is in
`lasp.operators` (`lasp.alone` where one device has it all), and one autograd node holds both
exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from lasp import alone, operators, ops
from lasp import exchange as exchanges
from lasp.arguments import describe_shape, find_problem, member_or_alone
from lasp.ops.documents import decay_rates
from lasp.ops.strides import with_unit_stride

__all__ = [
    "StartedState",
    "attend",
    "lightning_attention",
    "lightning_attention_step",
    "start_state",
]


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "ring",
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention with a constant decay per head, over one device or many.

        o_t = scale * q_t . S_t,   S_t = exp(log_decay) * S_{t-1} + k_t v_t^T,   S_0 = initial_state

    (Lightning Attention, arXiv 2405.17381, eq. 15-22; over ranks LASP, arXiv 2404.02882.) With
    `group` each rank passes its part of the sequence, in group-rank order; lengths may differ, and
    be zero. Between ranks only states travel, in float32. Differentiable in q, k, v and
    initial_state; the backward repeats no exchange of the forward.

    Args:
        q, k: [B, T, H, D], bfloat16, float16 or float32 (on the CPU also float64); D in 1..256.
        v: [B, T, H, E], dtype of q; E in 1..256. Any strides; a unit last one saves a copy.
        log_decay: float32 [H], <= 0: natural log of what remains of the state after one token.
            None means no decay. A constant: it gets no gradient.
        scale: factor on the output, applied in float32.
        initial_state: float32 [N, H, D, E], state before the first token; N = B, or the number of
            documents. With `group` it is the global sequence's and given on the first rank only;
            of packed documents every rank may pass it, and the rows of those that begin on the rank
            are read (and get a gradient).
        output_final_state: also return the state after this rank's last token, earlier ranks'
            tokens included.
        cu_seqlens: int32 [N + 1], boundaries of packed documents (B must be 1); the state restarts
            at each. With `group` those of the global sequence, the same on all ranks. Best on the
            CPU: a GPU is waited for, once per tensor, to read it.
        group: ranks over which the sequence is cut; None: it is all here.
        exchange: "ring" (LASP), "all_gather" (LASP-2), "doubling" or "auto", which
            chooses among them; see `lasp.exchange`.
        layout: which tokens a rank holds, with `group`: "contiguous", or "zigzag" as softmax
            context parallelism has it (see `lasp.shard`); then T is even.
        shard_lengths: tokens of every rank. Needed only with cu_seqlens where the cut is not
            `lasp.shard.split_lengths`.

    Returns:
        o [B, T, H, E] in the dtype of q; with output_final_state (o, final_state), the latter
        float32 [N, H, D, E]. Of packed documents over ranks, row n is the state after the last
        token of document n on this rank, and zero where it has none; a document's own final state
        is on the rank that holds its last token.

    Raises:
        ValueError: on bad input, and on every rank of `group` if the ranks disagree.
    """
    options = (initial_state, cu_seqlens, group, exchange, scale, layout, shard_lengths)
    q, k, v, where = _checked(q, k, v, log_decay, *options)
    o, final_state = _LightningAttention.apply(
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        None,
        None,
        float(scale),
        output_final_state,
        _needs_grad(k, v),
        *where,
    )
    return (o, final_state) if output_final_state else o


@dataclass(frozen=True)
class StartedState:
    """What `start_state` returns and `attend` takes: arguments, and a state under way."""

    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    segment_states: torch.Tensor
    ticket: torch.Tensor
    scale: float
    output_final_state: bool
    needs_grad: bool
    where: tuple


def start_state(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    group: ProcessGroup | None = None,
    exchange: str = "ring",
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> StartedState:
    """The first half of `lightning_attention`, which needs no q: this rank's state goes out.

        started = lasp.start_state(k, v, log_decay, group=group)
        q = ...                                # runs while the states travel
        o = lasp.attend(q, started)

    Arguments are those of `lightning_attention`. On every rank, `attend` must follow, once, before
    the next exchange over `group` is started.

    Raises:
        ValueError: as `lightning_attention`.
    """
    options = (initial_state, cu_seqlens, group, exchange, scale, layout, shard_lengths)
    _, k, v, where = _checked(k, k, v, log_decay, *options)
    needs_grad = _needs_grad(k, v)
    # No autograd node: the one of `attend` holds the gradients of all arguments.
    with torch.no_grad():
        segment_states, ticket = torch.ops.lasp.start(
            k.detach(),
            v.detach(),
            log_decay,
            None if initial_state is None else initial_state.detach(),
            cu_seqlens,
            float(scale),
            output_final_state,
            needs_grad,
            *where,
        )
    return StartedState(
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        segment_states,
        ticket,
        float(scale),
        output_final_state,
        needs_grad,
        where,
    )


def attend(
    q: torch.Tensor, started: StartedState
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The second half of `lightning_attention`: o [B, T, H, E] from q [B, T, H, D].

    With output_final_state of `start_state`, (o, final_state). Raises ValueError for a q that does
    not fit, or a state that was attended to before.
    """
    k = started.k
    if q.shape != k.shape or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q is {q.dtype} {describe_shape(q)} on {q.device}, but the k of start_state "
            f"{k.dtype} {describe_shape(k)} on {k.device}: they must be alike."
        )
    o, final_state = _LightningAttention.apply(
        with_unit_stride(q),
        k,
        started.v,
        started.log_decay,
        started.initial_state,
        started.cu_seqlens,
        started.segment_states,
        started.ticket,
        started.scale,
        started.output_final_state,
        started.needs_grad,
        *started.where,
    )
    return (o, final_state) if started.output_final_state else o


def lightning_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lightning_attention` for one more token: decoding with a state of constant size.

    Args:
        q, k: [B, H, D]; v: [B, H, E], dtype of q.
        state: float32 [B, H, D, E], the state after the tokens so far (a `final_state`).
        log_decay, scale: as in `lightning_attention`.

    Returns:
        (o [B, H, E] in the dtype of q, the new state); `state` itself is left as it was.

    Raises:
        ValueError: on shapes, dtypes, devices or decays that do not fit.
    """
    tensors = all(isinstance(x, torch.Tensor) for x in (q, k, v, state))
    if not tensors:
        raise ValueError("q, k, v and state must be tensors; a first state is torch.zeros.")
    if q.dim() != 3 or k.shape != q.shape or v.shape[:2] != q.shape[:2] or v.dim() != 3:
        raise ValueError(
            f"q {describe_shape(q)}, k {describe_shape(k)}, v {describe_shape(v)} do not fit: one "
            "token's q and k are [B, H, D], its v [B, H, E]."
        )
    problem = find_problem(
        *(x.unsqueeze(1) for x in (q, k, v)), log_decay, state, None, None, "ring", scale, "state"
    )
    if problem is not None:
        raise ValueError(problem)
    decay_rates(log_decay)
    return ops.step(q, k, v, state, log_decay, scale=float(scale))


class _LightningAttention(torch.autograd.Function):
    """One node for all of it, so that every rank runs both exchanges, in the same order."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        segment_states,
        ticket,
        scale,
        with_final,
        needs_grad,
        *where,
    ):
        ctx.scale, ctx.with_final, ctx.where = scale, with_final, where
        ctx.set_materialize_grads(False)
        simple = cu_seqlens is None and where[0] is None and not with_final and ticket is None
        ctx.alone = simple and not ctx.needs_input_grad[4]
        watched = alone.is_watched(q, k, v, log_decay, initial_state, cu_seqlens)
        if ctx.alone and not watched:
            o, segment_states = alone.attend(q, k, v, log_decay, initial_state, scale)
            ctx.save_for_backward(q, k, v, log_decay, initial_state, None, segment_states, None)
            return o, None
        way = torch.ops.lasp if watched else operators
        if ticket is None:
            entering, segment_states, final_state = way.enter(
                k,
                v,
                log_decay,
                initial_state,
                cu_seqlens,
                scale,
                with_final,
                needs_grad,
                *where,
            )
        else:
            entering, final_state = torch.ops.lasp.finish(
                ticket, k, v, initial_state, cu_seqlens, with_final, *where
            )
        o = way.attend(
            q,
            k,
            v,
            log_decay,
            initial_state,
            entering,
            segment_states,
            cu_seqlens,
            scale,
            *where,
        )
        if where[0] is None:
            # Empty. Both ways save alike: a checkpoint may go one in the forward, one again later.
            entering = None
        ctx.save_for_backward(
            q, k, v, log_decay, initial_state, entering, segment_states, cu_seqlens
        )
        if final_state is not None and not with_final:
            ctx.mark_non_differentiable(final_state)
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, initial_state, entering, segment_states, cu_seqlens = ctx.saved_tensors
        if do is None:
            do = v.new_zeros(v.shape, dtype=q.dtype)
        # Either all ranks come to the backward's exchange or none: the forward compared that.
        needs = ctx.needs_input_grad
        with_dkv = needs[1] or needs[2] or needs[4]
        nones = (None,) * (5 + len(ctx.where))
        arguments = (do, q, k, v, log_decay, initial_state)
        watched = alone.is_watched(*arguments, dfinal, cu_seqlens)
        if ctx.alone and not watched:
            grads = alone.attend_backward(*arguments, segment_states, ctx.scale, with_dkv)
            return *grads, None, None, None, *nones
        if entering is None:
            entering = segment_states.new_empty(0)
        way = torch.ops.lasp if watched else operators
        dq, dk, dv, dinitial = way.attend_backward(
            do,
            dfinal if ctx.with_final else None,
            q,
            k,
            v,
            log_decay,
            initial_state,
            entering,
            segment_states,
            cu_seqlens,
            ctx.scale,
            with_dkv,
            needs[4],
            *ctx.where,
        )
        dk, dv = (dk, dv) if with_dkv else (None, None)
        return dq, dk, dv, None, dinitial if needs[4] else None, None, *nones


def _checked(
    q,
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    group,
    exchange,
    scale,
    layout,
    shard_lengths,
):
    """q, k, v with unit strides, and where they are; ValueError for what does not fit, on all ranks
    of the group."""
    if group is not None:
        group = member_or_alone(group)
    problem = find_problem(
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        group,
        exchange,
        scale,
        layout=layout,
        shard_lengths=shard_lengths,
    )
    if problem is not None:
        if group is not None:
            exchanges.guard.compare(group, {}, problem=problem).confirm()
        raise ValueError(problem)
    if shard_lengths is not None:
        # The caller may change its list before the backward.
        shard_lengths = tuple(shard_lengths)
    where = (None if group is None else group.group_name, exchange, layout, shard_lengths)
    return with_unit_stride(q), with_unit_stride(k), with_unit_stride(v), where


def _needs_grad(k, v):
    return torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
