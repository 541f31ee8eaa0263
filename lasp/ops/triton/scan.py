"""Scan: one pass over the tokens with the state in registers, forward or reverse.

The same kernel computes o, dq, dk and dv; only the roles of the operands change (see `scan`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lasp.ops.triton.hopper import scan as hopper_scan
from lasp.ops.triton.launch_config import (
    ScanChoice,
    SegmentChoice,
    Tiles,
    choose_scan,
    scan_shape,
)
from lasp.ops.triton.launcher import (
    CachedLaunch,
    TensorSpec,
    addressable,
    check_operands,
    decay_or_zeros,
    on_device_of,
    spec,
    state_strides,
    strides,
)
from lasp.ops.triton.segments import ALL, DocumentStates, divide, locate_segment


@triton.jit(do_not_specialize=["scale", "T", "segments_per_row", "segment_length"])
def scan_kernel(
    p_a, p_b, p_x, p_y, p_initial, p_segment, p_log_decay, p_table,
    stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh,
    stride_xb, stride_xt, stride_xh,
    stride_in, stride_ih, stride_ia, stride_ix, stride_sn, stride_sh, stride_sa, stride_sx,
    scale, T, segments_per_row, segment_length, H,
    A: tl.constexpr, X: tl.constexpr, BA: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SEGMENT: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr,
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
    m_state = m_a[:, None] & m_x[None, :]  # [BA, BX]

    # A head's decay is constant, so its matrix is built once. Chunks lie against the side that the
    # scan starts from: only the last one met can be short, and no state leaves that one, so these
    # factors hold for every chunk. Masking comes before exp: no exponent is ever positive.
    b_log_decay = tl.load(p_log_decay + i_h)
    if REVERSE:
        b_distance = o_c[None, :] - o_c[:, None]  # [BC, BC]
        b_row = tl.exp(b_log_decay * (BC - 1 - o_c))  # [BC]
        b_column = scale * tl.exp(b_log_decay * (o_c + 1))  # [BC]
    else:
        b_distance = o_c[:, None] - o_c[None, :]  # [BC, BC]
        b_row = scale * tl.exp(b_log_decay * (o_c + 1))  # [BC]
        b_column = tl.exp(b_log_decay * (BC - 1 - o_c))  # [BC]
    b_decay = scale * tl.exp(b_log_decay * tl.maximum(b_distance, 0))  # [BC, BC]
    b_decay = tl.where(b_distance >= 0, b_decay, 0.0)
    b_chunk_decay = tl.exp(b_log_decay * BC)

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
        b_state += b_initial * tl.exp(b_log_decay * outside.to(tl.float32))

    p_a += i_b * stride_ab + start * stride_at + i_h * stride_ah
    p_b += i_b * stride_bb + start * stride_bt + i_h * stride_bh
    p_x += i_b * stride_xb + start * stride_xt + i_h * stride_xh
    p_y += ((i_b * T + start) * H + i_h) * X
    o_at = o_c[:, None] * stride_at + o_a[None, :]  # [BC, BA]
    o_bt = o_c[:, None] * stride_bt + o_a[None, :]  # [BC, BA]
    o_xt = o_c[:, None] * stride_xt + o_x[None, :]  # [BC, BX]
    o_yt = o_c[:, None] * (H * X) + o_x[None, :]  # [BC, BX]
    for i_c in range(tl.cdiv(count, BC)):
        if REVERSE:
            t = count - (i_c + 1) * BC
            m_c = o_c >= -t
        else:
            t = i_c * BC
            m_c = o_c < count - t
        i_t = tl.cast(t, tl.int64)
        m_ca = m_c[:, None] & m_a[None, :]  # [BC, BA]
        m_cx = m_c[:, None] & m_x[None, :]  # [BC, BX]
        b_a = tl.load(p_a + i_t * stride_at + o_at, mask=m_ca, other=0.0)  # [BC, BA]
        b_b = tl.load(p_b + i_t * stride_bt + o_bt, mask=m_ca, other=0.0)  # [BC, BA]
        b_x = tl.load(p_x + i_t * stride_xt + o_xt, mask=m_cx, other=0.0)  # [BC, BX]
        b_s = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION) * b_decay  # [BC, BC]
        b_y = tl.dot(b_a, b_state.to(b_a.dtype), input_precision=PRECISION)  # [BC, BX]
        b_y = tl.dot(b_s.to(b_x.dtype), b_x, acc=b_y * b_row[:, None], input_precision=PRECISION)
        tl.store(p_y + i_t * H * X + o_yt, b_y.to(p_y.dtype.element_ty), mask=m_cx)
        b_weighted = (b_x * b_column[:, None]).to(b_x.dtype)  # [BC, BX]
        b_state = tl.dot(
            tl.trans(b_b), b_weighted, acc=b_state * b_chunk_decay, input_precision=PRECISION
        )  # [BA, BX]


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
) -> torch.Tensor:
    """Decayed linear attention of a, b [B, T, H, A] over x [B, T, H, X] in one pass.

    Within a document of n tokens, with l = exp(log_decay[h]):

        forward: y_i = scale * (sum_{j<=i} l^(i-j) (a_i . b_j) x_j + l^(i+1) a_i S)
        reverse: y_j = scale * sum_{i>=j} l^(i-j) (a_j . b_i) x_i + l^(n-1-j) a_j S

    So o = scan(q, k, v, S0) and dq = scan(do, v, k, S0^T); with the gradient G of the final state,
    dk = scan(v, do, q, G^T, reverse) and dv = scan(k, q, do, G, reverse). These are the recurrences
    of Lightning Attention-2 (arXiv 2401.04658) with exchanged roles instead of further kernels.

    `initial_state` S [N, H, A, X] float32 (any strides) enters each document, None is zero; with
    `state_rows` it has a row for each of those packed documents, in this order, and a last one of
    zeros for all others. `segment_states` [S, H, A, X] float32 (any strides) is what `chunk_states`
    returned for the same tokens; without it one program per head and value block scans each
    document. `cu_seqlens` packs documents (0, ..., T) into a batch of one. Returns y [B, T, H, X],
    contiguous, in a's dtype. Raises ValueError for dtypes or head dims that the kernels do not
    support.
    """
    check_operands(a=a, b=b, x=x)
    assert b.shape == a.shape and x.shape[:3] == a.shape[:3], (a.shape, b.shape, x.shape)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    operands = [addressable(operand) for operand in (a, b, x)]
    with on_device_of(a):
        launch, arguments, descriptors = _prepare(
            _choose(operands, cu_seqlens),
            operands,
            (y,),
            log_decay,
            scale=scale,
            initial_state=initial_state,
            segment_states=segment_states,
            cu_seqlens=cu_seqlens,
            state_rows=state_rows,
            reverse=reverse,
        )
        launch(*arguments, leading=descriptors)
    return y


def scan_dkdv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None = None,
    segment_states: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk = scan(v, do, q, G^T, reverse) and dv = scan(k, q, do, G, reverse): (dk, dv).

    One launch computes both and reads q and do once, if a kernel does that. `initial_state` G and
    `segment_states` are those of dv; other keywords are those of `scan`.
    """
    check_operands(q=q, k=k, v=v, do=do)
    operands = k, q, do, v = [addressable(operand) for operand in (k, q, do, v)]
    states = dict(initial_state=initial_state, segment_states=segment_states)
    if k.numel() and v.numel():
        choice = _choose(operands, options.get("cu_seqlens"))
        if choice.num_results == 2:
            dv, dk = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v, k))
            with on_device_of(k):
                launch, arguments, descriptors = _prepare(
                    choice, operands, (dv, dk), log_decay, reverse=True, **states, **options
                )
                launch(*arguments, leading=descriptors)
            return dk, dv
    dv = scan(k, q, do, log_decay, reverse=True, **states, **options)
    states = {name: None if s is None else s.mT for name, s in states.items()}
    return scan(v, do, q, log_decay, reverse=True, **states, **options), dv


