"""SRMSNorm in Megatron's slots: over the hidden size, and over the heads of all TP ranks.

Neither has a weight, so neither needs a gradient reduced over the tensor-parallel ranks when
Megatron's sequence_parallel shards the activations.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import nn

from lasp.tnl.layers import SRMSNorm
from parallel.megatron.apex import require_apex

__all__ = ["ApexSRMSNorm", "HeadsNorm", "MegatronSRMSNorm"]


class MegatronSRMSNorm(SRMSNorm):
    """`SRMSNorm` with the constructor that Megatron expects."""

    def __init__(self, config=None, hidden_size: int = 0, eps: float = 1e-6, **unused) -> None:
        super().__init__(hidden_size, eps)


class ApexSRMSNorm:
    """SRMSNorm as apex's FusedRMSNorm without a weight; built as `MegatronSRMSNorm` is.

    Raises:
        ValueError: apex is not installed.
    """

    def __new__(cls, config=None, hidden_size: int = 0, eps: float = 1e-6, **unused) -> nn.Module:
        require_apex("FusedRMSNorm")
        from apex.normalization import FusedRMSNorm

        return FusedRMSNorm(hidden_size, eps=eps, elementwise_affine=False)


class HeadsNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) with the mean over the heads of all tensor-parallel ranks.

    arXiv 2405.17381 eq. 14 on the concatenated heads. x [..., width / tp] -> the same.

    Args:
        width: features of all heads on all ranks.
        group: the tensor-parallel ranks.
    """

    def __init__(self, width: int, eps: float, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.width, self.eps, self.group = width, eps, group
        self.local_norm = SRMSNorm(width, eps) if group.size() == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.local_norm is not None:
            return self.local_norm(x)
        wide = x.double() if x.dtype == torch.float64 else x.float()
        squares = wide.square().sum(-1, keepdim=True)
        # Every rank's output depends on the sum, so its gradient is summed over the ranks too: the
        # backward of the reduce alone is the identity, which leaves each rank a partial gradient.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        return (wide * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)
