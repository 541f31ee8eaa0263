"""Scan: one pass over the tokens with the state in registers, forward or reverse.

One kernel computes o, dq, dk and dv: only the roles of the operands change (see `scan`). A second
one computes dk and dv of small heads together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lasp.ops.triton.cumulative import decay_of_segment, remaining
from lasp.ops.triton.hopper import scan as hopper_scan
from lasp.ops.triton.launch_config import (
    COPY_STEP,
    ScanShape,
    Tiles,
    choose_scan,
)
from lasp.ops.triton.launcher import (
    CachedLaunch,
    TensorSpec,
    addressable_spec,
    cached_launch,
    check_operands,
    decay_or_zeros,
    is_addressable,
    is_by_token,
    is_copyable,
    state_numbers,
    strides_or_zeros,
)
from lasp.ops.triton.segments import (
    ALL,
    DocumentStates,
    SegmentChoice,
    Segments,
    divide,
    locate_segment,
)
from lasp.replay import on_device_of, spec


@triton.jit
def _entering_state(
    p_initial, p_segment, p_log_decay, b_log_decay, i_n, i_h, i_boundary, count, outside,
    segment_length, o_a, o_x, m_a, m_x,
    stride_in, stride_ih, stride_ia, stride_ix, stride_sn, stride_sh, stride_sa, stride_sx,
    A: tl.constexpr, BA: tl.constexpr, BX: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_SEGMENT: tl.constexpr, FOLDED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """The block [BA, BX] of the state that enters a segment of `count` tokens, `outside` of whose
    document come before it (reverse: after it)."""
    m_state = m_a[:, None] & m_x[None, :]  # [BA, BX]
    b_state = tl.zeros([BA, BX], dtype=tl.float32)
    if HAS_SEGMENT:
        p_segment += i_boundary * stride_sn + i_h * stride_sh
        p_segment += o_a[:, None] * stride_sa + o_x[None, :] * stride_sx
        if FOLDED:
            # Every row holds what one segment adds: sum over those that come first, nearest last.
            # All of them are whole segments, but for a document's last one in reverse.
            b_segment_decay = tl.exp(b_log_decay * segment_length)
            stride_next = stride_sn if REVERSE else -stride_sn
            num_earlier = tl.cdiv(outside, segment_length).to(tl.int32)
            for i in range(num_earlier):
                p_earlier = p_segment + tl.cast(num_earlier - 1 - i, tl.int64) * stride_next
                b_earlier = tl.load(p_earlier, mask=m_state, other=0.0)
                b_state = b_state * b_segment_decay + b_earlier
        else:
            m_enters = (o_a[:, None] < tl.where(outside > 0, A, 0)) & m_x[None, :]  # [BA, BX]
            b_state += tl.load(p_segment, mask=m_enters, other=0.0)
    if HAS_INITIAL:
        p_initial += i_n * stride_in + i_h * stride_ih
        p_initial += o_a[:, None] * stride_ia + o_x[None, :] * stride_ix
        b_initial = tl.load(p_initial, mask=m_state, other=0.0).to(tl.float32)
        if not BY_TOKEN:
            b_outside_decay = tl.exp(b_log_decay * outside.to(tl.float32))
        elif REVERSE:
            b_outside_decay = remaining(p_log_decay + count, p_log_decay + count + outside)
        else:
            b_outside_decay = remaining(p_log_decay - outside, p_log_decay)
        b_state += b_initial * b_outside_decay
    return b_state


@triton.jit
def _constant_weights(b_log_decay, scale, o_c, BC: tl.constexpr, REVERSE: tl.constexpr):
    """What a chunk multiplies by: (row [BC], of what the state adds to y; column [BC], of what each
    token adds to the state; between [BC, BC] tokens; of the state over the whole chunk)."""
    if REVERSE:
        b_distance = o_c[None, :] - o_c[:, None]  # [BC, BC]
        b_row = tl.exp(b_log_decay * (BC - 1 - o_c))  # [BC]
        b_column = scale * tl.exp(b_log_decay * (o_c + 1))  # [BC]
    else:
        b_distance = o_c[:, None] - o_c[None, :]  # [BC, BC]
        b_row = scale * tl.exp(b_log_decay * (o_c + 1))  # [BC]
        b_column = tl.exp(b_log_decay * (BC - 1 - o_c))  # [BC]
    # Masking comes before exp: no exponent is ever positive.
    b_decay = scale * tl.exp(b_log_decay * tl.maximum(b_distance, 0))  # [BC, BC]
    b_decay = tl.where(b_distance >= 0, b_decay, 0.0)
    return b_row, b_column, b_decay, tl.exp(b_log_decay * BC)


@triton.jit
def _token_weights(
    p_log_decay, t, count, m_c, scale, o_c, BC: tl.constexpr, REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """`_constant_weights` of tokens t + o_c with a decay per token; EXACT: products are float32."""
    # `chunk_of_decay` without its clamps: what tokens outside get reaches only their own rows,
    # which are not stored, and the state after the last chunk.
    b_sums = tl.load(p_log_decay + tl.cast(t, tl.int64) + 1 + o_c, mask=m_c, other=0.0)  # [BC]
    before = tl.load(p_log_decay + tl.maximum(t, 0))
    last = tl.load(p_log_decay + tl.minimum(t + BC, count))
    b_sums -= before
    last -= before
    if not EXACT:
        # Products in 16 bits lose more than differences of these sums do.
        b_sums = b_sums.to(tl.float32)
        last = last.to(tl.float32)
    # Base-2 logarithms, which the exponentials take.
    b_sums *= 1.4426950408889634
    last *= 1.4426950408889634
    b_from_start = tl.exp2(b_sums.to(tl.float32))
    b_to_end = tl.exp2((last - b_sums).to(tl.float32))
    if REVERSE:
        b_row = b_to_end
        b_column = scale * b_from_start
        b_distance = o_c[None, :] - o_c[:, None]  # [BC, BC]
        b_between = b_sums[None, :] - b_sums[:, None]
    else:
        b_row = scale * b_from_start
        b_column = b_to_end
        b_distance = o_c[:, None] - o_c[None, :]  # [BC, BC]
        b_between = b_sums[:, None] - b_sums[None, :]
    b_between = tl.where(b_distance >= 0, b_between.to(tl.float32), -float("inf"))
    return b_row, b_column, scale * tl.exp2(b_between), tl.exp2(last.to(tl.float32))


@triton.jit
def _first_and_mask(i_c, count, o_c, BC: tl.constexpr, REVERSE: tl.constexpr):
    """The first token of a segment's chunk i_c, and which of its tokens are in the segment. Chunks
    are aligned to the start of the scan, so that only the last can be partial: its outgoing state
    is not used, and the weights of a constant decay hold for every chunk."""
    if REVERSE:
        t = count - (i_c + 1) * BC
        m_c = o_c >= -t
    else:
        t = i_c * BC
        m_c = o_c < count - t
    return t, m_c


@triton.jit(do_not_specialize=["scale", "T", "segments_per_row", "segment_length"])
def scan_kernel(
    p_a, p_b, p_x, p_y, p_initial, p_segment, p_log_decay, p_table, p_c, p_dots,
    stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh,
    stride_xb, stride_xt, stride_xh, stride_cb, stride_ct, stride_ch,
    stride_in, stride_ih, stride_ia, stride_ix, stride_sn, stride_sh, stride_sa, stride_sx,
    scale, T, segments_per_row, segment_length, H,
    A: tl.constexpr, X: tl.constexpr, BA: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SEGMENT: tl.constexpr, FOLDED: tl.constexpr, BY_TOKEN: tl.constexpr,
    WITH_DOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NX: tl.constexpr = (X + BX - 1) // BX
    # Value blocks of one head run next to each other: a and b come from L2 for all but the first.
    i_p = tl.program_id(0)
    i_x = i_p % NX
    i_h = (i_p // NX % H).to(tl.int64)
    i_s = i_p // (NX * H)
    i_n, i_b, start, count, outside, i_boundary = locate_segment(
        p_table, i_s, T, segments_per_row, segment_length, PACKED, REVERSE
    )

    o_c = tl.arange(0, BC)
    o_a = tl.arange(0, BA)
    o_x = i_x * BX + tl.arange(0, BX)
    m_a = o_a < A
    m_x = o_x < X
    p_log_decay, b_log_decay = decay_of_segment(p_log_decay, i_b, i_h, start, T, H, BY_TOKEN)
    b_row, b_column, b_decay, b_chunk_decay = _constant_weights(
        b_log_decay, scale, o_c, BC, REVERSE
    )
    b_state = _entering_state(
        p_initial, p_segment, p_log_decay, b_log_decay, i_n, i_h, i_boundary, count, outside,
        segment_length, o_a, o_x, m_a, m_x,
        stride_in, stride_ih, stride_ia, stride_ix, stride_sn, stride_sh, stride_sa, stride_sx,
        A, BA, BX, REVERSE, HAS_INITIAL, HAS_SEGMENT, FOLDED, BY_TOKEN,
    )  # fmt: skip

    p_a += i_b * stride_ab + start * stride_at + i_h * stride_ah
    p_b += i_b * stride_bb + start * stride_bt + i_h * stride_bh
    p_x += i_b * stride_xb + start * stride_xt + i_h * stride_xh
    p_y += ((i_b * T + start) * H + i_h) * X
    if WITH_DOTS:
        p_c += i_b * stride_cb + start * stride_ct + i_h * stride_ch
        p_dots += ((i_b * H + i_h) * NX + i_x) * T + start
        o_ct = o_c[:, None] * stride_ct + o_x[None, :]  # [BC, BX]
    o_at = o_c[:, None] * stride_at + o_a[None, :]  # [BC, BA]
    o_bt = o_c[:, None] * stride_bt + o_a[None, :]  # [BC, BA]
    o_xt = o_c[:, None] * stride_xt + o_x[None, :]  # [BC, BX]
    o_yt = o_c[:, None] * (H * X) + o_x[None, :]  # [BC, BX]
    for i_c in range(tl.cdiv(count, BC)):
        t, m_c = _first_and_mask(i_c, count, o_c, BC, REVERSE)
        i_t = tl.cast(t, tl.int64)
        m_ca = m_c[:, None] & m_a[None, :]  # [BC, BA]
        m_cx = m_c[:, None] & m_x[None, :]  # [BC, BX]
        b_a = tl.load(p_a + i_t * stride_at + o_at, mask=m_ca, other=0.0)  # [BC, BA]
        b_b = tl.load(p_b + i_t * stride_bt + o_bt, mask=m_ca, other=0.0)  # [BC, BA]
        b_x = tl.load(p_x + i_t * stride_xt + o_xt, mask=m_cx, other=0.0)  # [BC, BX]
        if BY_TOKEN:
            b_row, b_column, b_decay, b_chunk_decay = _token_weights(
                p_log_decay, t, count, m_c, scale, o_c, BC, REVERSE,
                p_a.dtype.element_ty == tl.float32,
            )  # fmt: skip
        if WITH_DOTS:
            b_c = tl.load(p_c + i_t * stride_ct + o_ct, mask=m_cx, other=0.0)  # [BC, BX]
        b_s = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION) * b_decay  # [BC, BC]
        b_y = tl.dot(b_a, b_state.to(b_a.dtype), input_precision=PRECISION)  # [BC, BX]
        b_y = tl.dot(b_s.to(b_x.dtype), b_x, acc=b_y * b_row[:, None], input_precision=PRECISION)
        tl.store(p_y + i_t * H * X + o_yt, b_y.to(p_y.dtype.element_ty), mask=m_cx)
        if WITH_DOTS:
            b_dots = tl.sum(b_y * b_c.to(tl.float32), axis=1)  # [BC]
            tl.store(p_dots + i_t + o_c, b_dots, mask=m_c)
        b_weighted = (b_x * b_column[:, None]).to(b_x.dtype)  # [BC, BX]
        b_state = tl.dot(
            tl.trans(b_b), b_weighted, acc=b_state * b_chunk_decay, input_precision=PRECISION
        )  # [BA, BX]


@triton.jit(do_not_specialize=["scale", "T", "segments_per_row", "segment_length"])
def scan_dkdv_kernel(
    p_k, p_q, p_do, p_v, p_dv, p_dk, p_initial, p_segment, p_log_decay, p_table, p_dots,
    stride_kb, stride_kt, stride_kh, stride_qb, stride_qt, stride_qh,
    stride_ob, stride_ot, stride_oh, stride_vb, stride_vt, stride_vh,
    stride_in, stride_ih, stride_ia, stride_ix, stride_sn, stride_sh, stride_sa, stride_sx,
    scale, T, segments_per_row, segment_length, H,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
    PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    FOLDED: tl.constexpr, BY_TOKEN: tl.constexpr, WITH_DOTS: tl.constexpr,
):  # fmt: skip
    """Both reverse scans of a backward, dv = scan(k, q, do, G) and dk = scan(v, do, q, G^T), of
    heads that are one block: they share G, the weights, and what they read."""
    i_p = tl.program_id(0)
    i_h = (i_p % H).to(tl.int64)
    i_s = i_p // H
    i_n, i_b, start, count, outside, i_boundary = locate_segment(
        p_table, i_s, T, segments_per_row, segment_length, PACKED, True
    )

    o_c = tl.arange(0, BC)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    p_log_decay, b_log_decay = decay_of_segment(p_log_decay, i_b, i_h, start, T, H, BY_TOKEN)
    b_row, b_column, b_decay, b_chunk_decay = _constant_weights(b_log_decay, scale, o_c, BC, True)
    b_state = _entering_state(
        p_initial, p_segment, p_log_decay, b_log_decay, i_n, i_h, i_boundary, count, outside,
        segment_length, o_d, o_e, m_d, m_e,
        stride_in, stride_ih, stride_ia, stride_ix, stride_sn, stride_sh, stride_sa, stride_sx,
        D, BD, BE, True, HAS_INITIAL, HAS_SEGMENT, FOLDED, BY_TOKEN,
    )  # fmt: skip

    p_k += i_b * stride_kb + start * stride_kt + i_h * stride_kh
    p_q += i_b * stride_qb + start * stride_qt + i_h * stride_qh
    p_do += i_b * stride_ob + start * stride_ot + i_h * stride_oh
    p_v += i_b * stride_vb + start * stride_vt + i_h * stride_vh
    p_dk += ((i_b * T + start) * H + i_h) * D
    p_dv += ((i_b * T + start) * H + i_h) * E
    if WITH_DOTS:
        p_dots += (i_b * H + i_h) * T + start
    o_kt = o_c[:, None] * stride_kt + o_d[None, :]  # [BC, BD]
    o_qt = o_c[:, None] * stride_qt + o_d[None, :]  # [BC, BD]
    o_ot = o_c[:, None] * stride_ot + o_e[None, :]  # [BC, BE]
    o_vt = o_c[:, None] * stride_vt + o_e[None, :]  # [BC, BE]
    for i_c in range(tl.cdiv(count, BC)):
        t, m_c = _first_and_mask(i_c, count, o_c, BC, True)
        i_t = tl.cast(t, tl.int64)
        m_cd = m_c[:, None] & m_d[None, :]  # [BC, BD]
        m_ce = m_c[:, None] & m_e[None, :]  # [BC, BE]
        b_k = tl.load(p_k + i_t * stride_kt + o_kt, mask=m_cd, other=0.0)  # [BC, BD]
        b_q = tl.load(p_q + i_t * stride_qt + o_qt, mask=m_cd, other=0.0)  # [BC, BD]
        b_do = tl.load(p_do + i_t * stride_ot + o_ot, mask=m_ce, other=0.0)  # [BC, BE]
        b_v = tl.load(p_v + i_t * stride_vt + o_vt, mask=m_ce, other=0.0)  # [BC, BE]
        if BY_TOKEN:
            b_row, b_column, b_decay, b_chunk_decay = _token_weights(
                p_log_decay, t, count, m_c, scale, o_c, BC, True, False
            )
        b_rounded = b_state.to(b_k.dtype)  # [BD, BE]
        b_s = (tl.dot(b_k, tl.trans(b_q)) * b_decay).to(b_k.dtype)  # [BC, BC]
        b_dv = tl.dot(b_s, b_do, acc=tl.dot(b_k, b_rounded) * b_row[:, None])  # [BC, BE]
        o_dv = i_t * H * E + o_c[:, None] * (H * E) + o_e[None, :]  # [BC, BE]
        tl.store(p_dv + o_dv, b_dv.to(p_dv.dtype.element_ty), mask=m_ce)
        b_s = (tl.dot(b_v, tl.trans(b_do)) * b_decay).to(b_k.dtype)  # [BC, BC]
        b_dk = tl.dot(b_s, b_q, acc=tl.dot(b_v, tl.trans(b_rounded)) * b_row[:, None])  # [BC, BD]
        o_dk = i_t * H * D + o_c[:, None] * (H * D) + o_d[None, :]  # [BC, BD]
        tl.store(p_dk + o_dk, b_dk.to(p_dk.dtype.element_ty), mask=m_cd)
        if WITH_DOTS:
            b_dots = tl.sum(b_dk * b_k.to(tl.float32), axis=1)  # [BC]
            tl.store(p_dots + i_t + o_c, b_dots, mask=m_c)
        b_weighted = (b_do * b_column[:, None]).to(b_do.dtype)  # [BC, BE]
        b_state = tl.dot(tl.trans(b_q), b_weighted, acc=b_state * b_chunk_decay)  # [BD, BE]


def scan(
    a: torch.Tensor,
    b: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    segment_states: torch.Tensor | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
    state_rows: tuple[int, ...] | None = None,
    reverse: bool = False,
    dot_with: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Decayed linear attention of a, b [B, T, H, A] over x [B, T, H, X] in one pass.

    Within a document of n tokens, with l = exp(log_decay[h]):

        forward: y_i = scale * (sum_{j<=i} l^(i-j) (a_i . b_j) x_j + l^(i+1) a_i S)
        reverse: y_j = scale * sum_{i>=j} l^(i-j) (a_j . b_i) x_i + l^(n-1-j) a_j S

    So o = scan(q, k, v, S0) and dq = scan(do, v, k, S0^T); with the gradient G of the final state,
    dk = scan(v, do, q, G^T, reverse) and dv = scan(k, q, do, G, reverse). These are the recurrences
    of Lightning Attention-2 (arXiv 2401.04658) with exchanged roles.

    `initial_state` S [N, H, A, X] float32 (any strides) enters each document, None is zero; with
    `state_rows` it has a row for each of those packed documents, in this order, and a last one of
    zeros for all others. `segment_states` [S, H, A, X] float32 (any strides) is what `chunk_states`
    returned for the same tokens; without it one program per head and value block scans each
    document. `cu_seqlens` packs documents (0, ..., T) into a batch of one. `log_decay` [H], or what
    `prepare_decay` returned: then l^(i-j) is the product of the decays of tokens j + 1 to i.

    Returns y [B, T, H, X], contiguous, in a's dtype; with `dot_with` c [B, T, H, X] also y_i . c_i
    of unrounded y, float32 [B, H, blocks of columns, T]. Raises ValueError for dtypes or head dims
    that the kernels do not support.
    """
    operands, states = (a, b, x), (initial_state, segment_states)
    options = dict(cu_seqlens=cu_seqlens, state_rows=state_rows, scale=scale, reverse=reverse)
    if dot_with is not None and not is_addressable(spec(dot_with)):
        dot_with = dot_with.contiguous()
    plan = _cached_plan(operands, states, log_decay, dot_with=dot_with, **options)
    y = torch.empty(x.shape, dtype=a.dtype, device=a.device)
    dots = None
    if dot_with is not None:
        blocks = 1 if plan is None else plan.num_blocks
        B, T, H, _ = x.shape
        dots = torch.empty(B, H, blocks, T, dtype=torch.float32, device=a.device)
    if plan is not None:
        tensors = plan.arguments(operands, (y,), states, log_decay, dot_with, dots)
        with on_device_of(a):
            plan.launch(plan.num_programs, *tensors)
    return y if dots is None else (y, dots)


