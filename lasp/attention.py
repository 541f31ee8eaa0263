"""Lightning attention, on one device and over ranks: the public operator.

Arithmetic (`lasp.ops`) and exchange (`lasp.exchange`) meet here and nowhere else. The forward is
two steps, each one opaque operator to torch.compile and to activation checkpointing:

    lasp::enter    the local state of k, v; the exchange; the state that enters this rank
    lasp::attend   one pass over q, k, v from that state, writing o once

and the backward is one (`lasp::attend_backward`): the local gradient of the state, its exchange in
the other direction with dq computed meanwhile, then dk and dv. What `enter` returns is small and
is saved; a recomputation that keeps it (see `parallel.recompute`) communicates nothing.
"""

from __future__ import annotations

import hashlib

import torch
from torch.distributed import ProcessGroup

from lasp import exchange as exchanges
from lasp import ops
from lasp.arguments import describe_shape, find_problem, member_or_alone, state_dtype
from lasp.ops.documents import decay_rates, document_offsets

__all__ = ["lightning_attention", "lightning_attention_step"]


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention with a constant decay per head, over one device or many.

        o_t = scale * q_t . S_t,   S_t = exp(log_decay) * S_{t-1} + k_t v_t^T,   S_0 = initial_state

    (Lightning Attention, arXiv 2405.17381, eq. 15-22; over ranks LASP, arXiv 2404.02882.) With
    `group` each rank passes its contiguous part of the sequence, in group-rank order; lengths may
    differ, and be zero. Between ranks only states travel, in float32. Differentiable in q, k, v and
    initial_state; the backward repeats no exchange of the forward.

    Args:
        q, k: [B, T, H, D], bfloat16, float16 or float32 (on the CPU also float64); D in 1..256.
        v: [B, T, H, E], dtype of q; E in 1..256. Any strides; a unit last one saves a copy.
        log_decay: float32 [H], <= 0: natural log of what remains of the state after one token.
            None means no decay. A constant: it gets no gradient.
        scale: factor on the output, applied in float32.
        initial_state: float32 [N, H, D, E], state before the first token; N = B, or the number of
            documents. With `group` it is the global sequence's and given on the first rank only.
        output_final_state: also return the state after this rank's last token, earlier ranks'
            tokens included.
        cu_seqlens: int32 [N + 1], boundaries of packed documents (B must be 1); the state restarts
            at each. Best on the CPU: a GPU is waited for, once per tensor, to read it.
        group: ranks over which the sequence is cut; None: it is all here.
        exchange: "ring" (LASP), "all_gather" (LASP-2) or "doubling".

    Returns:
        o [B, T, H, E] in the dtype of q; with output_final_state (o, final_state), the latter
        float32 [N, H, D, E].

    Raises:
        ValueError: on bad input, and on every rank of `group` if the ranks disagree.
    """
    if group is not None:
        group = member_or_alone(group)
    problem = find_problem(q, k, v, log_decay, initial_state, cu_seqlens, group, exchange, scale)
    if problem is not None:
        if group is not None:
            exchanges.guard.agree(group, {}, every_time=True, problem=problem)
        raise ValueError(problem)
    q, k, v = (_with_unit_stride(x) for x in (q, k, v))
    o, final_state = _LightningAttention.apply(
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        float(scale),
        output_final_state,
        # All ranks must come to the backward's exchange, or none.
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        None if group is None else group.group_name,
        exchange,
    )
    return (o, final_state) if output_final_state else o


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
        scale,
        with_final,
        needs_grad,
        group_name,
        method,
    ):
        dispatched = _dispatched(q, k, v, log_decay, initial_state, cu_seqlens)
        enter, attend = _OPERATORS[:2] if dispatched else (_enter, _attend)
        entering, segment_states, final_state = enter(
            k,
            v,
            log_decay,
            initial_state,
            cu_seqlens,
            scale,
            with_final,
            needs_grad,
            group_name,
            method,
        )
        o = attend(q, k, v, log_decay, entering, segment_states, cu_seqlens, scale)
        ctx.save_for_backward(q, k, v, log_decay, entering, segment_states, cu_seqlens)
        ctx.scale, ctx.group_name, ctx.method = scale, group_name, method
        ctx.with_final = with_final
        ctx.set_materialize_grads(False)
        if not with_final and final_state is not None:
            ctx.mark_non_differentiable(final_state)
        return o, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, log_decay, entering, segment_states, cu_seqlens = ctx.saved_tensors
        if do is None:
            do = v.new_zeros(v.shape, dtype=q.dtype)
        dispatched = _dispatched(do, dfinal, q, k, v, log_decay, entering, cu_seqlens)
        attend_backward = _OPERATORS[2] if dispatched else _attend_backward
        dq, dk, dv, dinitial = attend_backward(
            do,
            dfinal if ctx.with_final else None,
            q,
            k,
            v,
            log_decay,
            entering,
            segment_states,
            cu_seqlens,
            ctx.scale,
            ctx.needs_input_grad[4],
            ctx.group_name,
            ctx.method,
        )
        dinitial = dinitial if ctx.needs_input_grad[4] else None
        return dq, dk, dv, None, dinitial, None, None, None, None, None, None


torch.library.define(
    "lasp::enter",
    "(Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool with_final, bool needs_grad, str? group_name, str method) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lasp::attend",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor entering, Tensor segment_states, "
    "Tensor? cu_seqlens, float scale) -> Tensor",
)
torch.library.define(
    "lasp::attend_backward",
    "(Tensor do, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
    "Tensor entering, Tensor segment_states, Tensor? cu_seqlens, float scale, "
    "bool with_dinitial, str? group_name, str method) -> (Tensor, Tensor, Tensor, Tensor)",
)


_OPERATORS = (torch.ops.lasp.enter, torch.ops.lasp.attend, torch.ops.lasp.attend_backward)


def _dispatched(*tensors: torch.Tensor | None) -> bool:
    """Whether the steps must be called as operators, for those who look at operators.

    They are torch.compile, dispatch modes such as selective checkpointing, profilers, and tensor
    subclasses. Otherwise the functions alone do the same, some 7 us faster each.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
        or not all(x is None or type(x) in _PLAIN for x in tensors)
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _enter(
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    scale,
    with_final,
    needs_grad,
    group_name,
    method,
):
    """(entering state, states at the borders of segments, state after the last token).

    What is not there is None, and an empty tensor from the operator: the entering state without
    group and initial_state, the segment states where one pass needs none, the final state where it
    is not asked for.
    """
    group = None if group_name is None else _group(group_name)
    if group is None:
        decay_rates(log_decay)
    else:
        _agree(group, k, v, log_decay, scale, needs_grad, method)
    offsets = document_offsets(cu_seqlens, k.shape[1])
    segment_states = entering = final_state = None
    with_total = group is not None or with_final
    if with_total or not ops.one_pass(k, v, offsets):
        segment_states, local = ops.prefix_states(
            k, v, log_decay, offsets=offsets, with_total=with_total
        )
    if group is not None:
        factor = _decay_over(log_decay, k)
        pending = exchanges.start(local, factor, initial_state, group, method=method)
        entering = pending.finish()
    elif initial_state is not None:
        entering = initial_state
    if with_final:
        final_state = local
        if entering is not None:
            final_state = torch.addcmul(local, _decay_over(log_decay, k, offsets), entering)
    return entering, segment_states, final_state


