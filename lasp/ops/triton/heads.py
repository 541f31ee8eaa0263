"""The gradients of q, k, v and u, joined into that of the projection they were taken from.

Bound by memory: four gradients, q and k are read once, and four gradients are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lasp.ops.triton.launch_config import HEADS_ROWS, HEADS_WARPS
from lasp.ops.triton.launcher import check_operands
from lasp.replay import on_device_of, spec


@triton.jit
def _silu_backward(b_grad, b_x):
    b_sigmoid = tl.sigmoid(b_x)
    return b_grad * (b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid)))


@triton.jit
def split_heads_backward_kernel(
    p_dq, p_dk, p_dv, p_du, p_qkvu, p_into, N,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    """Program: BN of all N = B T H heads of tokens."""
    o_n = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    o_d = tl.arange(0, BD)[None, :]
    m_x = (o_n < N) & (o_d < D)  # [BN, BD]
    o_x = o_n * D + o_d
    o_into = o_n * (4 * D) + o_d
    element = p_into.dtype.element_ty
    b_q = tl.load(p_dq + o_x, mask=m_x, other=0.0)
    b_k = tl.load(p_dk + o_x, mask=m_x, other=0.0)
    b_v = tl.load(p_dv + o_x, mask=m_x, other=0.0)
    b_u = tl.load(p_du + o_x, mask=m_x, other=0.0)
    if ACTIVATED:
        b_x = tl.load(p_qkvu + o_into, mask=m_x, other=0.0).to(tl.float32)
        b_q = _silu_backward(b_q.to(tl.float32), b_x).to(element)
        b_x = tl.load(p_qkvu + o_into + D, mask=m_x, other=0.0).to(tl.float32)
        b_k = _silu_backward(b_k.to(tl.float32), b_x).to(element)
    tl.store(p_into + o_into, b_q, mask=m_x)
    tl.store(p_into + o_into + D, b_k, mask=m_x)
    tl.store(p_into + o_into + 2 * D, b_v, mask=m_x)
    tl.store(p_into + o_into + 3 * D, b_u, mask=m_x)


def split_heads_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    du: torch.Tensor,
    qkvu: torch.Tensor,
    activated: bool,
) -> torch.Tensor:
    """The gradient of qkvu [B, T, H, 4, D], contiguous, from four gradients [B, T, H, D].

    All of one dtype, bfloat16, float16 or float32. `activated`: q and k went through silu.

    Raises:
        ValueError: another dtype, or heads that are too large.
    """
    grads = dict(dq=dq, dk=dk, dv=dv, du=du)
    check_operands({name: spec(x) for name, x in (grads | dict(qkvu=qkvu)).items()})
    into = torch.empty(qkvu.shape, dtype=qkvu.dtype, device=qkvu.device)
    if into.numel() == 0:
        return into
    dim = qkvu.shape[-1]
    num_rows = into.numel() // (4 * dim)
    with on_device_of(qkvu):
        split_heads_backward_kernel[(triton.cdiv(num_rows, HEADS_ROWS),)](
            *(x.contiguous() for x in grads.values()),
            qkvu.contiguous(),
            into,
            num_rows,
            D=dim,
            BD=max(16, triton.next_power_of_2(dim)),
            BN=HEADS_ROWS,
            ACTIVATED=activated,
            num_warps=HEADS_WARPS,
        )
    return into