def scan_dkdv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None = None,
    segment_states: torch.Tensor | None = None,
    with_dots: bool = False,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dk, dv, dots): dk = scan(v, do, q, G^T, reverse) and dv = scan(k, q, do, G, reverse).

    One launch computes both and reads q and do once, if a kernel does that. `initial_state` G and
    `segment_states` are those of dv; other keywords are those of `scan`. `with_dots`: also dk . k,
    as `scan` returns it, else None.
    """
    operands, states = (k, q, do, v), (initial_state, segment_states)
    dot_with = k if with_dots else None
    plan = _cached_plan(operands, states, log_decay, dot_with=dot_with, reverse=True, **options)
    if plan is None:
        names = "initial_state", "segment_states"
        transposed = (None if state is None else state.mT for state in states)
        of_dv, of_dk = (dict(zip(names, each, strict=True)) for each in (states, transposed))
        dv = scan(k, q, do, log_decay, reverse=True, **of_dv, **options)
        options |= dict(dot_with=dot_with, reverse=True)
        dk = scan(v, do, q, log_decay, **of_dk, **options)
        return (dk[0], dv, dk[1]) if with_dots else (dk, dv, None)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dots = None
    if with_dots:
        B, T, H, _ = k.shape
        dots = torch.empty(B, H, plan.num_blocks, T, dtype=torch.float32, device=k.device)
    tensors = plan.arguments(operands, (dv, dk), states, log_decay, None, dots)
    with on_device_of(k):
        plan.launch(plan.num_programs, *tensors)
    return dk, dv, dots


class ScanPlan(NamedTuple):
    """All of a scan's launch that follows from specs, cached by them.

    Attributes:
        launch, num_programs: the kernel without its tensors, and how many programs run.
        segments: of the documents; the launch reads segment states if `has_segment`.
        copies: True for each operand that must be copied for the kernel to address it.
        describes: the launch takes operands and results as descriptors, and results once more.
        num_blocks: blocks of columns, whose dots are apart.
    """

    launch: CachedLaunch
    num_programs: int
    segments: Segments
    has_segment: bool
    copies: tuple[bool, ...]
    describes: bool
    num_blocks: int

    def arguments(self, operands, results, states, log_decay, dot_with, dots) -> tuple:
        """The tensors of the launch, on the operands' device."""
        a = operands[0]
        if True in self.copies:
            pairs = zip(operands, self.copies, strict=True)
            operands = tuple(x.contiguous() if copies else x for x, copies in pairs)
        initial, segment = states
        table, _ = self.segments.device_tables(a.device)
        log_decay = decay_or_zeros(log_decay, a.shape[2], a.device)
        others = initial, segment if self.has_segment else None, log_decay, table
        if not self.describes:
            read = (dot_with,) if len(results) == 1 else ()
            return (*operands, *results, *others, *read, dots)
        if len(results) == 1:
            operands, results = (*operands, dot_with), (*results, None)
        return (*operands, *results, *results, *others, dots)