@torch.library.impl("lasp::enter", "CompositeExplicitAutograd")
def _enter_operator(k, v, log_decay, initial_state, *rest):
    entering, *others = _enter(k, v, log_decay, initial_state, *rest)
    # An operator may not return its own input.
    entering = entering.clone() if entering is initial_state is not None else entering
    return tuple(_tensor(x, k) for x in (entering, *others))


def _attend(q, k, v, log_decay, entering, segment_states, cu_seqlens, scale):
    return ops.scan(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=_present(entering),
        segment_states=_present(segment_states),
        offsets=document_offsets(cu_seqlens, q.shape[1]),
    )


def _attend_backward(
    do,
    dfinal,
    q,
    k,
    v,
    log_decay,
    entering,
    segment_states,
    cu_seqlens,
    scale,
    with_dinitial,
    group_name,
    method,
):
    """(dq, dk, dv, gradient of the state that enters this rank; None if not with_dinitial)."""
    do = _with_unit_stride(do)
    offsets = document_offsets(cu_seqlens, q.shape[1])
    common = dict(scale=scale, offsets=offsets)
    segment_grads = dinitial = pending = None
    with_total = group_name is not None or with_dinitial
    if with_total or not ops.one_pass(q, do, offsets):
        segment_grads, dinitial = ops.prefix_states(
            q, do, log_decay, reverse=True, with_total=with_total, **common
        )
    if with_total:
        factor = _decay_over(log_decay, q, offsets)
        if dfinal is not None:
            dinitial = torch.addcmul(dinitial, factor, dfinal)
    if group_name is not None:
        pending = exchanges.start(
            dinitial, factor, None, _group(group_name), method=method, reverse=True
        )

    # dq needs the saved state only: it runs while the gradient of the state travels.
    dq = ops.scan(
        do,
        v,
        k,
        log_decay,
        initial_state=_transposed(entering),
        segment_states=_transposed(segment_states),
        **common,
    )

    leaving_grad = dfinal
    if pending is not None:
        from_next = pending.finish()
        dinitial = torch.addcmul(dinitial, factor, from_next)
        leaving_grad = from_next if dfinal is None else from_next + dfinal
    dv, dk = ops.scan_pair(
        k,
        q,
        do,
        v,
        log_decay,
        initial_state=leaving_grad,
        segment_states=_present(segment_grads),
        reverse=True,
        **common,
    )
    return dq, dk, dv, dinitial if with_dinitial else None


