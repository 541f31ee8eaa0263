"""Lightning Attention-1: the quadratic form of lightning attention, tile by tile, as a baseline.

    o_i = sum_{j <= i} lambda^(i-j) (q_i . k_j) v_j        lambda = exp(log_decay)

(TransNormerLLM, arXiv 2307.14995.) As in FlashAttention, tiles of the score matrix are
computed, used and dropped, so memory grows with the tokens and work with their square; there is no
softmax, and so nothing to keep for the backward but q, k and v.

One kernel serves all four results, because each is a sum of the same kind:

    o_i  = sum_{j <= i} lambda^(i-j) (q_i . k_j) v_j
    dq_i = sum_{j <= i} lambda^(i-j) (do_i . v_j) k_j
    dk_j = sum_{i >= j} lambda^(i-j) (v_j . do_i) q_i
    dv_j = sum_{i >= j} lambda^(i-j) (k_j . q_i) do_i

A backward therefore has 6 products of tiles, where a kernel that adds up dq with atomics has 5.

Shapes: B batch, T tokens, H heads, D size of queries and keys, E size of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["lightning_attention_1"]


class Tiles(NamedTuple):
    """BT rows by BS columns of the score matrix."""

    BT: int
    BS: int
    num_warps: int
    num_stages: int


def tiles_for(dtype: torch.dtype, dim: int) -> Tiles:
    """Tiles whose operands fit the shared memory of an A100, for heads of up to `dim` values."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1)
    return Tiles(128, 64, 8, 2) if dim <= 128 else Tiles(64, 32, 4, 2)


