"""Positions of queries and keys, exact at any length: LRPE for linear attention, RoPE for softmax.

LRPE maps each token by itself, x -> [x cos(theta p), x sin(theta p)], so that
q_i . k_j = sum_d q_d k_d cos(theta_d (i - j)) (arXiv 2405.17381 eq. 9, its real part, as in the
released code). RoPE rotates channels c and c + D/2 by the angle p * base^(-2c / D), so that
q_i . k_j depends only on i - j (arXiv 2104.09864 eq. 34).

The position p counts in the global sequence, because phases must agree between ranks. Angles are
formed in float64: at p = 10^6 a float32 angle is off by up to a sixteenth of a radian.

Shapes: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

__all__ = ["LRPE", "apply_rope"]

# Tokens per table of cosines (LRPE: on the CPU only, the Triton kernels need no table). Only one
# table and one row of angles per block are ever held in float64.
_LRPE_BLOCK = 2048
_ROPE_BLOCK = 8192


class LRPE(nn.Module):
    """Learnable angle rates, one per channel: theta [H, 1, D], float32 whatever the model's dtype.

    At position 10^6 a rate rounded to bfloat16 gives an angle off by thousands of radians, so theta
    stays float32 through `model.bfloat16()`.

    Args:
        num_heads, head_dim: of the full model. The initial rates are one sequence over all heads,
            10000^(-2 j / (H D)) for channel j.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.heads = slice(0, num_heads)
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set theta to the initial rates."""
        if self.theta.is_meta:
            return
        channels = self.num_heads * self.head_dim
        # On the CPU, so that every device starts from the same bits.
        index = torch.arange(channels, dtype=torch.float64, device="cpu")
        rates = (10000.0 ** (-2.0 / channels * index)).view(self.num_heads, 1, self.head_dim)
        # A DTensor sharded by heads has the full shape; a plain theta may hold some heads only.
        if self.theta.numel() != channels:
            rates = rates[self.heads]
        rates = rates.view(self.theta.shape).to(self.theta.device, torch.float32)
        if hasattr(self.theta, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            # src_data_rank=None: every rank has computed the value, so nothing needs to be sent.
            mesh, placements = self.theta.device_mesh, self.theta.placements
            rates = distribute_tensor(rates, mesh, placements, src_data_rank=None)
        self.theta.copy_(rates)

    def keep_heads(self, heads: slice) -> None:
        """Drop all but the given heads (tensor parallelism)."""
        self.theta = nn.Parameter(
            self.theta.detach()[heads].clone(), requires_grad=self.theta.requires_grad
        )
        self.heads = slice(*heads.indices(self.num_heads))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, *starts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [B, T, H, D] -> [B, T, H, 2D] of the same dtype, contiguous.

        Args:
            starts: position in the global sequence of the first token of each chunk, where the T
                tokens are len(starts) chunks of equal length (1, or 2 in zigzag).

        Raises:
            ValueError: theta was cast to another dtype.
        """
        if self.theta.dtype != torch.float32:
            raise ValueError(
                f"LRPE.theta is {self.theta.dtype}, and positions need float32. Under FSDP2 mixed "
                "precision, wrap each `LRPE` module by itself with param_dtype=torch.float32."
            )
        theta = self._local_theta(q.shape[2])
        if len(starts) == 1:
            return _ApplyLRPE.apply(q, k, theta, *starts)
        chunks = zip(*(x.chunk(len(starts), dim=1) for x in (q, k)), starts, strict=True)
        outs = [_ApplyLRPE.apply(q_c, k_c, theta, start) for q_c, k_c, start in chunks]
        return tuple(torch.cat(out, dim=1) for out in zip(*outs, strict=True))

    def at(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` of one token per sequence, at positions that differ: q, k [B, 1, H, D],
        positions int64 [B]; without gradients."""
        theta = self._local_theta(q.shape[2]).detach().double().squeeze(1)
        angle = (theta * positions[:, None, None])[:, None]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        q, k = (torch.cat((x * cos, x * sin), dim=-1).to(x.dtype) for x in (q, k))
        return q, k

    def _local_theta(self, num_heads: int) -> torch.Tensor:
        theta = self.theta
        # Sharded by heads as q and k are (torch.compile does not see the parameter's attribute).
        if theta.shape[0] != num_heads or hasattr(theta, "to_local"):
            theta = theta.to_local()
        return theta

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LRPE:
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        was_meta = self.theta.is_meta
        super()._apply(move_only, recurse)
        if was_meta:
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class _ApplyLRPE(torch.autograd.Function):
    """Two operators, opaque to torch.compile; the backward forms the angles again."""

    @staticmethod
    def forward(ctx, q, k, theta, position):
        ctx.save_for_backward(q, k, theta)
        ctx.position = position
        return torch.ops.lasp.lrpe(q, k, theta, position)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout_q, dout_k):
        q, k, theta = ctx.saved_tensors
        grads = torch.ops.lasp.lrpe_backward(dout_q, dout_k, q, k, theta, ctx.position)
        return *grads, None


torch.library.define(
    "lasp::lrpe", "(Tensor q, Tensor k, Tensor theta, SymInt position) -> (Tensor, Tensor)"
)
torch.library.define(
    "lasp::lrpe_backward",
    "(Tensor dout_q, Tensor dout_k, Tensor q, Tensor k, Tensor theta, SymInt position) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("lasp::lrpe", "CompositeExplicitAutograd")
def _lrpe(q, k, theta, position):
    if q.is_cuda:
        from lasp.ops.triton.lrpe import lrpe

        return lrpe(q, k, theta.squeeze(1), position)
    out_q, out_k = _lrpe_fake(q, k, theta, position)
    for tokens, cos, sin in _lrpe_tables(theta, position, q.shape[1], q.dtype):
        for x, out in ((q, out_q), (k, out_k)):
            out_cos, out_sin = out[:, tokens].chunk(2, dim=-1)
            out_cos.copy_(x[:, tokens] * cos)
            out_sin.copy_(x[:, tokens] * sin)
    return out_q, out_k


@torch.library.impl("lasp::lrpe_backward", "CompositeExplicitAutograd")
def _lrpe_backward(dout_q, dout_k, q, k, theta, position):
    if q.is_cuda:
        from lasp.ops.triton.lrpe import lrpe_backward

        grads = lrpe_backward(dout_q, dout_k, q, k, theta.squeeze(1), position)
        return *grads[:2], grads[2].unsqueeze(1).to(theta.dtype)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    # In a rate's gradient token p has the weight p: sums over 10^6 tokens are kept in float64.
    dtheta = theta.new_zeros(theta.shape[0], theta.shape[2], dtype=torch.float64)
    for tokens, cos, sin in _lrpe_tables(theta, position, q.shape[1], q.dtype):
        dangle = 0
        for x, dout, dx in ((q, dout_q, dq), (k, dout_k, dk)):
            dcos, dsin = dout[:, tokens].chunk(2, dim=-1)
            dx[:, tokens].copy_(dcos * cos + dsin * sin)
            dangle = dangle + (x[:, tokens] * (dsin * cos - dcos * sin)).sum(0)
        steps = torch.arange(dangle.shape[0], device=theta.device, dtype=dangle.dtype)
        # Not a matrix product: autocast would round the positions.
        dtheta += (steps[:, None, None] * dangle).sum(0)
        dtheta += dangle.sum(0).double() * (position + tokens.start)
    return dq, dk, dtheta.unsqueeze(1).to(theta.dtype)


@torch.library.register_fake("lasp::lrpe")
def _lrpe_fake(q, k, theta, position):
    shape = (*q.shape[:-1], 2 * q.shape[-1])
    return q.new_empty(shape), k.new_empty(shape)


@torch.library.register_fake("lasp::lrpe_backward")
def _lrpe_backward_fake(dout_q, dout_k, q, k, theta, position):
    return q.new_empty(q.shape), k.new_empty(k.shape), theta.new_empty(theta.shape)


def _lrpe_tables(
    theta: torch.Tensor, position: int, length: int, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (token slice, cos, sin) with tables [block, H, D], in float32, or float64 for float64.

    An angle is theta * (first token of the block) + theta * (token within the block). Both products
    are exact to 1e-9 rad in float64 below position 2^22; their cosines and sines are rounded once
    and combined by the angle addition formulas.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rates = theta.detach().double().squeeze(1)
    within = torch.arange(min(length, _LRPE_BLOCK), device=theta.device, dtype=torch.float64)
    within = within[:, None, None] * rates
    cos_within, sin_within = within.cos().to(wide), within.sin().to(wide)
    for start in range(0, length, _LRPE_BLOCK):
        size = min(_LRPE_BLOCK, length - start)
        first = rates * (position + start)
        cos_first, sin_first = first.cos().to(wide), first.sin().to(wide)
        cos = cos_within[:size] * cos_first - sin_within[:size] * sin_first
        sin = sin_within[:size] * cos_first + cos_within[:size] * sin_first
        yield slice(start, start + size), cos, sin


def apply_rope(x: torch.Tensor, ranges: tuple[tuple[int, int], ...], base: float) -> torch.Tensor:
    """x [B, T, H, D] rotated by its tokens' positions; same shape and dtype, contiguous.

    Args:
        ranges: [start, stop) positions in the global sequence, T tokens in all.
        base: of the angles; D is even.
    """
    return _ApplyRoPE.apply(x, ranges, base)


def rotate_at(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """`apply_rope` of one token per sequence, at positions that differ: x [B, 1, H, D], positions
    int64 [B]; without gradients."""
    D = x.shape[-1]
    exponent = torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D
    angle = (positions[:, None] * base**-exponent)[:, None, None]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x.to(wide).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class _ApplyRoPE(torch.autograd.Function):
    """Saves nothing: the backward rotates the gradient by the opposite angles."""

    @staticmethod
    def forward(ctx, x, ranges, base):
        ctx.ranges, ctx.base = ranges, base
        return _rotate(x, ranges, base, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return _rotate(dout, ctx.ranges, ctx.base, -1), None, None


def _rotate(x, ranges, base, sign):
    T, D = x.shape[1], x.shape[3]
    assert sum(stop - start for start, stop in ranges) == T, (ranges, T)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    exponent = torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D
    rates = base**-exponent
    done = 0
    for first, last in ranges:
        for start in range(first, last, _ROPE_BLOCK):
            stop = min(start + _ROPE_BLOCK, last)
            position = torch.arange(start, stop, device=x.device, dtype=torch.float64)
            angle = (position[:, None] * rates)[:, None]
            cos, sin = angle.cos().to(wide), sign * angle.sin().to(wide)
            tokens = slice(done, done + stop - start)
            a, b = x[:, tokens].to(wide).chunk(2, dim=-1)
            out_a, out_b = out[:, tokens].chunk(2, dim=-1)
            out_a.copy_(a * cos - b * sin)
            out_b.copy_(b * cos + a * sin)
            done += stop - start
    return out
