"""LRPE: positions for the queries and keys of linear attention, exact at any length.

x -> [x cos(theta p), x sin(theta p)], so that <q_i, k_j> = sum_d q_d k_d cos(theta_d (i - j)):
relative positions from a map of each token alone (arXiv 2405.17381 eq. 9, its real part, as in the
released code). Because phases are relative *between ranks* too, p counts in the global sequence.

Shapes: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

__all__ = ["LRPE", "modulate"]

# Tokens per table of cosines on the CPU. One float64 table of this many tokens, and one row per
# block, are all that is ever held in float64; the GPU's kernels hold none.
_BLOCK = 2048


class LRPE(nn.Module):
    """Learnable angle rates, one per channel: theta [H, 1, D], float32 whatever the model's dtype.

    At position 10^6 a rate rounded to bfloat16 is off by thousands of radians, and so is an angle
    computed in bfloat16: theta stays float32 through `model.bfloat16()`, and angles are formed in
    float64.

    Args:
        num_heads, head_dim: of the whole model; the rates are one ladder over all heads,
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
        """Set theta to the initial ladder."""
        if self.theta.is_meta:
            return
        channels = self.num_heads * self.head_dim
        # On the CPU, so that every device starts from the same bits.
        index = torch.arange(channels, dtype=torch.float64, device="cpu")
        exponent = -2.0 / channels * index
        ladder = (10000.0**exponent).view(self.num_heads, 1, self.head_dim)
        if self.theta.numel() != channels:
            # (A DTensor that is cut by heads has the shape of the whole.)
            ladder = ladder[self.heads]
        ladder = ladder.view(self.theta.shape)
        value = ladder.to(self.theta.device, torch.float32)
        if hasattr(self.theta, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            # src_data_rank=None: every rank computed the value, nothing need be sent.
            value = distribute_tensor(
                value, self.theta.device_mesh, self.theta.placements, src_data_rank=None
            )
        self.theta.copy_(value)

    def keep_heads(self, heads: slice) -> None:
        """Drop all but the given heads (tensor parallelism)."""
        self.theta = nn.Parameter(
            self.theta.detach()[heads].clone(), requires_grad=self.theta.requires_grad
        )
        self.heads = slice(*heads.indices(self.num_heads))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [B, T, H, D] -> [B, T, H, 2D] of the same dtype, contiguous.

        Args:
            position: of the first token in the global sequence.
        """
        if self.theta.dtype != torch.float32:
            raise ValueError(
                f"LRPE.theta is {self.theta.dtype}, and positions need float32. Under FSDP2 mixed "
                "precision, wrap each `LRPE` module by itself with param_dtype=torch.float32."
            )
        theta = self.theta
        # (torch.compile does not see the attribute of a parameter.)
        if theta.shape[0] != q.shape[2] or hasattr(theta, "to_local"):
            # Cut by heads (tensor parallelism), as q and k are.
            theta = theta.to_local()
        return modulate(q, k, theta, position)

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


def modulate(
    q: torch.Tensor, k: torch.Tensor, theta: torch.Tensor, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`LRPE.forward` by the given rates, float32 [H, 1, D]."""
    return _Modulate.apply(q, k, theta, position)


class _Modulate(torch.autograd.Function):
    """Two operators, opaque to torch.compile: the one for the backward forms the angles again."""

    @staticmethod
    def forward(ctx, q, k, theta, position):
        ctx.save_for_backward(q, k, theta)
        ctx.position = position
        return torch.ops.lasp.lrpe(q, k, theta, position)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_k):
        q, k, theta = ctx.saved_tensors
        in_q, in_k, grad_theta = torch.ops.lasp.lrpe_backward(
            grad_q, grad_k, q, k, theta, ctx.position
        )
        return in_q, in_k, grad_theta, None


