"""The parts of a TNL that a config names: activations, norms, and decays that no token changes.

The released models have silu, SRMSNorm and the decay "fixed"; the others are those of the paper's
ablations (arXiv 2405.17381, tables 4 to 9) and what the models beside it in its tables need.

Shapes: d features of the last dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import lasp

__all__ = ["ACTIVATIONS", "DECAYS", "NORMS", "LayerNorm", "RMSNorm", "SRMSNorm"]


class SRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) over the last dim, without weight or bias.

    arXiv 2405.17381 eq. 14; `eps` is the released code's, the paper has none. x [..., dim] of any
    floating dtype -> the same shape and dtype; the mean square of 16-bit input is taken in float32.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Autocast may return float32: without the cast, everything downstream doubles in size.
        return F.rms_norm(x, (self.dim,), eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class RMSNorm(SRMSNorm):
    """`SRMSNorm` times a weight [dim], which starts at one (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight.to(x.dtype)


class LayerNorm(SRMSNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv 1607.06450); starts at weight 1
    and bias 0. Dtypes are those of `SRMSNorm`."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, (self.dim,), weight, bias, self.eps).to(x.dtype)


def _one_plus_elu(x: torch.Tensor) -> torch.Tensor:
    """Positive features of linear attention (arXiv 2006.16236 eq. 7)."""
    return F.elu(x) + 1


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _per_head(num_heads: int, layer: int, num_layers: int) -> torch.Tensor:
    return lasp.decay.alibi(num_heads)


def _no_decay(num_heads: int, layer: int, num_layers: int) -> torch.Tensor:
    return torch.zeros(num_heads)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "none": _identity,
    "1+elu": _one_plus_elu,
}

NORMS: dict[str, type[SRMSNorm]] = {"srms": SRMSNorm, "rms": RMSNorm, "layer": LayerNorm}

# (num_heads, layer, num_layers) -> log decay, float32 [num_heads]; a learned one starts there.
DECAYS: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "fixed": lasp.decay.tnl,
    "learned": lasp.decay.tnl,
    "per_head": _per_head,
    "none": _no_decay,
}
