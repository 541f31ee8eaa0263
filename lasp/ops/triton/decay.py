"""A decay per token for the kernels: its cumulative sums, and its gradient."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lasp.ops.triton.cumulative import remaining, row_of_decay
from lasp.ops.triton.launch_config import (
    DECAY_HEADS,
    DECAY_TOKENS,
    DECAY_WARPS,
    GRADIENT_STATE_BLOCK,
    GRADIENT_TOKENS,
    ScanShape,
    choose_segments,
)
from lasp.ops.triton.launcher import CachedLaunch, strides
from lasp.ops.triton.segments import (
    ALL,
    DocumentStates,
    SegmentChoice,
    divide,
    locate_segment,
)
from lasp.replay import on_device_of, spec


@triton.jit
def _load_decays(p_log_decay, i_p, T, H, stride_b, stride_t, stride_h, BT: tl.constexpr,
                 BH: tl.constexpr):  # fmt: skip
    """(float64 [BT, BH], batch row, block, heads, tokens) of a program; zeros outside."""
    NH = tl.cdiv(H, BH)
    blocks = tl.cdiv(T, BT)
    i_h = i_p % NH
    i_t = i_p // NH % blocks
    i_b = (i_p // (NH * blocks)).to(tl.int64)
    o_h = i_h * BH + tl.arange(0, BH)
    o_t = i_t.to(tl.int64) * BT + tl.arange(0, BT)
    o_g = o_t[:, None] * stride_t + o_h[None, :] * stride_h
    m_g = (o_t < T)[:, None] & (o_h < H)[None, :]
    b_g = tl.load(p_log_decay + i_b * stride_b + o_g, mask=m_g, other=0.0)
    # exp of anything below -104 is zero in float32. A decay above 0 must not go unnoticed.
    b_g = tl.where(b_g <= 0.0, tl.maximum(b_g, -128.0), float("nan"))
    return b_g.to(tl.float64), i_b, i_t, o_h, o_t


@triton.jit(do_not_specialize=["T"])
def block_sums_kernel(
    p_log_decay, p_sums, T, H, stride_b, stride_t, stride_h, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Sums over blocks of BT tokens, [B, H, blocks]."""
    b_g, i_b, i_t, o_h, _ = _load_decays(
        p_log_decay, tl.program_id(0), T, H, stride_b, stride_t, stride_h, BT, BH
    )
    p_sums += (i_b * H + o_h) * tl.cdiv(T, BT) + i_t
    tl.store(p_sums, tl.sum(b_g, axis=0), mask=o_h < H)