torch.library.define(
    "lasp::lrpe", "(Tensor q, Tensor k, Tensor theta, SymInt position) -> (Tensor, Tensor)"
)
torch.library.define(
    "lasp::lrpe_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor theta, SymInt position) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("lasp::lrpe", "CompositeExplicitAutograd")
def _lrpe(q, k, theta, position):
    if q.is_cuda:
        from lasp.ops.triton.lrpe import lrpe

        return lrpe(q, k, theta.squeeze(1), position)
    out_q, out_k = (x.new_empty(*x.shape[:-1], 2 * x.shape[-1]) for x in (q, k))
    for tokens, cos, sin in _tables(theta, position, q.shape[1], q.dtype):
        for x, out in ((q, out_q), (k, out_k)):
            x_block = x[:, tokens]
            out_cos, out_sin = out[:, tokens].chunk(2, dim=-1)
            out_cos.copy_(x_block * cos)
            out_sin.copy_(x_block * sin)
    return out_q, out_k


@torch.library.impl("lasp::lrpe_backward", "CompositeExplicitAutograd")
def _lrpe_backward(grad_q, grad_k, q, k, theta, position):
    if q.is_cuda:
        from lasp.ops.triton.lrpe import lrpe_backward

        grads = lrpe_backward(grad_q, grad_k, q, k, theta.squeeze(1), position)
        return *grads[:2], grads[2].unsqueeze(1).to(theta.dtype)
    in_q, in_k = q.new_empty(q.shape), k.new_empty(k.shape)
    # A rate's gradient weighs token p by p: sums over a million of them are kept in float64.
    grad_theta = theta.new_zeros(theta.shape[0], theta.shape[2], dtype=torch.float64)
    for tokens, cos, sin in _tables(theta, position, q.shape[1], q.dtype):
        angle_grad = 0
        for x, grad, into in ((q, grad_q, in_q), (k, grad_k, in_k)):
            grad_cos, grad_sin = grad[:, tokens].chunk(2, dim=-1)
            into[:, tokens].copy_(grad_cos * cos + grad_sin * sin)
            angle_grad = angle_grad + (x[:, tokens] * (grad_sin * cos - grad_cos * sin)).sum(0)
        count = angle_grad.shape[0]
        steps = torch.arange(count, device=theta.device, dtype=angle_grad.dtype)
        # No product of matrices: autocast would round the positions.
        grad_theta += (steps[:, None, None] * angle_grad).sum(0)
        grad_theta += angle_grad.sum(0).double() * (position + tokens.start)
    return in_q, in_k, grad_theta.unsqueeze(1).to(theta.dtype)


@torch.library.register_fake("lasp::lrpe")
def _lrpe_fake(q, k, theta, position):
    shape = (*q.shape[:-1], 2 * q.shape[-1])
    return q.new_empty(shape), k.new_empty(shape)


@torch.library.register_fake("lasp::lrpe_backward")
def _lrpe_backward_fake(grad_q, grad_k, q, k, theta, position):
    return q.new_empty(q.shape), k.new_empty(k.shape), theta.new_empty(theta.shape)


def _tables(
    theta: torch.Tensor, position: int, length: int, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (token slice, cos, sin) with tables [block, H, D], in float32, or float64 for float64.

    An angle is theta * (first token of the block) + theta * (token within the block). Both products
    are exact to 1e-9 rad in float64 below position 2^22; their cosines and sines are rounded once
    and joined by the addition theorem.
    """
    high = torch.float64 if dtype == torch.float64 else torch.float32
    rates = theta.detach().double().squeeze(1)
    within = torch.arange(min(length, _BLOCK), device=theta.device, dtype=torch.float64)
    within = within[:, None, None] * rates
    cos_within, sin_within = within.cos().to(high), within.sin().to(high)
    for start in range(0, length, _BLOCK):
        size = min(_BLOCK, length - start)
        base = rates * (position + start)
        cos_base, sin_base = base.cos().to(high), base.sin().to(high)
        cos = cos_within[:size] * cos_base - sin_within[:size] * sin_base
        sin = sin_within[:size] * cos_base + cos_within[:size] * sin_base
        yield slice(start, start + size), cos, sin
