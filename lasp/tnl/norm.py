"""SRMSNorm: the only norm of TransNormerLLM."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["SRMSNorm"]


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
        # Autocast may answer in float32: without the cast, everything downstream doubles in size.
        return F.rms_norm(x, (self.dim,), eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