def _cached_plan(
    operands, states, log_decay, *, dot_with, scale, reverse, cu_seqlens=None, state_rows=None
):
    """The plan of a scan of a, b, x, or of k, q, do, v for dv and dk."""
    # TMA needs aligned addresses.
    read = operands if dot_with is None else (*operands, dot_with)
    aligned = not any(tensor.data_ptr() % COPY_STEP for tensor in read)
    kind = is_by_token(log_decay), spec(dot_with)
    key = (cu_seqlens, state_rows), kind, operands[0].device, aligned, float(scale), reverse
    return plan_scan(tuple(map(spec, operands)), tuple(map(spec, states)), *key)


@functools.lru_cache(maxsize=256)
def plan_scan(
    operands: tuple[TensorSpec, ...],
    states: tuple[TensorSpec | None, ...],
    documents: tuple[tuple[int, ...] | None, ...],
    kind: tuple[bool, TensorSpec | None],
    device: torch.device,
    aligned: bool,
    scale: float,
    reverse: bool,
) -> ScanPlan | None:
    """The plan of a scan; None if there is nothing to compute, or no kernel computes dv and dk.

    Args:
        operands: a, b, x, or k, q, do, v for dv and dk.
        states: initial state and segment states.
        documents: cu_seqlens and state_rows.
        kind: whether there is a decay per token, and what the dots are with, or None.
        aligned: every address is a multiple of COPY_STEP bytes.
    """
    names = ("a", "b", "x") if len(operands) == 3 else ("k", "q", "do", "v")
    check_operands(dict(zip(names, operands, strict=True)))
    (a_shape, _, dtype), (b_shape, *_), (x_shape, *_), *_ = operands
    assert b_shape == a_shape and x_shape[:3] == a_shape[:3], (a_shape, b_shape, x_shape)
    if 0 in a_shape or 0 in x_shape:
        return None
    batch, seq_len, num_heads, key_dim = a_shape
    value_dim = x_shape[3]
    copies = tuple(not is_addressable(operand) for operand in operands)
    operands = tuple(map(addressable_spec, operands))
    cu_seqlens, state_rows = documents
    shape = ScanShape(*a_shape, value_dim, cu_seqlens is not None)
    by_token, dot_with = kind
    read = operands if dot_with is None else (*operands, dot_with)
    copyable = aligned and all(map(is_copyable, read))
    num_results = len(operands) - 2
    choice = choose_scan(
        shape, dtype, device, num_results, copyable=copyable, by_token=by_token,
        with_dots=dot_with is not None,
    )  # fmt: skip
    if choice.num_results < num_results:
        return None
    initial, segment = states
    state_shape = (num_heads, key_dim, value_dim)
    divided = SegmentChoice(seq_len)
    if segment is not None:
        divided = choice.segments
        assert segment[0] == (divided.num_boundaries, *state_shape), (segment, divided)
    rows = ALL if state_rows is None else DocumentStates(state_rows, zeros=True)
    segments = divide(batch, seq_len, cu_seqlens, divided, rows, device.type == "cuda")
    if initial is not None:
        assert initial[0] == (segments.num_states, *state_shape), (initial, segments)
    if segments.single:
        segment = None
    prepare = hopper_scan.prepare if choice.kernel == "hopper" else _prepare
    num_programs, launch, num_blocks = prepare(
        operands, (initial, segment), segments, choice.tiles, scale=scale, reverse=reverse,
        kind=kind, device=device,
    )  # fmt: skip
    return ScanPlan(
        launch,
        num_programs,
        segments,
        segment is not None,
        copies,
        choice.kernel == "hopper",
        num_blocks,
    )