def _choose(operands: Sequence[torch.Tensor], cu_seqlens: tuple[int, ...] | None) -> ScanChoice:
    """The kernel for a, b, x, or for the k, q, do, v of dv and dk."""
    a, _, x, *_ = operands
    key = scan_shape(a, x, cu_seqlens), a.dtype, a.device, len(operands) - 2
    choice = choose_scan(*key)
    if choice.kernel == "hopper" and not all(map(hopper_scan.copyable, operands)):
        choice = choose_scan(*key, copyable=False)
    return choice


def _prepare(
    choice: ScanChoice,
    operands: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    log_decay: torch.Tensor | None,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
    segment_states: torch.Tensor | None,
    cu_seqlens: tuple[int, ...] | None = None,
    state_rows: tuple[int, ...] | None = None,
    reverse: bool = False,
) -> tuple[CachedLaunch, tuple, tuple]:
    """(launch of the chosen kernel, number of programs and tensors, descriptors) for `results`."""
    a, _, x, *_ = operands
    batch, seq_len, num_heads, _ = a.shape
    shape = (*a.shape[2:], x.shape[-1])
    if segment_states is not None:
        parts = choice.segments
        assert segment_states.shape == (parts.num_boundaries, *shape), segment_states.shape
    else:
        parts = SegmentChoice(seq_len)
    documents = ALL if state_rows is None else DocumentStates(state_rows, zeros=True)
    segments = divide(batch, seq_len, cu_seqlens, parts, documents, a.is_cuda)
    if initial_state is not None:
        assert initial_state.shape == (segments.num_states, *shape), initial_state.shape
    if segments.single:
        segment_states = None
    log_decay = decay_or_zeros(log_decay, num_heads, a.device)
    table, _ = segments.device_tables(a.device)
    others = initial_state, segment_states, log_decay, table
    if choice.kernel == "hopper":
        return hopper_scan.prepare(
            operands, results, others, segments, choice.tiles, scale=float(scale), reverse=reverse
        )
    specs = tuple(spec(tensor) for tensor in (*operands, *others[:2]))
    programs, launch = _scan_launch(specs, segments.key, choice.tiles, float(scale), reverse)
    return launch, (programs, *operands, *results, *others), ()


