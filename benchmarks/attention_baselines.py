"""Attentions that lightning attention is compared with, each as a small operator.

    softmax                 o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s, by torch's SDPA
    token_loop              S_t = lambda S_{t-1} + k_t v_t^T, o_t = q_t . S_t, token by token
    cumulative_sum          the same, with all S_t in memory at once, as prefix sums
    lightning_attention_1   the same, as (Q K^T * M) V with a T x T mask of decays, tile by tile
    one_plus_elu            o_t = f(q_t) . S_t / f(q_t) . z_t, f(x) = 1 + elu(x), no decay
    cosine                  o_t = sum_s w_ts v_s / sum_s w_ts over s <= t,
                            w_ts = (relu(q_t) . relu(k_s)) cos(pi/2 (t - s) / M)

They live beside the benchmarks because nothing in lasp calls them. All are causal, take q, k
[B, T, H, D] and v [B, T, H, E] of one dtype, return o [B, T, H, E] in it, and are differentiable in
q, k and v. `BASELINES` has them with the arguments (q, k, v, log_decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp import lightning_attention

__all__ = [
    "BASELINES",
    "KEPT_OPERATORS",
    "cosine",
    "cumulative_sum",
    "one_plus_elu",
    "softmax",
    "token_loop",
]

# Activation checkpointing keeps the results of these: small beside the work.
KEPT_OPERATORS = (
    "lasp_benchmarks::linear_attention",
    "lasp_benchmarks::lightning_attention_1",
)
# lambda^-t stays far within float32 for the tokens of a chunk.
_MAX_EXPONENT = 40.0
_MAX_CHUNK = 8192
# Values and products of one call: kernels of some versions count them in 32 bits, and cuBLAS its
# products in 16.
_MAX_VALUES, _MAX_PRODUCTS = 1 << 30, 1 << 15
# Below it a sum of weights is taken for zero, as in cosFormer's code.
_LEAST_WEIGHT = 1e-6


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by torch's `scaled_dot_product_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def token_loop(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Linear attention as a recurrent network: one state [B, H, D, E], updated token by token.

    It needs the least memory of all: the backward repeats the forward's loop for dq, and runs
    another from the last token to the first for dk and dv, so that no state is kept. States are
    float32, or float64 for inputs of that dtype.

    Args:
        log_decay: [H], of any float dtype, <= 0.
    """
    return _linear_attention(q, k, v, log_decay, 0)


def cumulative_sum(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, heads_at_a_time: int | None = None
) -> Tensor:
    """Linear attention by prefix sums: the states of all tokens [B, T, H, D, E], in float32.

        S_t = lambda^t sum_{s <= t} lambda^-s k_s v_s^T

    This is how causal linear attention is written without a kernel of its own: the terms k_s v_s^T,
    their cumulative sum, and a product with q. As lambda^-s overflows, sums run over chunks in
    which it does not, side by side, each from the state before it (without decay over chunks of
    8,192 tokens). The backward computes the states again, so that at most one such tensor is in
    memory.

    Args:
        log_decay: [H], of any float dtype, <= 0.
        heads_at_a_time: heads whose states are in memory together; None: all.

    Raises:
        ValueError: heads_at_a_time below 1.
    """
    heads = k.shape[2] if heads_at_a_time is None else heads_at_a_time
    if heads < 1:
        raise ValueError(f"heads_at_a_time is {heads}: it must be at least 1, or None for all.")
    return _linear_attention(q, k, v, log_decay, heads)