def _prepare(
    operands: Sequence[TensorSpec],
    states: tuple[TensorSpec | None, TensorSpec | None],
    segments: Segments,
    tiles: Tiles,
    *,
    scale: float,
    reverse: bool,
    kind: tuple[bool, TensorSpec | None],
    device: torch.device,
) -> tuple[int, CachedLaunch, int]:
    """(number of programs, launch, blocks of columns of dots) of the Triton scan of a, b, x, or of
    k, q, do, v for dv and dk."""
    pair = len(operands) == 4
    by_token, dot_with = kind
    initial, segment = states
    (_, seq_len, num_heads, key_dim), _, dtype = operands[0]
    value_dim = operands[2][0][-1]
    read = operands if pair else (*operands, dot_with)
    numbers = (
        *strides_or_zeros(read, (0, 1, 2)),
        *state_numbers(states, scale, segments, seq_len, num_heads),
    )
    constants = dict(
        PACKED=segments.packed,
        HAS_INITIAL=initial is not None,
        HAS_SEGMENT=segment is not None,
        FOLDED=segments.folded,
        BY_TOKEN=by_token,
        WITH_DOTS=dot_with is not None,
        BC=tiles.chunk,
    )
    if pair:
        assert reverse
        kernel, num_blocks = scan_dkdv_kernel, 1
        constants |= dict(D=key_dim, E=value_dim, BD=tiles.key, BE=tiles.value)
    else:
        kernel, num_blocks = scan_kernel, triton.cdiv(value_dim, tiles.value)
        constants |= dict(A=key_dim, X=value_dim, BA=tiles.key, BX=tiles.value)
        constants |= dict(REVERSE=reverse, PRECISION="ieee")
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    launch = cached_launch(kernel, numbers, constants, dtype, **options)
    return segments.num_segments * num_heads * num_blocks, launch, num_blocks
