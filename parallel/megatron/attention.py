"""Lightning attention for Megatron's core-attention slot.

Shapes, Megatron's order: s tokens of this context-parallel rank, b batch, H heads of this
tensor-parallel rank, G groups of keys and values of this rank (G divides H), D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

import lasp
from lasp.exchange import METHODS
from parallel.megatron.calls import check_build, document_borders, process_groups
from parallel.megatron.layout import sequence_layout
from parallel.megatron.norm import HeadsNorm
from parallel.megatron.recompute import KeptExchanges

__all__ = ["FEATURE_MAPS", "LaspCoreAttention"]

# What becomes of (q, k, v) before attention. "silu_qkv" is MiniMax-01's.
FEATURE_MAPS: dict[str, Callable] = {
    "none": lambda q, k, v: (q, k, v),
    "silu": lambda q, k, v: (F.silu(q), F.silu(k), v),
    "silu_qkv": lambda q, k, v: (F.silu(q), F.silu(k), F.silu(v)),
    "elu_plus_one": lambda q, k, v: (F.elu(q) + 1, F.elu(k) + 1, v),
}

# (heads of the model, layer from 0, layers) -> log decay [heads], or None.
_DECAYS: dict[str, Callable] = {
    "tnl": lasp.decay.tnl,
    "minimax": lasp.decay.minimax,
    "ling": lasp.decay.ling,
    "retention": lambda num_heads, layer, num_layers: lasp.decay.retention(num_heads),
    "none": lambda num_heads, layer, num_layers: None,
}

_EXCHANGES = {None: "ring", "p2p": "ring", "all_gather": "all_gather"}


class LaspCoreAttention(MegatronModule):
    """Causal linear attention with a constant decay per head, its sequence cut over Megatron's
    context-parallel ranks (arXiv 2405.17381 eq. 11, 2404.02882).

        o = SRMSNorm(lightning_attention(phi(q), phi(k), v)),  the norm over all heads of all ranks

    Between ranks travel D x D states, not keys and values. Options go in the spec:
    `ModuleSpec(module=LaspCoreAttention, params=dict(exchange="all_gather"))`; the other arguments
    are Megatron's. It has no parameters.

    Args:
        layout: "zigzag" (Megatron's batches) or "contiguous" (see `BatchSplitter`); None: what
            config.linear_cp_layout says where Megatron has that field, else "zigzag".
        exchange: "ring", "all_gather", "doubling" or "auto"; None: from cp_comm_type ("p2p" is the
            ring).
        decay: "tnl", "minimax", "ling", "retention" or "none".
        decay_index, num_decay_layers: this layer, from 0, among the layers that the decay counts;
            None: layer_number - 1 of config.num_layers. Say both in a hybrid stack, which counts
            MLPs as layers too. A list says the index of layer_number - 1.
        feature_map: "silu", "silu_qkv", "elu_plus_one" or "none".
        output_norm: False leaves out the norm. (Nothing else keeps the output bounded.)
        scale: factor on the output before the norm; softmax's 1/sqrt(D) has no place here.

    Raises:
        ValueError: what linear attention cannot do, or an unknown name.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        layout: str | None = None,
        exchange: str | None = None,
        decay: str = "tnl",
        decay_index: int | Sequence[int | None] | None = None,
        num_decay_layers: int | None = None,
        feature_map: str = "silu",
        output_norm: bool = True,
        scale: float = 1.0,
        **unused,
    ) -> None:
        super().__init__(config=config)
        check_build(config, attn_mask_type, attention_type, attention_dropout)
        self.pg_collection = process_groups(pg_collection)
        self.tp_group, self.cp_group = self.pg_collection.tp, self.pg_collection.cp
        self.sequence_layout = sequence_layout(config, layout)
        self.layout_agreed = False
        self.exchange = _exchange(exchange, cp_comm_type)
        self.feature_map = _named(FEATURE_MAPS, "feature_map", feature_map)
        self.scale = scale

        num_heads = config.num_attention_heads
        self.num_heads_per_tp = num_heads // self.tp_group.size()
        if isinstance(decay_index, Sequence):
            decay_index = decay_index[layer_number - 1]
        index = layer_number - 1 if decay_index is None else decay_index
        of_model = _named(_DECAYS, "decay", decay)(
            num_heads, index, num_decay_layers or config.num_layers
        )
        first = self.tp_group.rank() * self.num_heads_per_tp
        # A plain attribute: Float16Module would cast a buffer to bfloat16.
        self._log_decay = None if of_model is None else of_model[first:][: self.num_heads_per_tp]
        width = config.kv_channels * num_heads
        norm = HeadsNorm(width, config.layernorm_epsilon, self.tp_group)
        self.norm = norm if output_norm else None
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
        packed_seq_params: PackedSeqParams | None = None,
        **unused,
    ) -> torch.Tensor:
        """query [s, b, H, D], key and value [s, b, G, D] -> [s, b, H * D].

        Packed documents ("thd") come as [t, H, D] and go as [t, H * D]; over context-parallel ranks
        cu_seqlens_q counts in the whole sequence.

        Args:
            attention_mask: not looked at: attention is causal.

        Raises:
            ValueError: a call that linear attention cannot serve.
        """
        cu_seqlens = document_borders(
            self, query, key, attn_mask_type, attention_bias, packed_seq_params
        )
        if query.shape[-2] != self.num_heads_per_tp:
            raise ValueError(
                f"query has {query.shape[-2]} heads: this rank was built for "
                f"{self.num_heads_per_tp} (config.num_attention_heads / tensor-parallel size)."
            )
        is_packed = query.dim() == 3
        if is_packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.feature_map(q, k, v)
        repeats = q.shape[2] // k.shape[2]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        # Alone there is no exchange to keep.
        alone = self.cp_group.size() == 1
        with contextlib.nullcontext() if alone else self.kept.around(k):
            o = self._attend(q, k, v, cu_seqlens)
        o = o.transpose(0, 1).flatten(2)
        if self.norm is not None:
            o = self.norm(o)
        return o.squeeze(1) if is_packed else o

    def log_decay(self, device: torch.device) -> torch.Tensor | None:
        """float32 [H] of this rank's heads on `device`, copied there once."""
        if self._log_decay is not None and self._log_decay.device != device:
            self._log_decay = self._log_decay.to(device)
        return self._log_decay

    def _attend(self, q, k, v, cu_seqlens):
        options = {}
        if self.cp_group.size() > 1:
            options = dict(group=self.cp_group, exchange=self.exchange, layout=self.sequence_layout)
        return lasp.lightning_attention(
            q, k, v, self.log_decay(q.device), scale=self.scale, cu_seqlens=cu_seqlens, **options
        )


def _exchange(exchange, comm_type):
    if exchange is not None:
        if exchange not in METHODS:
            raise ValueError(
                f"exchange is {exchange!r}: choose one of {', '.join(sorted(METHODS))}."
            )
        return exchange
    if comm_type not in _EXCHANGES:
        raise ValueError(
            f"cp_comm_type is {comm_type!r}: states travel by 'p2p' (ring) or 'all_gather'; or "
            "name the exchange in the spec (exchange='doubling')."
        )
    return _EXCHANGES[comm_type]


def _named(table, option, name):
    if name not in table:
        raise ValueError(f"{option} is {name!r}: choose one of {', '.join(table)}.")
    return table[name]
