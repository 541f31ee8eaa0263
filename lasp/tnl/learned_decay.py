"""A log decay per token and head, computed from the layer's input (`TNLConfig(decay="learned")`).

    log_decay_t = a log2(1 + 2^(u_t / f)),   u_t = W x_t + b
    a = -slope f,   f = 1 - layer / (num_layers - 1) + 1e-5      (a is lasp.decay.tnl)

W and b start at zero, so that every token starts with TNL's fixed decay a. A large u forgets: the
log decay tends to -slope u above and to 0 below. This is a softplus of width f, chosen so that
d log_decay / du starts as -slope / 2 in every layer. That of a softplus of width 1 would start as
small as its value, which is next to nothing in the last layer (f = 1e-5): such a layer could hardly
learn to forget. (There the curve is nearly -slope relu(u).)

The product W x runs in the dtype of the model's products, as in Mamba-2 and GLA: the input has been
rounded to that dtype, which costs as much as rounding the result. All that follows is float32.

Shapes: B batch, T tokens, H heads held here, d model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import lasp

__all__ = ["DecayProjection", "fixed_decay", "learned_decay"]


class DecayProjection(nn.Linear):
    """u = W x + b, [B, T, d] -> [B, T, H] in the dtype of x's products.

    It starts at zero and draws no random numbers: for the same seed, all other weights of a model
    are those of one with fixed decays.
    """

    # Few outputs and much depends on them: FP8 (parallel.float8) leaves the layer alone.
    allows_float8 = False

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def fixed_decay(
    num_heads: int, layer: int, num_layers: int, heads: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's fixed log decay a, and 1 / f; both float32, of the given heads."""
    fixed = lasp.decay.tnl(num_heads, layer, num_layers)
    slopes = torch.tensor(lasp.decay.alibi_slopes(num_heads), dtype=fixed.dtype)
    return fixed[heads], (slopes / -fixed)[heads]


def learned_decay(u: torch.Tensor, fixed: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """log_decay [B, T, H] <= 0, float32 (float64 for float64), of u [B, T, H] in any dtype.

    Args:
        fixed, sharpness: a and 1 / f of `fixed_decay`, [H].
    """
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    return fixed * (F.softplus(u * (sharpness * math.log(2))) / math.log(2))