@triton.jit
def masked_product_kernel(
    p_a, p_b, p_x, p_y, p_log_decay,
    stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh,
    stride_xb, stride_xt, stride_xh,
    T, H, A, X,
    BA: tl.constexpr, BX: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y_i = sum_j lambda^|i-j| (a_i . b_j) x_j over j <= i, or over j >= i in reverse.

    Program (tile of BT rows, batch and head), those with most tiles of columns first. a, b
    [B, T, H, A] and x [B, T, H, X] with a unit last stride, y [B, T, H, X] contiguous.
    """
    num_tiles = tl.cdiv(T, BT)
    i_bh = tl.program_id(0) % (tl.num_programs(0) // num_tiles)
    i_t = tl.program_id(0) // (tl.num_programs(0) // num_tiles)
    if not REVERSE:
        i_t = num_tiles - 1 - i_t
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_a += i_b * stride_ab + i_h * stride_ah
    p_b += i_b * stride_bb + i_h * stride_bh
    p_x += i_b * stride_xb + i_h * stride_xh
    b_log_decay = tl.load(p_log_decay + i_h)

    first = i_t * BT
    o_t = first + tl.arange(0, BT)
    o_s = tl.arange(0, BS)
    o_a, o_x = tl.arange(0, BA), tl.arange(0, BX)
    m_a, m_x = o_a < A, o_x < X
    m_t = o_t < T
    o_at = o_t[:, None].to(tl.int64) * stride_at + o_a[None, :]
    b_a = tl.load(p_a + o_at, mask=m_t[:, None] & m_a[None, :], other=0.0)  # [BT, BA]
    b_y = tl.zeros([BT, BX], dtype=tl.float32)

    # Tiles off the diagonal. lambda^|i-j| is a factor of the row, which is left for the end, times
    # one of the column, both from the edge between them: no exponent is positive.
    if REVERSE:
        begin, end = first + BT, T
        edge = first + BT - 1
    else:
        begin, end = 0, first
        edge = first
    o_as = o_a[:, None] + o_s[None, :] * stride_bt  # [BA, BS]: b is read transposed
    o_xs = o_s[:, None] * stride_xt + o_x[None, :]
    for s in range(begin, end, BS):
        m_s = s + o_s < T
        p_s = tl.cast(s, tl.int64)
        b_b = tl.load(
            p_b + p_s * stride_bt + o_as, mask=m_a[:, None] & m_s[None, :], other=0.0
        )  # [BA, BS]
        b_x = tl.load(p_x + p_s * stride_xt + o_xs, mask=m_s[:, None] & m_x[None, :], other=0.0)
        b_scores = tl.dot(b_a, b_b, input_precision=PRECISION)  # [BT, BS]
        b_scores *= tl.exp(b_log_decay * tl.abs(s + o_s - edge))[None, :]
        b_y = tl.dot(b_scores.to(b_x.dtype), b_x, b_y, input_precision=PRECISION)
    b_y *= tl.exp(b_log_decay * tl.abs(o_t - edge))[:, None]

    # Tiles on the diagonal, with the mask.
    for s in range(first, tl.minimum(first + BT, T), BS):
        m_s = s + o_s < T
        p_s = tl.cast(s, tl.int64)
        b_b = tl.load(
            p_b + p_s * stride_bt + o_as, mask=m_a[:, None] & m_s[None, :], other=0.0
        )  # [BA, BS]
        b_x = tl.load(p_x + p_s * stride_xt + o_xs, mask=m_s[:, None] & m_x[None, :], other=0.0)
        b_scores = tl.dot(b_a, b_b, input_precision=PRECISION)
        b_distance = o_t[:, None] - (s + o_s)[None, :]
        if REVERSE:
            b_distance = -b_distance
        b_decay = tl.exp(b_log_decay * tl.maximum(b_distance, 0))
        b_scores = tl.where(b_distance >= 0, b_scores * b_decay, 0.0)
        b_y = tl.dot(b_scores.to(b_x.dtype), b_x, b_y, input_precision=PRECISION)
    o_y = ((i_b * T + o_t)[:, None] * H + i_h) * X + o_x[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_x[None, :])


def masked_product(
    a: torch.Tensor,
    b: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    reverse: bool = False,
) -> torch.Tensor:
    """y [B, T, H, X] of the kernel's docstring, in the dtype of x."""
    a, b, x = (each if each.stride(-1) == 1 else each.contiguous() for each in (a, b, x))
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    (batch, length, num_heads, dim), width = a.shape, x.shape[-1]
    tiles = tiles_for(x.dtype, max(dim, width))
    strides = (stride for each in (a, b, x) for stride in each.stride()[:3])
    masked_product_kernel[(triton.cdiv(length, tiles.BT) * batch * num_heads,)](
        a,
        b,
        x,
        y,
        log_decay,
        *strides,
        length,
        num_heads,
        dim,
        width,
        BA=max(16, triton.next_power_of_2(dim)),
        BX=max(16, triton.next_power_of_2(width)),
        BT=tiles.BT,
        BS=tiles.BS,
        REVERSE=reverse,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return y


# An operator, so that activation checkpointing can keep its result by name.
@torch.library.custom_op(
    "lasp_benchmarks::lightning_attention_1",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay) -> Tensor",
)
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor
) -> torch.Tensor:
    return masked_product(q, k, v, log_decay)


@_forward.register_fake
def _forward_fake(q, k, v, log_decay):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, do):
    q, k, v, log_decay = ctx.saved_tensors
    dq = masked_product(do, v, k, log_decay)
    dk = masked_product(v, do, q, log_decay, reverse=True)
    dv = masked_product(k, q, do, log_decay, reverse=True)
    return dq, dk, dv, None


_forward.register_autograd(_backward, setup_context=_save)


def lightning_attention_1(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor
) -> torch.Tensor:
    """o [B, T, H, E] in the dtype of v; differentiable in q, k and v.

    Args:
        q, k: [B, T, H, D], of one dtype with v: bfloat16, float16 or float32.
        v: [B, T, H, E]. D and E are at most 256.
        log_decay: float32 [H], <= 0.

    Raises:
        ValueError: a head of more than 256 values, or dtypes that differ.
    """
    dim = max(q.shape[-1], v.shape[-1])
    if dim > 256:
        raise ValueError(f"a head has {dim} values: the limit is 256. Use more heads.")
    if not q.dtype == k.dtype == v.dtype or log_decay.dtype != torch.float32:
        raise ValueError(
            f"q, k, v and log_decay are {q.dtype}, {k.dtype}, {v.dtype} and {log_decay.dtype}: "
            "give q, k and v of one dtype, and log_decay as float32."
        )
    return torch.ops.lasp_benchmarks.lightning_attention_1(q, k, v, log_decay)