def one_plus_elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear transformer (arXiv 2006.16236): features 1 + elu(x) and a denominator, no decay."""
    return _normalized(1 + F.elu(q), 1 + F.elu(k), v)


def cosine(q: Tensor, k: Tensor, v: Tensor, *, max_length: int | None = None) -> Tensor:
    """cosFormer (arXiv 2202.08791): weights relu(q_t) . relu(k_s) cos(pi/2 (t - s) / max_length).

    cos(a - b) = cos a cos b + sin a sin b, so the features are relu(x) cos a and relu(x) sin a, 2D
    of them, of which lasp's kernels take 256.

    Args:
        max_length: M, at least T; None: T.

    Raises:
        ValueError: max_length below T.
    """
    T = q.shape[1]
    max_length = T if max_length is None else max_length
    if max_length < T:
        raise ValueError(f"max_length is {max_length}: it must be at least the {T} tokens given.")
    dtype = torch.promote_types(q.dtype, torch.float32)
    angle = torch.arange(T, device=q.device, dtype=dtype) * (math.pi / 2 / max(max_length, 1))
    cos, sin = (x.to(q.dtype)[:, None, None] for x in (angle.cos(), angle.sin()))
    q, k = (torch.cat([x * cos, x * sin], dim=-1) for x in (F.relu(q), F.relu(k)))
    return _normalized(q, k, v)


def _normalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_s w_ts v_s / sum_s w_ts, w_ts = q_t . k_s: both sums by lasp's kernels, the second with a
    value of 1."""
    weighted = lightning_attention(q, k, v)
    total = lightning_attention(q, k, torch.ones_like(v[..., :1]))
    return weighted / total.clamp_min(_LEAST_WEIGHT)


# An operator, so that activation checkpointing can keep its result by name.
@torch.library.custom_op(
    "lasp_benchmarks::linear_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, int heads) -> Tensor",
)
def _linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, heads: int) -> Tensor:
    """heads: at a time, of `cumulative_sum`; 0 is `token_loop`."""
    if not v.numel():
        return torch.empty_like(v)
    o, _ = _products_with_states(k, v, q, None, log_decay, heads)
    return o


@_linear_attention.register_fake
def _linear_attention_fake(q, k, v, log_decay, heads):
    return v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do):
    q, k, v, log_decay = ctx.saved_tensors
    if not v.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None
    _, dq = _products_with_states(k, v, None, do, log_decay, ctx.heads)
    dv, dk = _products_with_states(q, do, k, v, log_decay, ctx.heads, reverse=True)
    return dq, dk, dv, None, None


_linear_attention.register_autograd(_backward, setup_context=_save)


def _products_with_states(
    a: Tensor,
    b: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    log_decay: Tensor,
    heads: int,
    *,
    reverse: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """(left_t . S_t [B, T, H, E], S_t . right_t [B, T, H, D]) in the dtype of a, None for None, of
    S_t = sum_s lambda^|t-s| a_s b_s^T over s <= t, or over s >= t in reverse.

    Shapes: a and left [B, T, H, D], b and right [B, T, H, E].
    """
    tensors = [a, b, left, right]
    if reverse:
        tensors = [None if x is None else x.flip(1) for x in tensors]
    function = _prefix_sums if heads else _loop
    results: list[tuple[Tensor | None, Tensor | None]] = []
    # Autocast would compute the products of float32 states in 16 bits.
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, a.shape[2], heads or a.shape[2]):
            some = slice(start, start + (heads or a.shape[2]))
            of_heads = (None if x is None else _wide(x[:, :, some]) for x in tensors)
            parts = function(*of_heads, log_decay[some])
            results.append(tuple(None if x is None else x.to(a.dtype) for x in parts))
    joined = (None if x[0] is None else torch.cat(x, dim=2) for x in zip(*results, strict=True))
    return tuple(x.flip(1) if reverse and x is not None else x for x in joined)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _loop(a, b, left, right, log_decay):
    B, T, H, _ = a.shape
    a, b, left, right = (
        None if x is None else x.movedim(1, 0).flatten(1, 2) for x in (a, b, left, right)
    )
    decay = log_decay.to(a.dtype).exp().repeat(B)[:, None, None]
    state = a.new_zeros(B * H, a.shape[-1], b.shape[-1])
    from_left = None if left is None else b.new_empty(b.shape)
    from_right = None if right is None else a.new_empty(a.shape)
    for t in range(T):
        state.mul_(decay).baddbmm_(a[t, :, :, None], b[t, :, None, :])
        if left is not None:
            torch.bmm(left[t, :, None, :], state, out=from_left[t, :, None, :])
        if right is not None:
            torch.bmm(state, right[t, :, :, None], out=from_right[t, :, :, None])
    return tuple(
        None if x is None else x.unflatten(1, (B, H)).movedim(0, 1) for x in (from_left, from_right)
    )


