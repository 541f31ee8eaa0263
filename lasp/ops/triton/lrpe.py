"""LRPE: queries and keys times the cosines and sines of their angles, in one pass.

Bound by memory: q and k are read once, and twice their size is written once (the backward reads
and writes the other way round). An angle is a number of turns in float64, of which the fraction is
kept; its cosine and sine are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lasp.ops.host_values import with_unit_stride
from lasp.ops.triton.launch_config import LRPE_MAX_ROWS, LRPE_TOKENS, LRPE_WARPS
from lasp.ops.triton.launcher import check_operands, strides
from lasp.replay import on_device_of, spec


@triton.jit
def cos_sin(b_quarters):
    """Cosine and sine, float32, of angles given as quarter turns, float64."""
    # The nearest whole number of quarter turns, and the rest of the angle, at most pi / 4.
    b_whole = tl.floor(b_quarters + 0.5)
    b_x = ((b_quarters - b_whole) * 1.5707963267948966).to(tl.float32)
    # Taylor series, to 3e-8. The library's functions take any argument, with four times the
    # instructions and a table on the stack.
    b_y = b_x * b_x
    b_sin = b_x * (1 + b_y * (-1 / 6 + b_y * (1 / 120 + b_y * (-1 / 5040 + b_y / 362880))))
    b_cos = 1 + b_y * (-1 / 2 + b_y * (1 / 24 + b_y * (-1 / 720 + b_y / 40320)))
    b_quadrant = b_whole.to(tl.int64).to(tl.int32)
    b_odd = (b_quadrant & 1) != 0
    b_cos, b_sin = tl.where(b_odd, b_sin, b_cos), tl.where(b_odd, b_cos, b_sin)
    b_cos = tl.where(((b_quadrant + 1) & 2) != 0, -b_cos, b_cos)
    b_sin = tl.where((b_quadrant & 2) != 0, -b_sin, b_sin)
    return b_cos, b_sin


@triton.jit
def _cos_sin(o_n, p_turns, m_d, position, T, BD: tl.constexpr):
    """(position of each token [BT] float64, cos [BT, BD], sin [BT, BD])."""
    b_turns = tl.load(p_turns + tl.arange(0, BD), mask=m_d, other=0.0)  # [BD] float64
    b_position = ((o_n % T).to(tl.int64) + position).to(tl.float64)
    b_cos, b_sin = cos_sin(b_position[:, None] * (4.0 * b_turns)[None, :])
    return b_position, b_cos, b_sin


@triton.jit(do_not_specialize=["position"])
def lrpe_kernel(
    p_q, p_k, p_turns, p_out_q, p_out_k,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    position, N, T, H,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program (tile of BT among all N = B T tokens, head)."""
    # One grid axis: the others allow at most 65,535 programs.
    i_h = (tl.program_id(0) % H).to(tl.int64)
    o_n = tl.program_id(0) // H * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_x = (o_n < N)[:, None] & m_d[None, :]  # [BT, BD]
    _, b_cos, b_sin = _cos_sin(o_n, p_turns + i_h * D, m_d, position, T, BD)

    o_b, o_t = (o_n // T).to(tl.int64), (o_n % T).to(tl.int64)
    o_q = (o_b * stride_qb + o_t * stride_qt)[:, None] + o_d[None, :]
    o_k = (o_b * stride_kb + o_t * stride_kt)[:, None] + o_d[None, :]
    b_q = tl.load(p_q + i_h * stride_qh + o_q, mask=m_x, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_h * stride_kh + o_k, mask=m_x, other=0.0).to(tl.float32)
    o_out = (o_n.to(tl.int64) * H + i_h)[:, None] * (2 * D) + o_d[None, :]
    element = p_out_q.dtype.element_ty
    tl.store(p_out_q + o_out, (b_q * b_cos).to(element), mask=m_x)
    tl.store(p_out_q + o_out + D, (b_q * b_sin).to(element), mask=m_x)
    tl.store(p_out_k + o_out, (b_k * b_cos).to(element), mask=m_x)
    tl.store(p_out_k + o_out + D, (b_k * b_sin).to(element), mask=m_x)


@triton.jit(do_not_specialize=["position"])
def lrpe_backward_kernel(
    p_grad_q, p_grad_k, p_q, p_k, p_turns, p_into_q, p_into_k, p_rates,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    position, N, T, H,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program (head, row): every num_rows-th tile, and one row of the rates' gradient."""
    i_h = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    num_rows = tl.num_programs(1)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    element = p_into_q.dtype.element_ty
    b_rates = tl.zeros([BD], tl.float64)
    for i_n in range(i_r, tl.cdiv(N, BT), num_rows):
        o_n = i_n * BT + tl.arange(0, BT)
        o_b, o_t = (o_n // T).to(tl.int64), (o_n % T).to(tl.int64)
        m_x = (o_n < N)[:, None] & m_d[None, :]  # [BT, BD]
        b_position, b_cos, b_sin = _cos_sin(o_n, p_turns + i_h * D, m_d, position, T, BD)
        o_row = (o_n.to(tl.int64) * H + i_h)[:, None]
        o_grad = o_row * (2 * D) + o_d[None, :]
        o_into = o_row * D + o_d[None, :]

        o_x = (o_b * stride_qb + o_t * stride_qt)[:, None] + o_d[None, :]
        b_x = tl.load(p_q + i_h * stride_qh + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_c = tl.load(p_grad_q + o_grad, mask=m_x, other=0.0).to(tl.float32)
        b_s = tl.load(p_grad_q + o_grad + D, mask=m_x, other=0.0).to(tl.float32)
        tl.store(p_into_q + o_into, (b_c * b_cos + b_s * b_sin).to(element), mask=m_x)
        b_angle = b_x * (b_s * b_cos - b_c * b_sin)

        o_x = (o_b * stride_kb + o_t * stride_kt)[:, None] + o_d[None, :]
        b_x = tl.load(p_k + i_h * stride_kh + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_c = tl.load(p_grad_k + o_grad, mask=m_x, other=0.0).to(tl.float32)
        b_s = tl.load(p_grad_k + o_grad + D, mask=m_x, other=0.0).to(tl.float32)
        tl.store(p_into_k + o_into, (b_c * b_cos + b_s * b_sin).to(element), mask=m_x)
        b_angle += b_x * (b_s * b_cos - b_c * b_sin)

        # A rate's gradient weighs token p by p: sums over a million tokens need float64.
        b_rates += tl.sum(b_angle.to(tl.float64) * b_position[:, None], axis=0)
    tl.store(p_rates + (i_r * H + i_h) * D + o_d, b_rates, mask=m_d)


def lrpe(
    q: torch.Tensor, k: torch.Tensor, theta: torch.Tensor, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, T, H, D] of one dtype (any strides), theta [H, D] float32 in rad per token ->
    [B, T, H, 2D] contiguous: x cos(theta p), then x sin(theta p), p from `position` on."""
    check_operands(dict(q=spec(q), k=spec(k)))
    batch, length, num_heads, dim = q.shape
    q, k = (with_unit_stride(x) for x in (q, k))
    out_q, out_k = (x.new_empty(batch, length, num_heads, 2 * dim) for x in (q, k))
    if out_q.numel() == 0:
        return out_q, out_k
    with on_device_of(q):
        lrpe_kernel[(triton.cdiv(batch * length, LRPE_TOKENS) * num_heads,)](
            q, k, turns(theta), out_q, out_k, *_arguments(q, k, position), **_constants(dim)
        )
    return out_q, out_k


def lrpe_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    theta: torch.Tensor,
    position: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k (contiguous, their dtype) and theta [H, D] (float64)."""
    batch, length, num_heads, dim = q.shape
    q, k = (with_unit_stride(x) for x in (q, k))
    into_q, into_k = (x.new_empty(x.shape) for x in (q, k))
    if q.numel() == 0:
        return into_q, into_k, theta.new_zeros(num_heads, dim, dtype=torch.float64)
    num_rows = min(triton.cdiv(batch * length, LRPE_TOKENS), LRPE_MAX_ROWS)
    rates = theta.new_empty(num_rows, num_heads, dim, dtype=torch.float64)
    with on_device_of(q):
        lrpe_backward_kernel[num_heads, num_rows](
            grad_q.contiguous(),
            grad_k.contiguous(),
            q,
            k,
            turns(theta),
            into_q,
            into_k,
            rates,
            *_arguments(q, k, position),
            **_constants(dim),
        )
    return into_q, into_k, rates.sum(0)


def turns(theta: torch.Tensor) -> torch.Tensor:
    """Rates [H, D] as turns per token, float64."""
    return (theta.double() / (2 * math.pi)).contiguous()


def _arguments(q: torch.Tensor, k: torch.Tensor, position: int) -> tuple[int, ...]:
    batch, length, num_heads, _ = q.shape
    sizes = (position, batch * length, length, num_heads)
    return (*strides(spec(q), (0, 1, 2)), *strides(spec(k), (0, 1, 2)), *sizes)


def _constants(dim: int) -> dict[str, int]:
    return dict(
        D=dim, BD=max(16, triton.next_power_of_2(dim)), BT=LRPE_TOKENS, num_warps=LRPE_WARPS
    )
