"""Softmax attention on one device, block by block, in memory that grows with the tokens.

A score block is a rectangle of the score matrix: some queries against some keys, all of them or, in
a square, each query's own key and those before it. Every block is one call of a kernel behind
torch's `scaled_dot_product_attention`; no block writes its scores to memory. Blocks of the same
queries are merged by the logarithm of the sum of their exponentials (lse). The kernels' backward
computes the weights as exp(score - lse), so with the merged output and lse it gives the block's
part of the true gradients:

    lse = log(e^lse_1 + e^lse_2),   o = e^(lse_1 - lse) o_1 + e^(lse_2 - lse) o_2

Shapes: B batch, T queries, S keys, H heads of the queries, G of the keys and values (H = n G: key
head g serves query heads n g .. n g + n - 1), D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

__all__ = ["ScoreBlock", "attn_bwd", "attn_fwd"]

_aten = torch.ops.aten
# Queries merged at a time: limits float32 temporaries.
_MERGE_BLOCK = 16384
# GPU kernels need head sizes that are multiples of 16 bytes.
_HEAD_MULTIPLE = 8


class ScoreBlock(NamedTuple):
    """Queries [start, stop) against keys [start, stop); causal ones are square."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool


def attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: list[ScoreBlock],
    *,
    scale: float,
    repeats: bool,
    merge_into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [B, T, H, D] in the dtype of q, lse [B, H, T] in float32 or float64) of the blocks.

    Args:
        q: [B, T, H, D]; k, v: [B, S, G, D]; a unit last stride.
        blocks: those that share queries have the same range of them. Queries in no block get zero.
        scale: factor on the scores.
        repeats: later calls have the same lengths, so that a kernel may be prepared for them.
        merge_into: (o, lse) of other blocks; these are merged into them, in place.
    """
    if merge_into is None and _is_all(blocks, q, k):
        return _kernel_forward(q, k, v, blocks[0].causal, scale, repeats)
    written = {block.queries for block in blocks} if merge_into is not None else set()
    if merge_into is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype)
        merge_into = q.new_zeros(q.shape), lse
    o, lse = merge_into
    for block in blocks:
        rows, keys = slice(*block.queries), slice(*block.keys)
        part = _kernel_forward(q[:, rows], k[:, keys], v[:, keys], block.causal, scale, repeats)
        if block.queries in written:
            _merge(o[:, rows], lse[:, :, rows], *part)
        else:
            o[:, rows], lse[:, :, rows] = part
            written.add(block.queries)
    return o, lse


def attn_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    blocks: list[ScoreBlock],
    *,
    scale: float,
    repeats: bool,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) through the blocks, in the dtype of q; `o` and `lse` are of all blocks.

    Args:
        into: (dq, dk, dv) to add to, in place.
    """
    if into is None and _is_all(blocks, q, k):
        return _kernel_backward(do, q, k, v, o, lse, blocks[0].causal, scale, repeats)
    if into is None:
        into = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = into
    for block in blocks:
        rows, keys = slice(*block.queries), slice(*block.keys)
        of_queries = do[:, rows], q[:, rows], k[:, keys], v[:, keys], o[:, rows], lse[:, :, rows]
        parts = _kernel_backward(*of_queries, block.causal, scale, repeats)
        for total, part in zip((dq[:, rows], dk[:, keys], dv[:, keys]), parts, strict=True):
            total += part
    return into


def _is_all(blocks, q, k) -> bool:
    """True if one block is all there is: nothing to merge, nothing to add."""
    return len(blocks) == 1 and blocks[0][:2] == ((0, q.shape[1]), (0, k.shape[1]))


