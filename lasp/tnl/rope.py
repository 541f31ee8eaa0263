"""RoPE: positions for the queries and keys of the softmax layers, exact at any length.

Channels c and c + D/2 of a head span a plane, which is turned by position * base^(-2c / D): then
q_i . k_j depends on i - j alone (arXiv 2104.09864, eq. 34). As in `lasp.tnl.lrpe`, angles are
formed in float64: at position 10^6 a float32 one is off by up to a sixteenth of a radian.

Shapes: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch

__all__ = ["rotate"]

# Tokens turned at a time: the cosines of all of them never exist together.
_BLOCK = 8192


def rotate(x: torch.Tensor, positions: tuple[tuple[int, int], ...], base: float) -> torch.Tensor:
    """x [B, T, H, D] turned by its tokens' positions; same shape and dtype, contiguous.

    Args:
        positions: [start, stop) ranges of positions in the global sequence, of T tokens in all.
        base: of the ladder of angles; D is even.
    """
    return _Rotate.apply(x, positions, base)


class _Rotate(torch.autograd.Function):
    """Nothing is saved: the gradient is turned back."""

    @staticmethod
    def forward(ctx, x, positions, base):
        ctx.positions, ctx.base = positions, base
        return _turned(x, positions, base, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _turned(grad, ctx.positions, ctx.base, -1), None, None


def _turned(x, positions, base, sense):
    T, D = x.shape[1], x.shape[3]
    assert sum(stop - start for start, stop in positions) == T, (positions, T)
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    exponent = torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D
    rates = base**-exponent
    done = 0
    for first, last in positions:
        for start in range(first, last, _BLOCK):
            stop = min(start + _BLOCK, last)
            position = torch.arange(start, stop, device=x.device, dtype=torch.float64)
            angle = (position[:, None] * rates)[:, None]
            cos, sin = angle.cos().to(high), sense * angle.sin().to(high)
            tokens = slice(done, done + stop - start)
            a, b = x[:, tokens].to(high).chunk(2, dim=-1)
            out_a, out_b = out[:, tokens].chunk(2, dim=-1)
            out_a.copy_(a * cos - b * sin)
            out_b.copy_(b * cos + a * sin)
            done += stop - start
    return out