torch.library.impl("lasp::attend", "CompositeExplicitAutograd", _attend)


@torch.library.impl("lasp::attend_backward", "CompositeExplicitAutograd")
def _attend_backward_operator(do, *rest):
    *grads, dinitial = _attend_backward(do, *rest)
    return *grads, _tensor(dinitial, do)


@torch.library.register_fake("lasp::enter")
def _enter_fake(
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    scale,
    with_final,
    needs_grad,
    group_name,
    method,
):
    num_documents = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = k.new_empty(
        num_documents, k.shape[2], k.shape[3], v.shape[3], dtype=state_dtype(k.dtype)
    )
    nothing = state.new_empty(0)
    has_entering = group_name is not None or initial_state is not None
    return (
        torch.empty_like(state) if has_entering else nothing,
        ops.fake_segment_states(k, v, cu_seqlens),
        state if with_final else nothing.clone(),
    )


@torch.library.register_fake("lasp::attend")
def _attend_fake(q, k, v, log_decay, entering, segment_states, cu_seqlens, scale):
    return v.new_empty(v.shape)


@torch.library.register_fake("lasp::attend_backward")
def _attend_backward_fake(
    do,
    dfinal,
    q,
    k,
    v,
    log_decay,
    entering,
    segment_states,
    cu_seqlens,
    scale,
    with_dinitial,
    group_name,
    method,
):
    num_documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (num_documents, q.shape[2], q.shape[3], v.shape[3]) if with_dinitial else (0,)
    dinitial = q.new_empty(shape, dtype=state_dtype(q.dtype))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


def _agree(group, k, v, log_decay, scale, needs_grad, method) -> None:
    """Raise ValueError on every rank unless all ranks of the group call alike.

    Local lengths are not part of it: they may differ.
    """
    rates = problem = None
    try:
        rates = decay_rates(log_decay)
    except ValueError as error:
        problem = str(error)
    if rates is not None:
        digest = hashlib.sha256(repr(rates).encode()).hexdigest()[:8]
        rates = f"{list(rates[:4])} (digest {digest})"
    call = {
        "batch, heads, size of k and v": (k.shape[0], *k.shape[2:], v.shape[-1]),
        "dtype": str(k.dtype),
        "exchange": method,
        "log_decay": rates,
        "scale": scale,
        "whether a gradient is needed": needs_grad,
    }
    exchanges.guard.agree(group, call, every_time=not k.is_cuda, problem=problem)


def _decay_over(log_decay, x, offsets=None):
    """exp(log_decay * n) for the n tokens of this device, [H, 1, 1], or per document
    [N, H, 1, 1]."""
    if log_decay is None:
        return x.new_ones(x.shape[2], 1, 1, dtype=state_dtype(x.dtype))
    rates_H11 = log_decay.to(state_dtype(x.dtype))[:, None, None]
    if offsets is None:
        return torch.exp(rates_H11 * x.shape[1])
    # Differences as integers: offsets may exceed what float32 tells apart.
    lengths = torch.tensor(offsets).diff().to(x.device, non_blocking=True)
    return torch.exp(lengths[:, None, None, None].to(rates_H11.dtype) * rates_H11)


def _group(group_name: str) -> ProcessGroup:
    return torch.distributed.distributed_c10d._resolve_process_group(group_name)


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself, or one copy here in place of one in every kernel that reads it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _tensor(states: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What an operator returns for `states`: an empty tensor for None."""
    return x.new_empty(0, dtype=state_dtype(x.dtype)) if states is None else states


def _present(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None or states.numel() == 0 else states


def _transposed(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None or states.numel() == 0 else states.transpose(-1, -2)
