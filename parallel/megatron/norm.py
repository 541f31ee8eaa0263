"""Norms in Megatron's slots: over the hidden size, and over the heads of all TP ranks.

SRMSNorm has no weight, so it needs no gradient reduced over the tensor-parallel ranks when
Megatron's sequence_parallel shards the activations. The weight of `MegatronRMSNorm` is marked for
that; the weight of `HeadsNorm` is sharded by heads, and its gradient is complete on its rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import nn

from lasp.tnl.layers import SRMSNorm
from parallel.compile import fused
from parallel.megatron.apex import require_apex
from parallel.tensor import ShardedSRMSNorm

__all__ = ["ApexSRMSNorm", "HeadsNorm", "MegatronRMSNorm", "MegatronSRMSNorm"]


class MegatronSRMSNorm(SRMSNorm):
    """`SRMSNorm` with the constructor that Megatron expects."""

    def __init__(self, config=None, hidden_size: int = 0, eps: float = 1e-6, **unused) -> None:
        super().__init__(hidden_size, eps)


class MegatronRMSNorm(nn.RMSNorm):
    """torch's RMSNorm with a weight, for Megatron's norm slots without Transformer Engine.

    Megatron's own wrapper of torch's norms refuses sequence parallelism.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused) -> None:
        super().__init__(hidden_size, eps, **parameter_options(config))
        self.weight.sequence_parallel = config.sequence_parallel


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
    """y = weight * x / sqrt(mean(x^2) + eps) on the concatenated heads of all tensor-parallel
    ranks; the mean is over groups of heads, or all of them.

    Without a weight and with one group it is TNL's (arXiv 2405.17381 eq. 14), with a weight
    MiniMax-01's (arXiv 2501.08313), with groups that of Ling and Ring linear (arXiv 2510.19338).
    x [..., width / tp] -> the same.

    Args:
        width: features of all heads on all ranks.
        group: the tensor-parallel ranks.
        num_groups: groups of neighbouring heads, each normalized by itself.
        config: Megatron's, for the weight's dtype and device; None: no weight.

    Raises:
        ValueError: groups that do not divide the width, or that the ranks would have to share.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        group: torch.distributed.ProcessGroup,
        *,
        num_groups: int = 1,
        config=None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or width % num_groups or (num_groups > 1 and num_groups % group.size()):
            raise ValueError(
                f"output_norm_groups is {num_groups}: it must divide the {width} features of all "
                f"heads, and be 1 or a multiple of the {group.size()} tensor-parallel ranks, so "
                "that each group lies on one rank."
            )
        self.eps, self.group = eps, group
        self.local_width = width // group.size()
        self.group_width = width // num_groups
        is_shared = num_groups == 1 and group.size() > 1
        self.shared = ShardedSRMSNorm(width, eps, group, compiles=True) if is_shared else None
        self.weight = None
        if config is not None:
            self.weight = nn.Parameter(torch.ones(self.local_width, **parameter_options(config)))
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """gate, of as many features in any shape: multiplied to y; None: 1."""
        if self.shared is None:
            return _grouped_norm(x, gate, self.weight, self.group_width, self.eps)
        if self.weight is None:
            return self.shared(x, gate)
        return _product(self.shared(x), gate, self.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's checkpoint entries; the weight is sharded by heads."""
        if self.weight is None:
            return {}
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )


@fused
def _grouped_norm(x, gate, weight, group_width, eps):
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group_width, group_width)
    y = F.rms_norm(groups, (group_width,), eps=eps).reshape(x.shape)
    return _product(y, gate, weight)


@fused
def _product(x, *factors):
    for factor in factors:
        if factor is not None:
            x = x * factor.reshape(-1 if factor.dim() == 1 else x.shape)
    return x


def parameter_options(config) -> dict:
    """dtype and device of a parameter that Megatron's config asks for."""
    on_cpu = config.use_cpu_initialization
    device = torch.device("cpu") if on_cpu else torch.cuda.current_device()
    return dict(dtype=config.params_dtype, device=device)