def _merge(o, lse, part, part_lse) -> None:
    for start in range(0, o.shape[1], _MERGE_BLOCK):
        block = slice(start, start + _MERGE_BLOCK)
        mine, other = lse[:, :, block], part_lse[:, :, block]
        share = torch.sigmoid(other - mine).transpose(1, 2).unsqueeze(-1)
        o_block = o[:, block]
        o_block.copy_(torch.lerp(o_block.to(lse.dtype), part[:, block].to(lse.dtype), share))
        mine.copy_(torch.logaddexp(mine, other))


def _kernel_forward(q, k, v, causal, scale, repeats):
    """(o [B, T, H, D], lse [B, H, T]) by the kernel that torch's own dispatch chooses."""
    head_size = q.shape[-1]
    q, k, v = (_to_kernel(x) for x in (q, k, v))
    match _backend(q, k, v, causal, repeats):
        case "cpu":
            o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, scale=scale
            )
        case "cudnn":
            o, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
            # [B, H, T, 1]
            lse = lse.flatten(2)
        case "flash":
            o, lse, *_ = _aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, scale=scale
            )
        case "efficient":
            k, v = _one_head_each(q, k, v)
            o, lse, *_ = _aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
            # Padded to whole tiles of queries.
            lse = lse[:, :, : q.shape[2]]
    return o.transpose(1, 2)[..., :head_size], lse


def _kernel_backward(do, q, k, v, o, lse, causal, scale, repeats):
    """(dq [B, T, H, D], dk, dv [B, S, G, D]) of one block."""
    head_size, num_heads_k = q.shape[-1], k.shape[2]
    do, q, k, v, o = (_to_kernel(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    backend = _backend(q, k, v, causal, repeats)
    # Without dropout no kernel reads the random state, but the operators take one.
    random = () if backend == "cpu" else (q.new_zeros((), dtype=torch.int64),) * 2
    lengths = q.shape[2], k.shape[2]
    match backend:
        case "cpu":
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, lse, 0.0, causal, scale=scale
            )
        case "cudnn":
            grads = _aten._scaled_dot_product_cudnn_attention_backward(
                do,
                q,
                k,
                v,
                o,
                lse.unsqueeze(-1),
                *random,
                None,
                None,
                None,
                *lengths,
                0.0,
                causal,
                scale=scale,
            )
        case "flash":
            grads = _aten._scaled_dot_product_flash_attention_backward(
                do, q, k, v, o, lse, None, None, *lengths, 0.0, causal, *random, scale=scale
            )
        case "efficient":
            k, v = _one_head_each(q, k, v)
            # Padded rows have no weight: exp(score - inf) = 0.
            lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
            wanted = [True, True, True, False]
            *grads, _ = _aten._scaled_dot_product_efficient_attention_backward(
                do, q, k, v, None, o, lse, *random, 0.0, wanted, causal, scale=scale
            )
            grads[1:] = (x.unflatten(1, (num_heads_k, -1)).sum(2) for x in grads[1:])
    return tuple(x.transpose(1, 2)[..., :head_size] for x in grads)


def _backend(q, k, v, causal, repeats) -> str:
    if q.device.type == "cpu":
        return "cpu"
    choice = torch._fused_sdp_choice(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        # It builds a plan for every new length, in about 30 ms; its backward takes smaller heads.
        return "cudnn" if repeats and q.shape[-1] <= 128 else "flash"
    # Where torch would choose the math backend, use memory-efficient attention.
    return "flash" if choice == SDPBackend.FLASH_ATTENTION.value else "efficient"


def _to_kernel(x):
    """[B, T, H, D] -> [B, H, T, D], on a GPU with zeros up to a head size that kernels take."""
    short = 0 if x.device.type == "cpu" else -x.shape[-1] % _HEAD_MULTIPLE
    return (F.pad(x, (0, short)) if short else x).transpose(1, 2)


def _one_head_each(q, k, v):
    """k and v with the heads of q, for a kernel without grouped heads."""
    repeats = q.shape[1] // k.shape[1]
    if repeats == 1:
        return k, v
    return tuple(x.repeat_interleave(repeats, dim=1) for x in (k, v))
