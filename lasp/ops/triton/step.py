"""One step of decoding: the state is read once and written once."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lasp.ops.host_values import with_unit_stride
from lasp.ops.triton.launch_config import STEP_VALUE_BLOCK, STEP_WARPS
from lasp.ops.triton.launcher import (
    CachedLaunch,
    TensorSpec,
    check_operands,
    decay_or_zeros,
    strides,
)
from lasp.replay import on_device_of, spec


@triton.jit(do_not_specialize=["scale"])
def step_kernel(
    p_q, p_k, p_v, p_state, p_o, p_new, p_log_decay,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_sb, stride_sh,
    stride_sd, stride_se, stride_gb, stride_gh,
    scale, H,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    NE: tl.constexpr = (E + BE - 1) // BE
    i_p = tl.program_id(0)
    i_e = i_p % NE
    i_h = (i_p // NE % H).to(tl.int64)
    i_b = (i_p // (NE * H)).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    m_state = m_d[:, None] & m_e[None, :]  # [BD, BE]

    p_state += i_b * stride_sb + i_h * stride_sh
    p_state += o_d[:, None] * stride_sd + o_e[None, :] * stride_se
    b_state = tl.load(p_state, mask=m_state, other=0.0)  # [BD, BE]
    b_q = tl.load(p_q + i_b * stride_qb + i_h * stride_qh + o_d, mask=m_d, other=0.0)
    b_k = tl.load(p_k + i_b * stride_kb + i_h * stride_kh + o_d, mask=m_d, other=0.0)
    b_v = tl.load(p_v + i_b * stride_vb + i_h * stride_vh + o_e, mask=m_e, other=0.0)
    b_q = b_q.to(tl.float32)  # [BD]
    b_k = b_k.to(tl.float32)  # [BD]
    b_v = b_v.to(tl.float32)  # [BE]
    b_log_decay = tl.load(p_log_decay + i_b * stride_gb + i_h * stride_gh)
    # A decay above 0 must not go unnoticed.
    b_decay = tl.where(b_log_decay <= 0.0, tl.exp(b_log_decay), float("nan"))
    b_state = b_state * b_decay + b_k[:, None] * b_v[None, :]
    b_o = scale * tl.sum(b_q[:, None] * b_state, axis=0)  # [BE]

    i_bh = i_b * H + i_h
    p_new += i_bh * (D * E) + o_d[:, None] * E + o_e[None, :]
    tl.store(p_new, b_state, mask=m_state)
    tl.store(p_o + i_bh * E + o_e, b_o.to(p_o.dtype.element_ty), mask=m_e)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: S' = exp(log_decay) S + k v^T, o = scale * q . S'; log_decay [H] or [B, H].

    q, k [B, H, D], v [B, H, E], state [B, H, D, E] float32 (any strides). Returns o [B, H, E] in
    q's dtype and S', a new tensor or, in place, `state`. Raises ValueError for dtypes or head dims
    that the kernels do not support.
    """
    check_operands(dict(q=spec(q), k=spec(k), v=spec(v)))
    batch, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    assert state.shape == (batch, num_heads, key_dim, value_dim), state.shape
    assert state.dtype == torch.float32, state.dtype
    o = torch.empty(batch, num_heads, value_dim, dtype=q.dtype, device=q.device)
    new_state = state
    if not inplace or not state.is_contiguous():
        new_state = torch.empty(state.shape, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, new_state
    q, k, v = (with_unit_stride(t) for t in (q, k, v))
    if log_decay is None or log_decay.dim() == 1:
        log_decay = decay_or_zeros(log_decay, num_heads, q.device)
    programs = batch * num_heads * triton.cdiv(value_dim, STEP_VALUE_BLOCK)
    specs = map(spec, (q, k, v, state, log_decay))
    launch = _step_launch(*specs, float(scale))
    with on_device_of(q):
        launch(programs, q, k, v, state, o, new_state, log_decay)
    if inplace and new_state is not state:
        new_state = state.copy_(new_state)
    return o, new_state


@functools.lru_cache(maxsize=256)
def _step_launch(
    q: TensorSpec,
    k: TensorSpec,
    v: TensorSpec,
    state: TensorSpec,
    log_decay: TensorSpec,
    scale: float,
) -> CachedLaunch:
    (_, num_heads, key_dim), *_ = q
    numbers = (
        *strides(q, (0, 1)),
        *strides(k, (0, 1)),
        *strides(v, (0, 1)),
        *strides(state, (0, 1, 2, 3)),
        *(strides(log_decay, (0, 1)) if len(log_decay[0]) == 2 else (0, *strides(log_decay, (0,)))),
        scale,
        num_heads,
    )
    block = max(16, triton.next_power_of_2(key_dim))
    constants = dict(D=key_dim, E=v[0][-1], BD=block, BE=STEP_VALUE_BLOCK)
    return CachedLaunch(step_kernel, numbers, constants, num_warps=STEP_WARPS)
