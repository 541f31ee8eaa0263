"""Softmax attention over context-parallel ranks, for the softmax layers of a hybrid where
Transformer Engine is not at hand: Megatron's own DotProductAttention refuses context parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from lasp.shard import token_order
from parallel.megatron.attention import process_groups
from parallel.megatron.layout import sequence_layout

__all__ = ["ShardedSoftmaxAttention"]


class ShardedSoftmaxAttention(MegatronModule):
    """Causal softmax attention of this rank's queries to the keys and values of all ranks.

    Each rank gathers all keys and values, so memory and traffic grow with the whole sequence: for
    tests, CPUs and moderate lengths. On GPUs with Transformer Engine take its attention.

    Args:
        layout: "zigzag" or "contiguous", as in `LaspCoreAttention`. The rest is Megatron's.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type=None,
        attention_type="self",
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        *,
        layout: str | None = None,
        **unused,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(
                f"attention_dropout is {dropout}: ShardedSoftmaxAttention has none. Set it to 0."
            )
        self.pg_collection = process_groups(pg_collection)
        self.tp_group, self.cp_group = self.pg_collection.tp, self.pg_collection.cp
        self.sequence_layout = sequence_layout(config, layout)
        self.layout_agreed = False
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params=None,
        **unused,
    ) -> torch.Tensor:
        """query [s, b, H, D], key and value [s, b, G, D] -> [s, b, H * D]; causal."""
        if packed_seq_params is not None:
            raise ValueError("packed_seq_params is given: ShardedSoftmaxAttention serves none.")
        rank, size = self.cp_group.rank(), self.cp_group.size()
        mask = None
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
                for x in (key, value)
            )
            # Masked by position, keys may stay in the order in which the ranks hold them.
            order = token_order(key.shape[0], size, self.sequence_layout).to(key.device)
            mask = order.chunk(size)[rank][:, None] >= order[None, :]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        o = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return o.permute(2, 0, 1, 3).flatten(2)
