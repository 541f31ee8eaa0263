"""One token per sequence through a TransNormerLLM, in five launches per block.

    x -> linear -> q, k, v, u                  normed before, silu on q and k
    q, k, v, u, state -> mixer -> u * o        LRPE, decay, the state updated in place
    u * o -> linear -> x                       normed before, x added
    x -> linear -> W1 x * W2 x                 normed before
    W1 x * W2 x -> linear -> x                 x added

With few rows, a product takes as long as its weights take to be read: all else is fused into these
launches. A norm without weights is a factor of the product, W (x / rms(x)) = (W x) / rms(x), and
what writes x also writes the sums of its squares, one for each block of columns, in a fixed order.

Each kernel starts while the one before it ends (programmatic dependent launch, from Hopper on) and
fetches what does not depend on it, weights and state, before it waits. It lets the next kernel
start only after that wait, so that at any time all kernels but the last two have ended.

Shapes: M sequences, K inputs, N outputs, H heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lasp.ops.triton.launch_config import (
    ARGMAX_BLOCK,
    ARGMAX_WARPS,
    choose_linear,
    choose_mixer,
    has_dependent_launch,
)
from lasp.ops.triton.lrpe import cos_sin
from lasp.replay import on_device_of

__all__ = ["embed", "linear", "mixer", "next_tokens"]


@triton.jit
def linear_kernel(
    p_x, p_weight, p_gate, p_residual, p_squares, p_y, p_sums, p_parts, p_arrived,
    M, N, K, eps, num_squares,
    SQUARES: tl.constexpr, SILU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split of the inputs, block of columns, block of rows)."""
    num_blocks = tl.cdiv(N, BN)
    i_s = tl.program_id(0) % SPLITS
    i_t = tl.program_id(0) // SPLITS
    i_n = i_t % num_blocks
    o_m = i_t // num_blocks * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < M, o_n < N
    # Whole blocks of BK to each split.
    start = i_s * (tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK)
    stop = tl.minimum(K, start + tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK)
    p_weight += o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    p_x += o_m[:, None] * K + o_k[None, :]
    if p_gate is not None:
        p_gate += o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    if BM == 1:
        # The first block of weights does not wait for x.
        m_w = m_n[:, None] & (o_k < K)[None, :]
        b_w = tl.load(p_weight, mask=m_w, other=0.0)
        b_acc = tl.zeros([BN, BK], tl.float32)
        if p_gate is not None:
            b_g = tl.load(p_gate, mask=m_w, other=0.0)
            b_gate_acc = tl.zeros([BN, BK], tl.float32)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        for i_k in range(0, K, BK):
            b_x = tl.load(p_x + i_k, mask=(i_k + o_k < K)[None, :], other=0.0).to(tl.float32)
            b_acc += b_w.to(tl.float32) * b_x
            m_w = m_n[:, None] & (i_k + BK + o_k < K)[None, :]
            b_w = tl.load(p_weight + i_k + BK, mask=m_w, other=0.0)
            if p_gate is not None:
                b_gate_acc += b_g.to(tl.float32) * b_x
                b_g = tl.load(p_gate + i_k + BK, mask=m_w, other=0.0)
        b_y = tl.sum(b_acc, axis=1)[None, :]
        if p_gate is not None:
            b_gate = tl.sum(b_gate_acc, axis=1)[None, :]
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        b_y = tl.zeros([BM, BN], tl.float32)
        if p_gate is not None:
            b_gate = tl.zeros([BM, BN], tl.float32)
        for i_k in tl.range(start, stop, BK, num_stages=STAGES):
            m_k = i_k + o_k < K
            b_x = tl.load(p_x + i_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
            m_w = m_n[:, None] & m_k[None, :]
            b_w = tl.load(p_weight + i_k, mask=m_w, other=0.0)
            b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee")
            if p_gate is not None:
                b_g = tl.load(p_gate + i_k, mask=m_w, other=0.0)
                b_gate = tl.dot(b_x, tl.trans(b_g), b_gate, input_precision="ieee")
    if SPLITS > 1:
        # The split that arrives last adds up all of them, in order.
        o_part = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        PARTS: tl.constexpr = 1 if p_gate is None else 2
        p_parts += i_t * (SPLITS * PARTS * BM * BN) + o_part
        p_own = p_parts + i_s * (PARTS * BM * BN)
        tl.store(p_own, b_y)
        if p_gate is not None:
            tl.store(p_own + BM * BN, b_gate)
        tl.debug_barrier()
        if tl.atomic_add(p_arrived + i_t, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(p_arrived + i_t, 0)
        b_y = tl.zeros([BM, BN], tl.float32)
        for i_part in tl.static_range(SPLITS):
            b_y += tl.load(p_parts + i_part * (PARTS * BM * BN), cache_modifier=".cg")
        if p_gate is not None:
            b_gate = tl.zeros([BM, BN], tl.float32)
            for i_part in tl.static_range(SPLITS):
                b_gate += tl.load(p_parts + (i_part * 2 + 1) * (BM * BN), cache_modifier=".cg")
    if SQUARES > 0:
        b_factor = rms_factor(p_squares, o_m, m_m, eps, K, num_squares, SQUARES)
        b_y *= b_factor[:, None]
        if p_gate is not None:
            b_gate *= b_factor[:, None]
    if SILU > 0:
        # Rows of the weights: of each head q, k, v, u, of SILU rows each.
        b_y = tl.where((o_n // SILU % 4 < 2)[None, :], b_y * tl.sigmoid(b_y), b_y)
    if p_gate is not None:
        b_y *= b_gate
    o_y = o_m[:, None] * N + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if p_residual is not None:
        b_y += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_y = b_y.to(p_y.dtype.element_ty)
    tl.store(p_y + o_y, b_y, mask=m_y)
    if p_sums is not None:
        b_y = tl.where(m_y, b_y.to(tl.float32), 0.0)
        tl.store(p_sums + o_m * num_blocks + i_n, tl.sum(b_y * b_y, axis=1), mask=m_m)


@triton.jit
def rms_factor(p_squares, o_m, m_m, eps, K, num_squares, SQUARES: tl.constexpr):
    """1 / rms of rows [BM], from the sums of their squares."""
    o_s = tl.arange(0, SQUARES)
    m_s = m_m[:, None] & (o_s < num_squares)[None, :]
    b_s = tl.load(p_squares + o_m[:, None] * num_squares + o_s[None, :], mask=m_s, other=0.0)
    return tl.rsqrt(tl.sum(b_s, axis=1) / K + eps)


@triton.jit
def mixer_kernel(
    p_qkvu, p_state, p_log_decay, p_turns, p_position, p_y, p_sums,
    stride_gb, H,
    D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of BE value columns, head, sequence). With `p_turns`, keys are 2D wide."""
    NE: tl.constexpr = (D + BE - 1) // BE
    i_p = tl.program_id(0)
    i_e = i_p % NE
    i_bh = (i_p // NE).to(tl.int64)
    i_h = i_bh % H
    i_b = i_bh // H
    o_d = tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < D
    m_state = m_d[:, None] & m_e[None, :]
    KEY: tl.constexpr = D if p_turns is None else 2 * D
    p_state += i_bh * (KEY * D) + o_d[:, None] * D + o_e[None, :]
    b_s = tl.load(p_state, mask=m_state, other=0.0)  # [BD, BE]
    if p_turns is not None:
        b_s2 = tl.load(p_state + D * D, mask=m_state, other=0.0)
        b_quarters = 4.0 * tl.load(p_turns + i_h * D + o_d, mask=m_d, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    p_qkvu += i_bh * (4 * D)
    b_q = tl.load(p_qkvu + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_k = tl.load(p_qkvu + D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_v = tl.load(p_qkvu + 2 * D + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_u = tl.load(p_qkvu + 3 * D + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_decay = tl.exp(tl.load(p_log_decay + i_b * stride_gb + i_h))
    if p_turns is None:
        b_s = b_s * b_decay + b_k[:, None] * b_v[None, :]
        b_o = tl.sum(b_q[:, None] * b_s, axis=0)
    else:
        b_position = tl.load(p_position + i_b).to(tl.float64)
        b_cos, b_sin = cos_sin(b_position * b_quarters)
        b_s = b_s * b_decay + (b_k * b_cos)[:, None] * b_v[None, :]
        b_s2 = b_s2 * b_decay + (b_k * b_sin)[:, None] * b_v[None, :]
        b_o = tl.sum(b_q[:, None] * (b_cos[:, None] * b_s + b_sin[:, None] * b_s2), axis=0)
        tl.store(p_state + D * D, b_s2, mask=m_state)
    tl.store(p_state, b_s, mask=m_state)
    tl.store(p_y + i_bh * D + o_e, (b_u * b_o).to(p_y.dtype.element_ty), mask=m_e)
    tl.store(p_sums + i_p, tl.sum(tl.where(m_e, b_o * b_o, 0.0)))


@triton.jit
def embed_kernel(
    p_tokens, p_weight, p_y, p_sums, scale, K, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence)."""
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    p_weight += tl.load(p_tokens + i_m) * K
    b_y = tl.load(p_weight + o_k, mask=m_k, other=0.0).to(tl.float32) * scale
    b_y = b_y.to(p_y.dtype.element_ty)
    tl.store(p_y + i_m * K + o_k, b_y, mask=m_k)
    b_y = b_y.to(tl.float32)
    tl.store(p_sums + i_m, tl.sum(b_y * b_y))


@triton.jit
def argmax_kernel(
    p_logits, p_tokens, p_positions, V, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence): its next token, the first of the largest logits."""
    i_m = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    b_best = tl.full([BV], float("-inf"), tl.float32)
    b_where = o_v
    for i_v in range(0, V, BV):
        m_v = i_v + o_v < V
        b_x = tl.load(p_logits + i_m * V + i_v + o_v, mask=m_v, other=float("-inf"))
        # NaN is the largest, as in torch.
        better = (b_x > b_best) | ((b_x != b_x) & (b_best == b_best))
        b_where = tl.where(better, i_v + o_v, b_where)
        b_best = tl.where(better, b_x, b_best)
    b_best = tl.where(b_best == b_best, b_best, float("inf"))
    best = tl.max(b_best, axis=0)
    token = tl.min(tl.where(b_best == best, b_where, V), axis=0)
    tl.store(p_tokens + i_m, token.to(tl.int64))
    tl.store(p_positions + i_m, tl.load(p_positions + i_m) + 1)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    counters: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    silu: int = 0,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    with_squares: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = f(W x / rms) (G x / rms) + residual, and the sums of y's squares, for few rows.

    Args:
        x [M, K], weight and gate [N, K], residual [M, N]: contiguous, of one dtype.
        counters: int32, zeros, which a call leaves as it found them: calls that run one after the
            other can share them. At least `MAX_DECODE_PROGRAMS`.
        gate: None: without the factor G x / rms.
        squares: float32 [M, any], of which each row's sum is that of the squares of the vector
            whose rms = sqrt(sum / K + eps) it is; None: 1 in place of rms.
        silu: f is silu on the first 2 of every 4 groups of as many outputs; 0: on none.
        dtype: of y; None: of x.
        with_squares: return float32 [M, any], as `squares` of the next call, beside y [M, N].
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    assert all(each is None or each.is_contiguous() for each in (x, weight, gate, residual))
    tiles = choose_linear(rows, outputs, inputs, gate is not None, x.device)
    BM, BN, splits = tiles.rows, tiles.outputs, tiles.splits
    y = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    blocks = triton.cdiv(outputs, BN)
    sums = torch.empty(rows, blocks, device=x.device) if with_squares else None
    num_squares = 0 if squares is None else squares.shape[1]
    programs, parts = blocks * triton.cdiv(rows, BM), None
    if splits > 1:
        assert programs <= counters.numel(), (programs, counters.numel())
        parts = torch.empty(programs, splits, 1 if gate is None else 2, BM, BN, device=x.device)
    with on_device_of(x):
        linear_kernel[(programs * splits,)](
            x, weight, gate, residual, squares, y, sums, parts, counters,
            rows, outputs, inputs, eps, num_squares,
            SQUARES=triton.next_power_of_2(num_squares), SILU=silu,
            BM=BM, BN=BN, BK=tiles.inputs, SPLITS=splits, STAGES=tiles.num_stages,
            num_warps=tiles.num_warps, **_dependent_launch(x),
        )  # fmt: skip
    return y, sums


def mixer(
    qkvu: torch.Tensor,
    state: torch.Tensor,
    log_decay: torch.Tensor,
    turns: torch.Tensor | None,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u * o [M, H D] in the dtype of qkvu, and the sums of o's squares; updates `state` in place.

        S <- exp(log_decay) S + k v^T,   o = q . S

    Args:
        qkvu: [M, H, 4, D], contiguous.
        state: float32 [M, H, D or 2D, D], contiguous.
        log_decay: float32 [H] or [M, H].
        turns: float64 [H, D], LRPE's rates (`lrpe.turns`); None: no LRPE, and keys of D.
        positions: int64 [M], of the tokens.
    """
    rows, num_heads, _, dim = qkvu.shape
    assert qkvu.is_contiguous() and state.is_contiguous() and state.dtype == torch.float32
    block, num_warps, is_dependent = choose_mixer(rows, num_heads)
    block = min(block, max(16, triton.next_power_of_2(dim)))
    blocks = triton.cdiv(dim, block)
    y = torch.empty(rows, num_heads * dim, dtype=qkvu.dtype, device=qkvu.device)
    sums = torch.empty(rows, num_heads * blocks, device=qkvu.device)
    with on_device_of(qkvu):
        mixer_kernel[(rows * num_heads * blocks,)](
            qkvu, state, log_decay.contiguous(), turns, positions, y, sums,
            num_heads if log_decay.dim() == 2 else 0, num_heads,
            D=dim, BD=max(16, triton.next_power_of_2(dim)), BE=block,
            num_warps=num_warps, **_dependent_launch(qkvu, is_dependent),
        )  # fmt: skip
    return y, sums


def embed(
    tokens: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale * weight[tokens] [M, K], and the sums of its squares; tokens int64 [M]."""
    rows, inputs = tokens.shape[0], weight.shape[1]
    x = torch.empty(rows, inputs, dtype=weight.dtype, device=weight.device)
    sums = torch.empty(rows, 1, device=weight.device)
    with on_device_of(weight):
        embed_kernel[(rows,)](
            tokens, weight, x, sums, scale, inputs,
            BK=triton.next_power_of_2(inputs), **_dependent_launch(weight),
        )  # fmt: skip
    return x, sums


def next_tokens(logits: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> None:
    """Set tokens int64 [M] to the most likely ones of logits float32 [M, V]; add 1 to positions."""
    rows, size = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32
    with on_device_of(logits):
        argmax_kernel[(rows,)](
            logits, tokens, positions, size,
            BV=min(ARGMAX_BLOCK, triton.next_power_of_2(size)), num_warps=ARGMAX_WARPS,
            **_dependent_launch(logits),
        )  # fmt: skip


def _dependent_launch(x: torch.Tensor, wanted: bool = True) -> dict[str, bool]:
    """The options of a launch that starts before the one before it has ended, where there are."""
    # Not in the interpreter.
    is_compiled = isinstance(linear_kernel, triton.runtime.jit.JITFunction)
    if wanted and is_compiled and has_dependent_launch(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