@triton.jit(do_not_specialize=["T"])
def cumulate_kernel(
    p_log_decay, p_sums, p_cumulative, T, H, stride_b, stride_t, stride_h, BT: tl.constexpr,
    BH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Cumulative sums [B, H, T + 1]: entry t sums the tokens before t."""
    b_g, i_b, i_t, o_h, o_t = _load_decays(
        p_log_decay, tl.program_id(0), T, H, stride_b, stride_t, stride_h, BT, BH
    )
    m_h = o_h < H
    p_sums += (i_b * H + o_h)[:, None] * tl.cdiv(T, BT)
    o_b = tl.arange(0, BLOCKS)
    b_earlier = tl.zeros([BH, BLOCKS], dtype=tl.float64)
    for i in range(0, i_t, BLOCKS):
        m_b = m_h[:, None] & (o_b + i < i_t)[None, :]
        b_earlier += tl.load(p_sums + i + o_b[None, :], mask=m_b, other=0.0)
    b_sum = tl.cumsum(b_g, axis=0) + tl.sum(b_earlier, axis=1)[None, :]
    p_cumulative += (i_b * H + o_h) * (T + 1)
    m_g = (o_t < T)[:, None] & m_h[None, :]
    tl.store(p_cumulative[None, :] + 1 + o_t[:, None], b_sum, mask=m_g)
    m_first = o_h < tl.where(i_t == 0, H, 0)
    tl.store(p_cumulative, tl.zeros([BH], dtype=tl.float64), mask=m_first)


def prepare_decay(log_decay: torch.Tensor) -> torch.Tensor:
    """The cumulative sums [B, H, T + 1], float64, of log_decay [B, T, H] (any strides).

    Entry t sums the tokens before t of the batch row, whichever documents they belong to. Values
    above 0 and NaN make all later entries NaN.
    """
    B, T, H = log_decay.shape
    options = dict(dtype=torch.float64, device=log_decay.device)
    if T == 0:
        return torch.zeros(B, H, 1, **options)
    blocks = triton.cdiv(T, DECAY_TOKENS)
    sums = torch.empty(B, H, blocks, **options)
    cumulative = torch.empty(B, H, T + 1, **options)
    programs = B * blocks * triton.cdiv(H, DECAY_HEADS)
    sum_blocks, cumulate = _cumulate_launches(spec(log_decay))
    with on_device_of(log_decay):
        sum_blocks(programs, log_decay, sums)
        cumulate(programs, log_decay, sums, cumulative)
    return cumulative


@functools.lru_cache(maxsize=256)
def _cumulate_launches(log_decay) -> tuple[CachedLaunch, CachedLaunch]:
    (_, T, H), *_ = log_decay
    numbers = (T, H, *strides(log_decay, (0, 1, 2)))
    tile = dict(BT=DECAY_TOKENS, BH=DECAY_HEADS)
    sum_blocks = CachedLaunch(block_sums_kernel, numbers, tile, num_warps=DECAY_WARPS)
    tile |= dict(BLOCKS=DECAY_TOKENS)
    return sum_blocks, CachedLaunch(cumulate_kernel, numbers, tile, num_warps=DECAY_WARPS)


def decay_sums(
    cumulative: torch.Tensor,
    cu_seqlens: tuple[int, ...] | None,
    state_rows: tuple[int, ...] | None,
) -> torch.Tensor:
    """The log of what remains of a state after each row of `chunk_states`, float64 [N, H]."""
    if cu_seqlens is None:
        return cumulative[:, :, -1]
    bounds = _bounds(cu_seqlens, state_rows, cumulative.is_cuda)
    starts, stops = cumulative[0].mT[bounds.to(cumulative.device, non_blocking=True)]
    return stops - starts


@functools.lru_cache(maxsize=256)
def _bounds(cu_seqlens, state_rows, pinned) -> torch.Tensor:
    """Starts and stops of the rows, int64 [2, N] on the host."""
    rows = range(len(cu_seqlens) - 1) if state_rows is None else state_rows
    ends = [[cu_seqlens[row + end] for row in rows] for end in (0, 1)]
    bounds = torch.tensor(ends, dtype=torch.int64)
    # A copy from pageable memory would make the host wait.
    return bounds.pin_memory() if pinned else bounds


@triton.jit(do_not_specialize=["T", "segments_per_row", "segment_length"])
def boundary_gradient_kernel(
    p_gradients, p_states, p_grads, p_initial, p_final, p_cumulative, p_table, p_final_table,
    stride_in, stride_ih, stride_id, stride_ie, stride_fn, stride_fh, stride_fd, stride_fe,
    T, segments_per_row, segment_length, H,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """[S, H]: the dot product of each state that crosses a boundary with its gradient."""
    i_p = tl.program_id(0)
    i_h = (i_p % H).to(tl.int64)
    i_s = i_p // H
    i_n, i_b, start, count, outside, i_boundary = locate_segment(
        p_table, i_s, T, segments_per_row, segment_length, PACKED, False
    )
    i_m, _, _, _, beyond, _ = locate_segment(
        p_final_table, i_s, T, segments_per_row, segment_length, PACKED, True
    )
    p_cumulative = row_of_decay(p_cumulative, i_b, i_h, T, H) + start
    if outside > 0:
        b_enters = remaining(p_cumulative - outside, p_cumulative)
        b_leaves = remaining(p_cumulative, p_cumulative + count + beyond)
        row = (i_boundary * H + i_h) * (D * E)
        b_sum = tl.zeros([BLOCK], dtype=tl.float32)
        for i in range(0, D * E, BLOCK):
            o = i + tl.arange(0, BLOCK)
            m = o < D * E
            b_state = tl.load(p_states + row + o, mask=m, other=0.0)
            b_grad = tl.load(p_grads + row + o, mask=m, other=0.0)
            if HAS_INITIAL:
                o_i = i_n * stride_in + i_h * stride_ih + o // E * stride_id + o % E * stride_ie
                b_state += b_enters * tl.load(p_initial + o_i, mask=m, other=0.0).to(tl.float32)
            if HAS_FINAL:
                o_f = i_m * stride_fn + i_h * stride_fh + o // E * stride_fd + o % E * stride_fe
                b_grad += b_leaves * tl.load(p_final + o_f, mask=m, other=0.0).to(tl.float32)
            b_sum += b_state * b_grad
        tl.store(p_gradients + i_boundary * H + i_h, tl.sum(b_sum, axis=0))


@triton.jit
def _load_step(
    p_q_dots, p_k_dots, o_t, m_t, T, NQ: tl.constexpr, NK: tl.constexpr, BT: tl.constexpr
):
    """What the gradient loses after each token: q . dq - k . dk, summed over blocks of columns."""
    b_step = tl.zeros([BT], dtype=tl.float64)
    for i in tl.static_range(NQ):
        b_step += tl.load(p_q_dots + i * T + o_t, mask=m_t, other=0.0).to(tl.float64)
    for i in tl.static_range(NK):
        b_step -= tl.load(p_k_dots + i * T + o_t, mask=m_t, other=0.0).to(tl.float64)
    return b_step


@triton.jit(do_not_specialize=["T", "segments_per_row", "segment_length"])
def decay_gradient_kernel(
    p_q_dots, p_k_dots, p_boundary, p_start, p_out, p_steps, p_table,
    T, segments_per_row, segment_length, H,
    NQ: tl.constexpr, NK: tl.constexpr, BT: tl.constexpr, PACKED: tl.constexpr,
    HAS_BOUNDARY: tl.constexpr, HAS_START: tl.constexpr, ENDS_IN_ZERO: tl.constexpr,
):  # fmt: skip
    """The gradient within a segment, from that at its start, and at its end where it is known.

    Rounding adds up along the tokens: what is off at the end is taken back in proportion.
    """
    i_p = tl.program_id(0)
    i_h = (i_p % H).to(tl.int64)
    i_s = i_p // H
    i_n, i_b, start, count, outside, i_boundary = locate_segment(
        p_table, i_s, T, segments_per_row, segment_length, PACKED, False
    )
    _, _, _, _, beyond, i_end = locate_segment(
        p_table, i_s, T, segments_per_row, segment_length, PACKED, True
    )
    first = tl.zeros([], dtype=tl.float64)
    if HAS_START:
        inside = tl.load(p_start + i_n * H + i_h).to(tl.float64)
        first = tl.where(outside > 0, first, inside)
    last = tl.zeros([], dtype=tl.float64)
    if HAS_BOUNDARY:
        first += tl.load(p_boundary + i_boundary * H + i_h, mask=outside > 0, other=0.0)
        last += tl.load(p_boundary + i_end * H + i_h, mask=beyond > 0, other=0.0)

    p_q_dots += (i_b * H + i_h) * NQ * T + start
    p_k_dots += (i_b * H + i_h) * NK * T + start
    p_out += (i_b * T + start) * H + i_h
    o_t = tl.arange(0, BT)
    b_total = tl.zeros([BT], dtype=tl.float64)
    p_steps += (i_b * H + i_h) * T + start
    for t in range(0, count, BT):
        m_t = t + o_t < count
        b_step = _load_step(p_q_dots, p_k_dots, t + o_t, m_t, T, NQ, NK, BT)
        # Each thread reads again what it has written.
        tl.store(p_steps + t + o_t, b_step, mask=m_t)
        b_total += b_step
    slope = (last - first + tl.sum(b_total, axis=0)) / tl.maximum(count, 1).to(tl.float64)
    if not ENDS_IN_ZERO:
        slope = tl.where(beyond > 0, slope, 0.0)
    for t in range(0, count, BT):
        m_t = t + o_t < count
        b_step = tl.load(p_steps + t + o_t, mask=m_t, other=0.0)
        b_before = tl.cumsum(b_step, axis=0) - b_step
        b_gradient = first - b_before + slope * (t + o_t).to(tl.float64)
        o_out = (t + o_t).to(tl.int64) * H
        tl.store(p_out + o_out, b_gradient.to(tl.float32), mask=m_t)
        first -= tl.sum(b_step, axis=0)


def decay_gradient(
    q_dots: torch.Tensor,
    k_dots: torch.Tensor,
    cumulative: torch.Tensor,
    *,
    start: torch.Tensor | None,
    segment_states: tuple[torch.Tensor | None, torch.Tensor | None],
    entering: tuple[tuple, tuple],
    cu_seqlens: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The gradient of a decay per token, float32 [B, T, H].

    It falls by q_t . dq_t - k_t . dk_t after token t (`lasp.ops.chunked`). These terms nearly
    cancel, and their rounding adds up, so the sum starts anew at every boundary of a segment: there
    the gradient is the dot product of the state that crosses it with that state's gradient.

    Args:
        q_dots, k_dots: float32 [B, H, blocks of columns, T], as the scans returned them.
        start: [N, H], the gradient at the first token of each document; None: zeros.
        segment_states: what `chunk_states` returned, forward and reverse; a boundary's row holds
            all that crosses it.
        entering: of the forward and of the reverse scan, (initial state or None, state_rows).
    """
    B, H, _, T = q_dots.shape
    gradient = torch.empty(B, T, H, dtype=torch.float32, device=q_dots.device)
    if T == 0:
        return gradient
    on_gpu, packed = q_dots.is_cuda, cu_seqlens is not None
    choice = SegmentChoice(T)
    if segment_states[0] is not None:
        _, _, *sizes = segment_states[0].shape
        choice = choose_segments(ScanShape(B, T, H, *sizes, packed), q_dots.device, by_token=True)
    documents = divide(B, T, cu_seqlens, choice, ALL, on_gpu)
    boundary = None
    geometry = (T, documents.per_row, documents.length, H)
    with on_device_of(q_dots):
        table, _ = documents.device_tables(q_dots.device)
        if not documents.single and segment_states[0] is not None:
            boundary = torch.empty(documents.num_boundaries, H, dtype=torch.float32,
                                   device=q_dots.device)  # fmt: skip
            tables = []
            for state, rows in entering:
                states = ALL if state is None or rows is None else DocumentStates(rows, zeros=True)
                tables.append(divide(B, T, cu_seqlens, choice, states, on_gpu))
            tables = [each.device_tables(q_dots.device)[0] for each in tables]
            states = segment_states
            (initial, _), (final, _) = entering
            launch = _boundary_launch(spec(states[0]), spec(initial), spec(final), geometry,
                                      cu_seqlens is not None)  # fmt: skip
            launch(documents.num_segments * H, boundary, *states, initial, final, cumulative,
                   *tables)  # fmt: skip
        launch = _gradient_launch(
            (q_dots.shape[2], k_dots.shape[2]), geometry, cu_seqlens is not None,
            boundary is not None, start is not None, entering[1][0] is None,
        )  # fmt: skip
        if start is not None:
            start = start.contiguous()
        steps = torch.empty(B, H, T, dtype=torch.float64, device=q_dots.device)
        launch(documents.num_segments * H, q_dots, k_dots, boundary, start, gradient, steps, table)
    return gradient


@functools.lru_cache(maxsize=256)
def _boundary_launch(states, initial, final, geometry, packed) -> CachedLaunch:
    (_, _, D, E), *_ = states
    numbers = []
    for each in (initial, final):
        numbers += (0,) * 4 if each is None else strides(each, (0, 1, 2, 3))
    constants = dict(
        D=D,
        E=E,
        BLOCK=GRADIENT_STATE_BLOCK,
        PACKED=packed,
        HAS_INITIAL=initial is not None,
        HAS_FINAL=final is not None,
    )
    return CachedLaunch(boundary_gradient_kernel, (*numbers, *geometry), constants, num_warps=4)


@functools.lru_cache(maxsize=256)
def _gradient_launch(blocks, geometry, packed, has_boundary, has_start, ends_in_zero):
    constants = dict(
        NQ=blocks[0],
        NK=blocks[1],
        BT=GRADIENT_TOKENS,
        PACKED=packed,
        HAS_BOUNDARY=has_boundary,
        HAS_START=has_start,
        ENDS_IN_ZERO=ends_in_zero,
    )
    return CachedLaunch(decay_gradient_kernel, geometry, constants, num_warps=4)
