"""Softmax attention over context-parallel ranks, for the softmax layers of a hybrid where
Transformer Engine is not at hand: Megatron's own DotProductAttention refuses context parallelism.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

import lasp
from parallel.megatron.calls import check_build, document_borders, process_groups
from parallel.megatron.layout import sequence_layout
from parallel.megatron.recompute import KeptExchanges

__all__ = ["LaspSoftmaxAttention"]


class LaspSoftmaxAttention(MegatronModule):
    """`lasp.softmax_attention` in Megatron's core-attention slot: causal, grouped queries or not.

    Each rank gathers the keys and values of all (LASP-2H, arXiv 2502.07563). It has no parameters.

    Args:
        layout: "zigzag" or "contiguous", as in `LaspCoreAttention`. The rest is Megatron's.

    Raises:
        ValueError: dropout, a window, an attention sink or a mask other than causal.
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
        check_build(config, attn_mask_type, attention_type, attention_dropout)
        if config.softmax_type != "vanilla":
            raise ValueError(
                f"config.softmax_type is {config.softmax_type!r}: only 'vanilla' is served."
            )
        self.pg_collection = process_groups(pg_collection)
        self.tp_group, self.cp_group = self.pg_collection.tp, self.pg_collection.cp
        self.sequence_layout = sequence_layout(config, layout)
        self.layout_agreed = False
        self.scale = softmax_scale
        self.kept = KeptExchanges()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params=None,
        **unused,
    ) -> torch.Tensor:
        """query [s, b, H, D], key and value [s, b, G, D] -> [s, b, H * D]; packed as in
        `LaspCoreAttention.forward`, and with its errors."""
        cu_seqlens = document_borders(
            self, query, key, attn_mask_type, attention_bias, packed_seq_params
        )
        is_packed = query.dim() == 3
        if is_packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        options, keeping = {}, contextlib.nullcontext()
        if self.cp_group.size() > 1:
            # Megatron cuts evenly, so the ranks need not ask each other.
            lengths = [q.shape[1]] * self.cp_group.size()
            options = dict(group=self.cp_group, layout=self.sequence_layout, shard_lengths=lengths)
            keeping = self.kept.around(k)
        with keeping:
            o = lasp.softmax_attention(q, k, v, scale=self.scale, cu_seqlens=cu_seqlens, **options)
        o = o.transpose(0, 1).flatten(2)
        return o.squeeze(1) if is_packed else o
