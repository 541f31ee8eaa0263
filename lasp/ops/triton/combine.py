"""Combine kernel: turn the segments' own states into the states that enter them."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lasp.ops.triton.launch import Bound
from lasp.ops.triton.plan import COMBINE_BLOCK, Plan


@triton.jit(do_not_specialize=["T", "segments_per_row", "segment_length"])
def combine_kernel(
    p_states,
    p_total,
    p_log_decay,
    p_documents,
    T,
    segments_per_row,
    segment_length,
    H,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    STORE: tl.constexpr,
    WITH_TOTAL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    NB: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_p = tl.program_id(0)
    i_h = (i_p // NB % H).to(tl.int64)
    i_n = (i_p // (NB * H)).to(tl.int64)
    if PACKED:
        first_slot = tl.load(p_documents + i_n * 5)
        count = tl.load(p_documents + i_n * 5 + 1).to(tl.int32)
        last_length = tl.load(p_documents + i_n * 5 + 2).to(tl.int32)
        i_n = tl.load(p_documents + i_n * 5 + 3)
    else:
        count = segments_per_row - 1
        first_slot = i_n * count
        last_length = T - (segments_per_row - 1) * segment_length

    b_log_decay = tl.load(p_log_decay + i_h)
    b_decay = tl.exp(b_log_decay * segment_length)
    b_last_decay = tl.exp(b_log_decay * last_length)
    o_s = i_p % NB * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    p_states += (first_slot * H + i_h) * SIZE
    if WITH_TOTAL:
        p_total += (i_n * H + i_h) * SIZE
        m_total = o_s < tl.where(i_n >= 0, SIZE, 0)
    b_state = tl.zeros([BLOCK], dtype=tl.float32)
    # In place: later slots, whose loads may already be in flight, lie elsewhere.
    for i in tl.range(0, count, num_stages=NUM_STAGES):
        i_slot = count - 1 - i if REVERSE else i
        p_slot = p_states + tl.cast(i_slot, tl.int64) * H * SIZE
        b_state = b_state * b_decay + tl.load(p_slot + o_s, mask=m_s, other=0.0)
        if STORE:
            tl.store(p_slot + o_s, b_state, mask=m_s)
    if WITH_TOTAL:
        # What remains is a document's last segment, which may be short, or in reverse its first.
        b_remains = b_decay if REVERSE else b_last_decay
        b_own = tl.load(p_total + o_s, mask=m_total, other=0.0)
        tl.store(p_total + o_s, b_state * b_remains + b_own, mask=m_total)


def combine(
    states: torch.Tensor,
    log_decay: torch.Tensor,
    seq_len: int,
    plan: Plan,
    documents: torch.Tensor | None,
    *,
    reverse: bool,
    total: torch.Tensor | None,
) -> None:
    """Add up what `local_states` left: `total` [R, H, D, E] over the document (None: not wanted),
    and, in the documents that the plan says, every slot of `states` [S, H, D, E] over all before
    it."""
    _, num_heads, key_dim, value_dim = states.shape
    size = key_dim * value_dim
    programs = plan.num_combined * num_heads * triton.cdiv(size, COMBINE_BLOCK)
    # What crosses a row's only border is what one segment adds. In packed documents also where
    # there is nothing to store: one kernel for any of them.
    store = plan.packed or (plan.segments_per_row > 2 and not plan.folded)
    if programs == 0 or not (store or total is not None):
        return
    numbers = (seq_len, plan.segments_per_row, plan.segment_length, num_heads)
    bound = _bind(numbers, size, reverse, plan.packed, store, total is not None)
    bound(programs, states, total, log_decay, documents)


@functools.lru_cache(maxsize=1024)
def _bind(
    numbers: tuple[int, ...], size: int, reverse: bool, packed: bool, store: bool, with_total: bool
) -> Bound:
    """The kernel without its tensors."""
    constants = dict(
        SIZE=size,
        BLOCK=COMBINE_BLOCK,
        REVERSE=reverse,
        PACKED=packed,
        STORE=store,
        WITH_TOTAL=with_total,
        NUM_STAGES=4,
    )
    return Bound(combine_kernel, numbers, constants, num_warps=4)
