"""The states that enter every segment, and every document's local state.

The state kernel sums decayed k v^T over each segment; the combine kernel turns these sums into the
states that cross the boundaries.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lasp.ops.triton.cumulative import (
    chunk_of_decay,
    decay_of_segment,
    remaining,
    row_of_decay,
)
from lasp.ops.triton.launch_config import (
    COMBINE_BLOCK,
    COMBINE_STAGES,
    COMBINE_WARPS,
    ScanShape,
    choose_segments,
    state_tiles,
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
    strides,
)
from lasp.ops.triton.segments import NONE, DocumentStates, Segments, divide, locate_segment
from lasp.replay import on_device_of, spec


@triton.jit
def _first_chunk_that_counts(
    p_cumulative, count, num_chunks, BC: tl.constexpr, REVERSE: tl.constexpr
):
    """The first chunk of which more than exp(-104) is left where the state leaves, or the last."""
    low = num_chunks * 0
    high = tl.maximum(num_chunks - 1, 0)
    edge = tl.load(p_cumulative + (tl.minimum(count, 1) if REVERSE else count))
    while low < high:
        middle = (low + high) // 2
        if REVERSE:
            left = tl.load(p_cumulative + (num_chunks - 1 - middle) * BC + 1) - edge
        else:
            left = edge - tl.load(p_cumulative + count - (num_chunks - 1 - middle) * BC)
        nothing = left < -104.0
        low = tl.where(nothing, middle + 1, low)
        high = tl.where(nothing, high, middle)
    return low


@triton.jit(do_not_specialize=["scale", "T", "segments_per_row", "segments_run", "segment_length"])
def state_kernel(
    p_k, p_v, p_states, p_total, p_log_decay, p_table,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    scale, T, segments_per_row, segments_run, segment_length, H,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, WITH_TOTAL: tl.constexpr,
    BY_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ND: tl.constexpr = (D + BD - 1) // BD
    NE: tl.constexpr = (E + BE - 1) // BE
    # Blocks of one head run next to each other: what they both read comes from L2 the second time.
    i_p = tl.program_id(0)
    i_e = i_p % NE
    i_d = i_p // NE % ND
    i_h = (i_p // (NE * ND) % H).to(tl.int64)
    i_s = i_p // (NE * ND * H)
    if not PACKED:
        # If only the states between segments are needed, those that end a row are not computed.
        skipped = segments_per_row - segments_run if REVERSE else 0
        i_s = i_s // segments_run * segments_per_row + i_s % segments_run + skipped
    # Called with the opposite direction, to get the tokens after the segment and the outgoing
    # boundary.
    i_n, i_b, start, count, beyond, i_boundary = locate_segment(
        p_table, i_s, T, segments_per_row, segment_length, PACKED, not REVERSE
    )

    o_c = tl.arange(0, BC)
    o_d = i_d * BD + tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    # The partial chunk comes first, while the state is zero, and is aligned so that all chunks
    # share the same weights, if the decay is constant.
    p_log_decay, b_log_decay = decay_of_segment(p_log_decay, i_b, i_h, start, T, H, BY_TOKEN)
    if REVERSE:
        b_weight = tl.exp(b_log_decay * o_c)  # [BC]
    else:
        b_weight = tl.exp(b_log_decay * (BC - 1 - o_c))  # [BC]
    b_chunk_decay = tl.exp(b_log_decay * BC)

    p_k += i_b * stride_kb + start * stride_kt + i_h * stride_kh
    p_v += i_b * stride_vb + start * stride_vt + i_h * stride_vh
    o_k = o_c[:, None] * stride_kt + o_d[None, :]  # [BC, BD]
    o_v = o_c[:, None] * stride_vt + o_e[None, :]  # [BC, BE]
    b_state = tl.zeros([BD, BE], dtype=tl.float32)
    num_chunks = tl.cdiv(count, BC)
    if PACKED:
        # The state that ends a document is not needed, and most documents are one segment.
        is_needed = beyond > 0
        if WITH_TOTAL:
            is_needed = is_needed | (i_n >= 0)
        num_chunks = tl.where(is_needed, num_chunks, 0)
    # Tokens so far from where the state leaves that exp(-104) = 0 in float32 add nothing to it:
    # heads of fast decay read only a part of the segment.
    b_reach = tl.minimum(104.0 / tl.maximum(-b_log_decay, 1e-9), 2.0**30).to(tl.int32)
    first_chunk = tl.maximum(num_chunks - 2 - b_reach // BC, 0)
    if BY_TOKEN:
        first_chunk = _first_chunk_that_counts(p_log_decay, count, num_chunks, BC, REVERSE)
    for i_c in range(first_chunk, num_chunks):
        if REVERSE:
            t = (num_chunks - 1 - i_c) * BC
            m_c = o_c < count - t
        else:
            t = count - (num_chunks - i_c) * BC
            m_c = o_c >= -t
        b_k = tl.load(
            p_k + t.to(tl.int64) * stride_kt + o_k, mask=m_c[:, None] & m_d[None, :], other=0.0
        )  # [BC, BD]
        b_v = tl.load(
            p_v + t.to(tl.int64) * stride_vt + o_v, mask=m_c[:, None] & m_e[None, :], other=0.0
        )  # [BC, BE]
        if BY_TOKEN:
            b_sums, before, last = chunk_of_decay(p_log_decay, t, count, o_c, BC)
            if REVERSE:
                # From the first token of this chunk, to which the state so far is brought.
                p_first = p_log_decay + t + 1
                first = tl.load(p_first)
                b_weight = tl.exp((b_sums - first).to(tl.float32))
                b_chunk_decay = remaining(p_first, p_log_decay + tl.minimum(t + BC + 1, count))
            else:
                b_weight = tl.exp((last - b_sums).to(tl.float32))
                b_chunk_decay = tl.exp((last - before).to(tl.float32))
        b_v = (b_v * b_weight[:, None]).to(b_v.dtype)
        b_state = tl.dot(
            tl.trans(b_k), b_v, acc=b_state * b_chunk_decay, input_precision=PRECISION
        )  # [BD, BE]

    if REVERSE:
        # Not part of the weights: a log decay of -50 alone would round a float16 operand to zero.
        if BY_TOKEN:
            b_state *= scale * remaining(p_log_decay, p_log_decay + tl.minimum(count, 1))
        else:
            b_state *= scale * tl.exp(b_log_decay)
    m_state = m_d[:, None] & m_e[None, :]  # [BD, BE]
    o_state = o_d[:, None] * E + o_e[None, :]
    if beyond > 0:
        tl.store(p_states + (i_boundary * H + i_h) * (D * E) + o_state, b_state, mask=m_state)
    elif WITH_TOTAL:
        m_total = (o_d < tl.where(i_n >= 0, D, 0))[:, None] & m_e[None, :]  # [BD, BE]
        tl.store(p_total + (i_n * H + i_h) * (D * E) + o_state, b_state, mask=m_total)


@triton.jit(do_not_specialize=["T", "segments_per_row", "segment_length"])
def combine_kernel(
    p_states, p_total, p_log_decay, p_documents,
    T, segments_per_row, segment_length, H,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    STORE: tl.constexpr, WITH_TOTAL: tl.constexpr, BY_TOKEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_p = tl.program_id(0)
    i_h = (i_p // NB % H).to(tl.int64)
    i_n = (i_p // (NB * H)).to(tl.int64)
    if PACKED:
        first_boundary = tl.load(p_documents + i_n * 5)
        count = tl.load(p_documents + i_n * 5 + 1).to(tl.int32)
        last_length = tl.load(p_documents + i_n * 5 + 2).to(tl.int32)
        first_token = tl.load(p_documents + i_n * 5 + 4)
        i_n = tl.load(p_documents + i_n * 5 + 3)
        i_b = i_n * 0
    else:
        count = segments_per_row - 1
        first_boundary = i_n * count
        last_length = T - (segments_per_row - 1) * segment_length
        first_token = i_n * 0
        i_b = i_n

    if BY_TOKEN:
        # The first boundary's entry, and the step to the next one.
        p_log_decay = row_of_decay(p_log_decay, i_b, i_h, T, H) + first_token
        length = tl.cast(count, tl.int64) * segment_length + last_length
        first_length = tl.minimum(length, segment_length)
        b_last_decay = remaining(p_log_decay + length - last_length, p_log_decay + length)
        b_first_decay = remaining(p_log_decay, p_log_decay + first_length)
        b_decay = b_first_decay
    else:
        b_log_decay = tl.load(p_log_decay + i_h)
        b_decay = tl.exp(b_log_decay * segment_length)
        b_first_decay = b_decay
        b_last_decay = tl.exp(b_log_decay * last_length)
    o_s = i_p % NB * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    p_states += (first_boundary * H + i_h) * SIZE
    if WITH_TOTAL:
        p_total += (i_n * H + i_h) * SIZE
        m_total = o_s < tl.where(i_n >= 0, SIZE, 0)
    b_state = tl.zeros([BLOCK], dtype=tl.float32)
    # In place: later rows, whose loads may already be in flight, are elsewhere.
    for i in tl.range(0, count, num_stages=NUM_STAGES):
        i_next = count - 1 - i if REVERSE else i
        p_state = p_states + tl.cast(i_next, tl.int64) * H * SIZE
        if BY_TOKEN:
            # Of the segment before the boundary, in reverse of the one after it.
            i_segment = i_next + 1 if REVERSE else i_next
            t = tl.cast(i_segment, tl.int64) * segment_length
            t_next = tl.minimum(t + segment_length, length)
            b_decay = remaining(p_log_decay + t, p_log_decay + t_next)
        b_state = b_state * b_decay + tl.load(p_state + o_s, mask=m_s, other=0.0)
        if STORE:
            tl.store(p_state + o_s, b_state, mask=m_s)
    if WITH_TOTAL:
        # What is left is a document's last segment, which may be short, or in reverse its first.
        b_rest_decay = b_first_decay if REVERSE else b_last_decay
        b_own = tl.load(p_total + o_s, mask=m_total, other=0.0)
        tl.store(p_total + o_s, b_state * b_rest_decay + b_own, mask=m_total)


def segment_states_shape(
    k_shape: tuple[int, int, int, int],
    value_dim: int,
    packed: bool,
    device: torch.device,
    *,
    by_token: bool = False,
) -> tuple[int, ...]:
    """The shape of the segment states that `chunk_states` returns, (0,) for none."""
    shape = ScanShape(*k_shape, value_dim, packed)
    rows = choose_segments(shape, device, by_token=by_token).num_boundaries
    return (rows, shape.num_heads, shape.key_dim, value_dim) if rows else (0,)


def chunk_states(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    *,
    cu_seqlens: tuple[int, ...] | None = None,
    state_rows: tuple[int, ...] | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    with_total: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """States of k [B, T, H, D] and v [B, T, H, E], from zero at the start of every document.

    Returns (segment_states [S, H, D, E], local_state [N, H, D, E]), both float32. With
    l = exp(log_decay) and a document of n tokens, its local state is

        forward: sum_j l^(n-1-j) k_j v_j^T          (`scale` is not used)
        reverse: sum_i scale * l^(i+1) k_i v_i^T    (k=q, v=do: the gradient of the initial state)

    The segment states are what `scan` needs of the segments before each (reverse: after each), in
    the form that `SegmentChoice.folded` says. `with_total=False` saves the work of the local state,
    which is then None; with `state_rows` it is that of these packed documents alone, in this order.
    S depends on shapes alone, so packed documents may leave some rows unused; if every document is
    sure to be one segment, segment_states is None: `scan` needs none. Shapes fix the order of every
    sum: the same inputs give the same bits. `cu_seqlens` packs documents (0, ..., T) into a batch
    of one. Raises ValueError for dtypes or head dims that the kernels do not support.
    """
    documents = cu_seqlens, state_rows
    key = spec(k), spec(v), documents, float(scale) if reverse else 1.0
    plan = plan_states(
        *key,
        reverse=reverse,
        with_total=with_total,
        by_token=is_by_token(log_decay),
        device=k.device,
    )
    states = total = None
    if plan.states_shape is not None:
        states = torch.empty(plan.states_shape, dtype=torch.float32, device=k.device)
    if with_total:
        allocate = torch.zeros if plan.is_empty else torch.empty
        total = allocate(plan.total_shape, dtype=torch.float32, device=k.device)
    if plan.num_programs == 0:
        return states, total
    if plan.copies[0]:
        k = k.contiguous()
    if plan.copies[1]:
        v = v.contiguous()
    log_decay = decay_or_zeros(log_decay, k.shape[2], k.device)
    with on_device_of(k):
        segment_table, document_table = plan.segments.device_tables(k.device)
        # The sum of the segment that ends a document (reverse: begins it) goes to the local state.
        first = total if states is None else states
        plan.launch(plan.num_programs, k, v, first, total, log_decay, segment_table)
        if plan.combine is not None:
            plan.combine(plan.num_combine_programs, states, total, log_decay, document_table)
    return states, total


class StatePlan(NamedTuple):
    """All of `chunk_states` that follows from specs, cached by them.

    Attributes:
        launch, num_programs: of the state kernel; 0 programs: there is nothing to compute.
        combine, num_combine_programs: of the combine kernel; None: it is not needed.
        segments: of the documents.
        states_shape, total_shape: of the results; states_shape is None without segment states.
        copies: True for k and for v if it must be copied for the kernel to address it.
        is_empty: there are no tokens.
    """

    launch: CachedLaunch | None
    num_programs: int
    combine: CachedLaunch | None
    num_combine_programs: int
    segments: Segments
    states_shape: tuple[int, ...] | None
    total_shape: tuple[int, ...]
    copies: tuple[bool, bool]
    is_empty: bool


@functools.lru_cache(maxsize=256)
def plan_states(
    k: TensorSpec,
    v: TensorSpec,
    documents: tuple[tuple[int, ...] | None, ...],
    scale: float,
    *,
    reverse: bool,
    with_total: bool,
    by_token: bool,
    device: torch.device,
) -> StatePlan:
    """The plan of `chunk_states`; `documents` are cu_seqlens and state_rows."""
    check_operands(dict(k=k, v=v))
    assert k[0][:3] == v[0][:3], (k, v)
    (batch, seq_len, num_heads, key_dim), value_dim = k[0], v[0][-1]
    cu_seqlens, state_rows = documents
    shape = ScanShape(*k[0], value_dim, cu_seqlens is not None)
    choice = choose_segments(shape, device, by_token=by_token)
    rows = DocumentStates(state_rows) if with_total else NONE
    segments = divide(batch, seq_len, cu_seqlens, choice, rows, device.type == "cuda")
    state = (num_heads, key_dim, value_dim)
    shapes = dict(
        states_shape=(segments.num_boundaries, *state) if segments.num_boundaries else None,
        total_shape=(segments.num_states, *state),
        copies=(not is_addressable(k), not is_addressable(v)),
        is_empty=seq_len == 0,
    )
    if seq_len == 0 or (segments.single and not with_total):
        return StatePlan(None, 0, None, 0, segments, **shapes)
    run = segments.per_row - (not with_total)
    num_segments = segments.num_segments if segments.packed else segments.num_documents * run
    tiles = state_tiles(key_dim, value_dim, k[2], num_segments * num_heads, device)
    blocks = triton.cdiv(key_dim, tiles.key) * triton.cdiv(value_dim, tiles.value)
    numbers = (
        *strides(addressable_spec(k), (0, 1, 2)),
        *strides(addressable_spec(v), (0, 1, 2)),
        scale,
        seq_len,
        segments.per_row,
        run,
        segments.length,
        num_heads,
    )
    constants = dict(
        D=key_dim,
        E=value_dim,
        BD=tiles.key,
        BE=tiles.value,
        BC=tiles.chunk,
        REVERSE=reverse,
        PACKED=segments.packed,
        WITH_TOTAL=with_total,
        BY_TOKEN=by_token,
        PRECISION="ieee",
    )
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    launch = cached_launch(state_kernel, numbers, constants, k[2], **options)
    kind = dict(reverse=reverse, with_total=with_total, by_token=by_token)
    combine = _plan_combine(state, seq_len, segments, **kind)
    return StatePlan(launch, num_segments * num_heads * blocks, *combine, segments, **shapes)


def _plan_combine(
    state: tuple[int, int, int],
    seq_len: int,
    segments: Segments,
    *,
    reverse: bool,
    with_total: bool,
    by_token: bool,
) -> tuple[CachedLaunch | None, int]:
    """(launch, number of programs) of the combine kernel, (None, 0) if it is not needed.

    It sums over the segments of each document, in place: into the local state, if it is needed, all
    of them, and into a row of the segment states, unless the scan sums them (`folded`), all before
    it.
    """
    num_heads, key_dim, value_dim = state
    size = key_dim * value_dim
    num_programs = segments.num_combined * num_heads * triton.cdiv(size, COMBINE_BLOCK)
    # What crosses a row's only boundary is what one segment adds. Packed documents store in any
    # case: one kernel for all of them.
    store = segments.packed or (segments.per_row > 2 and not segments.folded)
    if segments.single or num_programs == 0 or not (store or with_total):
        return None, 0
    numbers = (seq_len, segments.per_row, segments.length, num_heads)
    constants = dict(
        SIZE=size,
        BLOCK=COMBINE_BLOCK,
        REVERSE=reverse,
        PACKED=segments.packed,
        STORE=store,
        WITH_TOTAL=with_total,
        BY_TOKEN=by_token,
        NUM_STAGES=COMBINE_STAGES,
    )
    options = dict(num_warps=COMBINE_WARPS)
    return cached_launch(combine_kernel, numbers, constants, torch.float32, **options), num_programs
