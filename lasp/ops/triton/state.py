"""State kernel: sum over a segment of decayed k v^T, forward or reverse."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lasp.ops.triton.launch import Bound
from lasp.ops.triton.plan import Plan, state_launch
from lasp.ops.triton.tiles import Layout, layout, locate_segment, strides


@triton.jit(do_not_specialize=["scale", "T", "segments_per_row", "segments_run", "segment_length"])
def state_kernel(
    p_k,
    p_v,
    p_states,
    p_total,
    p_log_decay,
    p_table,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    scale,
    T,
    segments_per_row,
    segments_run,
    segment_length,
    H,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BC: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    WITH_TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ND: tl.constexpr = (D + BD - 1) // BD
    NE: tl.constexpr = (E + BE - 1) // BE
    # Blocks of one head run next to each other: what they both read comes from L2 the second time.
    i_p = tl.program_id(0)
    i_e = i_p % NE
    i_d = i_p // NE % ND
    i_h = (i_p // (NE * ND) % H).to(tl.int64)
    i_s = i_p // (NE * ND * H)
    if not PACKED:
        # Where only the states between segments are wanted, those that end a row are not run.
        skipped = segments_per_row - segments_run if REVERSE else 0
        i_s = i_s // segments_run * segments_per_row + i_s % segments_run + skipped
    # Seen from the other side: what lies beyond the segment, and the slot that its state leaves by.
    i_n, i_b, start, count, beyond, slot = locate_segment(
        p_table, i_s, T, segments_per_row, segment_length, PACKED, not REVERSE
    )

    o_c = tl.arange(0, BC)
    o_d = i_d * BD + tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    b_log_decay = tl.load(p_log_decay + i_h)
    # The short chunk is the first one met, where the state is still zero, and lies against the side
    # that exponents are measured from: the factors are the same for every chunk, tails included.
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
        # The state that ends a document is not wanted, and most documents are one segment.
        wanted = beyond > 0
        if WITH_TOTAL:
            wanted = wanted | (i_n >= 0)
        num_chunks = tl.where(wanted, num_chunks, 0)
    # Tokens so far from where the state leaves that exp(-104) = 0 in float32 add nothing to it:
    # heads that forget quickly read a part of the segment only.
    b_reach = tl.minimum(104.0 / tl.maximum(-b_log_decay, 1e-9), 2.0**30).to(tl.int32)
    first_chunk = tl.maximum(num_chunks - 2 - b_reach // BC, 0)
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
        b_v = (b_v * b_weight[:, None]).to(b_v.dtype)
        b_state = tl.dot(
            tl.trans(b_k), b_v, acc=b_state * b_chunk_decay, input_precision=PRECISION
        )  # [BD, BE]

    if REVERSE:
        # Kept out of the weights: one decay of -50 alone would round a float16 operand to zero.
        b_state *= scale * tl.exp(b_log_decay)
    m_state = m_d[:, None] & m_e[None, :]  # [BD, BE]
    o_state = o_d[:, None] * E + o_e[None, :]
    if beyond > 0:
        tl.store(p_states + (slot * H + i_h) * (D * E) + o_state, b_state, mask=m_state)
    elif WITH_TOTAL:
        m_total = (o_d < tl.where(i_n >= 0, D, 0))[:, None] & m_e[None, :]  # [BD, BE]
        tl.store(p_total + (i_n * H + i_h) * (D * E) + o_state, b_state, mask=m_total)


def local_states(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    plan: Plan,
    table: torch.Tensor | None,
    *,
    reverse: bool,
    scale: float,
    states: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Write every segment's own state, as if it stood alone, in float32.

    That of the segment that ends a document (reverse: begins it) goes to `total` [R, H, D, E], and
    is left out for None or where the plan has no row for it; the others' to the slots of the
    borders they are followed by, in `states` [S, H, D, E].
    """
    programs, bound = _bind(
        layout(k),
        layout(v),
        float(scale) if reverse else 1.0,
        (plan.num_documents, plan.num_segments, plan.segments_per_row, plan.segment_length),
        reverse,
        plan.packed,
        total is not None,
    )
    if programs:
        bound(programs, k, v, states, total, log_decay, table)


@functools.lru_cache(maxsize=1024)
def _bind(
    k: Layout,
    v: Layout,
    scale: float,
    segments: tuple[int, int, int, int],
    reverse: bool,
    packed: bool,
    with_total: bool,
) -> tuple[int, Bound]:
    """How many programs run, and the kernel without its tensors."""
    (_, seq_len, num_heads, key_dim), _, dtype = k
    value_dim = v[0][-1]
    num_documents, num_segments, segments_per_row, segment_length = segments
    run = segments_per_row - (not with_total)
    if not packed:
        num_segments = num_documents * run
    launch = state_launch(key_dim, value_dim, dtype, num_segments * num_heads)
    blocks = triton.cdiv(key_dim, launch.key) * triton.cdiv(value_dim, launch.value)
    numbers = (
        *strides(k, (0, 1, 2)),
        *strides(v, (0, 1, 2)),
        scale,
        seq_len,
        segments_per_row,
        run,
        segment_length,
        num_heads,
    )
    constants = dict(
        D=key_dim,
        E=value_dim,
        BD=launch.key,
        BE=launch.value,
        BC=launch.chunk,
        REVERSE=reverse,
        PACKED=packed,
        WITH_TOTAL=with_total,
        PRECISION="ieee",
    )
    bound = Bound(
        state_kernel, numbers, constants, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
    return num_segments * num_heads * blocks, bound