def _prefix_sums(a, b, left, right, log_decay):
    B, T, H, D = a.shape
    log_decay = log_decay.to(a.dtype)
    strongest = float(-log_decay.min())
    chunk = min(T, _MAX_CHUNK)
    if strongest * chunk > _MAX_EXPONENT:
        chunk = max(1, int(_MAX_EXPONENT / strongest))
    num_chunks = -(-T // chunk)

    def in_chunks(x):
        # [B, T, H, D] -> [B, H, N, C, D], with zeros after the last token.
        x = F.pad(x, (0, 0, 0, 0, 0, num_chunks * chunk - T))
        return x.unflatten(1, (num_chunks, chunk)).permute(0, 3, 1, 2, 4).contiguous()

    a, b, left, right = (None if x is None else in_chunks(x) for x in (a, b, left, right))
    # lambda^-i and lambda^i of each token of a chunk: [H, 1, C, 1].
    exponent = (log_decay[:, None] * torch.arange(chunk, device=a.device))[:, None, :, None]
    a = a * torch.exp(-exponent)
    states = a[..., :, None] * b[..., None, :]  # [B, H, N, C, D, E]
    if num_chunks > 1:
        states[:, :, 1:, 0] += _states_between(a, b, log_decay, chunk)
    rows = states.view(-1, chunk, D * states.shape[-1])
    for some in rows.split(max(1, _MAX_VALUES // rows[0].numel())):
        some.cumsum_(1)
    from_left = from_right = None
    if left is not None:
        left = (left * torch.exp(exponent))[..., None, :]
        from_left = _many_products(left, states).squeeze(-2)
    if right is not None:
        right = (right * torch.exp(exponent))[..., :, None]
        from_right = _many_products(states, right).squeeze(-1)
    return tuple(
        None if x is None else x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]
        for x in (from_left, from_right)
    )


def _many_products(x, y):
    """x @ y, some at a time."""
    result = x.new_empty(*x.shape[:-1], y.shape[-1])
    flat = (each.flatten(0, -3).split(_MAX_PRODUCTS) for each in (x, y, result))
    for left, right, out in zip(*flat, strict=True):
        torch.bmm(left, right, out=out)
    return result


def _states_between(a, b, log_decay, chunk):
    """lambda times the state before each chunk but the first, [B, H, N - 1, D, E]. `a` has been
    multiplied by lambda^-i."""
    decay = torch.exp(log_decay * chunk)[:, None, None, None]
    added = torch.exp(log_decay * (chunk - 1))[:, None, None, None] * (a.mT @ b)
    states, distance = added[:, :, :-1], 1
    while distance < states.shape[2]:
        # A state has the terms of `distance` chunks; then of twice as many.
        further = states.clone()
        further[:, :, distance:] += decay**distance * states[:, :, :-distance]
        states, distance = further, 2 * distance
    return states * torch.exp(log_decay)[:, None, None, None]


def _lightning_attention_1(q, k, v, log_decay):
    # Needs Triton.
    from lightning_attention_1 import lightning_attention_1

    return lightning_attention_1(q, k, v, log_decay)


BASELINES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "softmax (SDPA)": lambda q, k, v, log_decay: softmax(q, k, v),
    "Lightning Attention-1": _lightning_attention_1,
    "cumulative sum": cumulative_sum,
    "cumulative sum, by head": lambda q, k, v, log_decay: cumulative_sum(
        q, k, v, log_decay, heads_at_a_time=1
    ),
    "1 + elu": lambda q, k, v, log_decay: one_plus_elu(q, k, v),
    "cosine": lambda q, k, v, log_decay: cosine(q, k, v),
    "token loop": token_loop,
}
