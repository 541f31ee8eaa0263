"""Lightning attention, on one device and over ranks: the public functions.

Arguments are checked here; the algorithm is in `lasp.functional`. One autograd node holds both
exchanges, so that every rank runs them in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from lasp import functional, library, ops
from lasp.context import CPContext
from lasp.decay import Decay
from lasp.exchange import consistency
from lasp.ops.host_values import decay_rates, with_unit_stride
from lasp.validation import attention_problem, resolve_group, step_problem

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
    layout: str = "contiguous",
    shard_lengths: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention with a decay per head or per token, over one device or many.

        o_t = scale * q_t . S_t,   S_t = exp(log_decay) * S_{t-1} + k_t v_t^T,   S_0 = initial_state

    (Lightning Attention, arXiv 2405.17381, eq. 15-22; with a decay per token Mamba-2's SSD, arXiv
    2405.21060, and simple gated linear attention; over ranks LASP, arXiv 2404.02882.) With
    `group` each rank passes its shard of the sequence, in group-rank order; lengths may differ, and
    be zero. Only states cross ranks, in float32. Differentiable in q, k, v, initial_state and a
    decay per token; the backward repeats no exchange of the forward.

    Args:
        q, k: [B, T, H, D], bfloat16, float16 or float32 (on the CPU also float64); D in 1..256.
        v: [B, T, H, E], dtype of q; E in 1..256. Any strides; a unit last stride saves a copy.
            Heads may share q, k or v (`expand`): no copy is made, but the Hopper scan cannot read
            them and leaves them to the Triton scan.
        log_decay: float32, <= 0: natural log of what remains of the state after one token. [H]: a
            constant per head, without a gradient. [B, T, H]: one per token, with a gradient; -inf
            resets the state. None means no decay. On a GPU, values above 0 in [B, T, H] give NaN.
        scale: factor on the output, applied in float32.
        initial_state: float32 [N, H, D, E], state before the first token; N = B, or the number of
            documents. With `group` it is the global sequence's and passed on the first rank only;
            with packed documents every rank may pass it, and the rows of those that begin on the
            rank are read (and get a gradient).
        output_final_state: also return the state after this rank's last token, earlier ranks'
            tokens included.
        cu_seqlens: int32 [N + 1], boundaries of packed documents (B must be 1); the state restarts
            at each. With `group` those of the global sequence, the same on all ranks. Best on the
            CPU: reading it from a GPU makes the host wait, once per tensor.
        group: the ranks that hold the sequence; None: this device holds all of it.
        exchange: "ring" (LASP), "all_gather" (LASP-2), "doubling" or "auto", which chooses among
            them; see `lasp.exchange`.
        layout: which tokens a rank holds, with `group`: "contiguous", or "zigzag" as in context
            parallelism of softmax attention (see `lasp.shard`); then T is even.
        shard_lengths: tokens of every rank. Needed only with cu_seqlens if they are not
            `lasp.shard.split_lengths`.

    Returns:
        o [B, T, H, E] in the dtype of q; with output_final_state (o, final_state), the latter
        float32 [N, H, D, E]. With packed documents over ranks, row n is the state after the last
        token of document n on this rank, and zero if it has none; the final state of a document is
        on the rank that holds its last token.

    Raises:
        ValueError: on bad input, and on every rank of `group` if the ranks disagree.
    """
    context = CPContext(resolve_group(group), exchange, layout, shard_lengths)
    tensors = q, k, v, log_decay, initial_state, cu_seqlens
    call, complete = None, all(isinstance(x, torch.Tensor) for x in (q, k, v))
    needs_grad = complete and torch.is_grad_enabled() and _needs_exchange(k, v, log_decay)
    if complete and not library.needs_dispatcher(*tensors):
        options = scale, output_final_state, needs_grad, context
        call = _remembered_call("forward", tensors, options)
    if call is None or call.recording is None:
        _check(*tensors, scale=scale, context=context)
        if shard_lengths is not None:
            # The caller may change its list before the backward.
            context = context._replace(shard_lengths=tuple(shard_lengths))
    o, final_state = _LightningAttention.apply(
        with_unit_stride(q),
        with_unit_stride(k),
        with_unit_stride(v),
        log_decay,
        initial_state,
        cu_seqlens,
        _Options(float(scale), output_final_state, needs_grad, context, call),
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
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lightning_attention` for one more token: decoding with a state of constant size.

    Args:
        q, k: [B, H, D]; v: [B, H, E], dtype of q.
        state: float32 [B, H, D, E], the state after the tokens so far (a `final_state`).
        log_decay: [H] as in `lightning_attention`, or [B, H], that of this token (on a GPU, values
            above 0 in it give NaN).
        scale: as in `lightning_attention`.
        inplace: write the new state over `state`, without gradients.

    Returns:
        (o [B, H, E] in the dtype of q, the new state); `state` itself is changed with `inplace`
        only.

    Raises:
        ValueError: on shapes, dtypes, devices or decays that do not fit, or a gradient that is
            needed of a call in place.
    """
    problem = step_problem(q, k, v, state, log_decay, scale=scale)
    if problem is None and inplace and ops.needs_grad(q, k, v, state, log_decay):
        problem = "inplace=True overwrites what a gradient needs: call it under torch.no_grad()."
    if problem is not None:
        raise ValueError(problem)
    _ = Decay(log_decay).rates
    return ops.step(q, k, v, state, log_decay, scale=float(scale), inplace=inplace)


def _needs_exchange(k, v, log_decay):
    """True if a backward needs the gradients of states."""
    return k.requires_grad or v.requires_grad or getattr(log_decay, "requires_grad", False)


def _check(*tensors, scale, context):
    """Raise ValueError for arguments that do not fit, on all ranks."""
    q, k, v, log_decay, initial_state, cu_seqlens = tensors
    problem = attention_problem(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        context=context,
    )
    if problem is not None:
        if context.group is not None:
            consistency.PendingCheck(context.group, {}, problem=problem).wait()
        raise ValueError(problem)


def _remembered_call(name, tensors, options):
    """The call, if it is of a kind that may be repeated: without initial states and documents.

    The tensors are of plain types. With a recording, a call like it has passed every check of its
    arguments but for the values of the decay.
    """
    *_, log_decay, initial_state, cu_seqlens = tensors[: 6 if name == "forward" else 7]
    if initial_state is not None or cu_seqlens is not None:
        return ops.PLAIN_CALL
    *key, context = options
    try:
        if context.group is not None and log_decay is not None:
            # What crosses ranks depends on the values of the decay.
            key.append(decay_rates(log_decay))
        return ops.remembered_call(name, tensors, (*key, *context[1:]), context.group)
    except (RuntimeError, TypeError, ValueError):
        # Options without a hash, or tensors without an address, as in functorch's transforms: a
        # full call says what is wrong, if anything is, on all ranks.
        return ops.PLAIN_CALL


class _Options(NamedTuple):
    """The non-tensor arguments of a call, and the call; None where torch's dispatcher sees it."""

    scale: float
    output_final_state: bool
    needs_grad: bool
    context: CPContext
    call: Any


class _LightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, cu_seqlens, options):
        *common, call = options
        ctx.options = common
        ctx.set_materialize_grads(False)
        tensors = q, k, v, log_decay, initial_state, cu_seqlens
        scale, output_final_state, needs_grad, context = common
        impl = library if call is None else functional
        # What both functions derive from a decay is computed once; an operator takes a tensor.
        decay = log_decay if call is None else Decay(log_decay)
        call = call or ops.PLAIN_CALL
        if call.recording is not None:
            wait = call_number = None
            _ = decay_rates(log_decay)  # Raises for values that are not allowed.
            if context.group is not None:
                check = consistency.PendingCheck(context.group, call.recording.check)
                wait, call_number = check.wait, check.as_tensor()
            o, state_in, segment_states, final_state = call.replay(wait)
        else:
            with call.record():
                state_in, segment_states, final_state, call_number = impl.state_fwd(
                    k,
                    v,
                    decay,
                    initial_state,
                    cu_seqlens,
                    scale=scale,
                    output_final_state=output_final_state,
                    needs_grad=needs_grad,
                    context=context,
                )
                o = impl.attn_fwd(
                    *tensors[:3],
                    decay,
                    initial_state,
                    cu_seqlens,
                    state_in=state_in,
                    segment_states=segment_states,
                    scale=scale,
                    context=context,
                )
            call.finish((o, state_in, segment_states, final_state))
        present = library.present
        ctx.save_for_backward(
            *tensors, present(state_in), present(segment_states), present(call_number)
        )
        return o, final_state if output_final_state else None

    @staticmethod
    def backward(ctx, do, dfinal_state):
        # Without create_graph, once_differentiable does nothing but cost the host as much as a
        # launch.
        run = _once_differentiable if torch.is_grad_enabled() else _LightningAttention._backward
        return run(ctx, do, dfinal_state)

    @staticmethod
    def _backward(ctx, do, dfinal_state):
        *tensors, cu_seqlens, state_in, segment_states, call_number = ctx.saved_tensors
        if do is None:
            v = tensors[2]
            do = v.new_zeros(v.shape)
        # All ranks run the exchange of the backward or none does: the forward has checked that.
        needs = ctx.needs_input_grad
        needs_ddecay, needs_dinitial = needs[3], needs[4]
        needs_dkdv = any(needs[1:5])
        saved = *tensors, cu_seqlens, dfinal_state, state_in, segment_states
        scale, _, needs_grad, context = ctx.options
        impl, call = library, ops.PLAIN_CALL
        if not library.needs_dispatcher(do, *saved):
            options = scale, needs_grad, needs_dkdv, needs_ddecay, context
            impl, call = functional, _remembered_call("backward", (do, *saved), options)
        if call.recording is not None:
            wait = None
            if call.recording.check is not None:
                wait = consistency.start_backward_check(
                    context.group, "lightning_attention", call_number
                ).wait
            dq, dk, dv, ddecay, dinitial = call.replay(wait)
        else:
            with call.record():
                dq, dk, dv, ddecay, dinitial = impl.attn_bwd(
                    do,
                    *tensors,
                    cu_seqlens=cu_seqlens,
                    dfinal_state=dfinal_state,
                    state_in=state_in,
                    segment_states=segment_states,
                    call_number=call_number,
                    scale=scale,
                    needs_dkdv=needs_dkdv,
                    needs_ddecay=needs_ddecay,
                    needs_dinitial=needs_dinitial,
                    context=context,
                )
            call.finish((dq, dk, dv, ddecay, dinitial))
        dk, dv = (dk, dv) if needs_dkdv else (None, None)
        ddecay, dinitial = ddecay if needs_ddecay else None, dinitial if needs_dinitial else None
        return dq, dk, dv, ddecay, dinitial, None, None


_once_differentiable = once_differentiable(_LightningAttention._backward)