@functools.lru_cache(maxsize=1024)
def _scan_launch(
    specs: tuple[TensorSpec | None, ...],
    segments: tuple,
    tiles: Tiles,
    scale: float,
    reverse: bool,
) -> tuple[int, CachedLaunch]:
    """How many programs run, and the launch; `segments` is `Segments.key`."""
    a, b, x, initial, segment = specs
    (_, seq_len, num_heads, key_dim), *_ = a
    value_dim = x[0][-1]
    _, num_segments, per_row, length, folded, packed = segments
    numbers = (
        *strides(a, (0, 1, 2)),
        *strides(b, (0, 1, 2)),
        *strides(x, (0, 1, 2)),
        *state_strides(initial),
        *state_strides(segment),
        scale,
        seq_len,
        per_row,
        length,
        num_heads,
    )
    constants = dict(
        A=key_dim,
        X=value_dim,
        BA=tiles.key,
        BX=tiles.value,
        BC=tiles.chunk,
        REVERSE=reverse,
        PACKED=packed,
        HAS_INITIAL=initial is not None,
        HAS_SEGMENT=segment is not None,
        FOLDED=folded,
        PRECISION="ieee",
    )
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    launch = CachedLaunch(scan_kernel, numbers, constants, **options)
    return num_segments * num_heads * triton.cdiv(value_dim, tiles.value), launch
