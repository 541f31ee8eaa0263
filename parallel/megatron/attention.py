"""Linear and softmax attention for Megatron's core-attention slot.

Shapes, in Megatron's order: s tokens of this context-parallel rank, b batch, t packed tokens, H
heads of this tensor-parallel rank, G key heads of this rank (G divides H), D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

import lasp
from lasp.exchange import METHODS
from parallel.megatron.activation_checkpoint import SavedExchanges
from parallel.megatron.context_parallel import sequence_layout
from parallel.megatron.norm import HeadsNorm
from parallel.megatron.validation import check_call, check_choice, check_config

__all__ = ["FEATURE_MAPS", "LaspCoreAttention", "LaspSoftmaxAttention", "process_groups"]

# Applied to (q, k, v) before attention. "silu_qkv" is MiniMax-01's.
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

# cp_comm_type -> exchange.
_EXCHANGES = {None: "ring", "p2p": "ring", "all_gather": "all_gather"}


class _CoreAttention(MegatronModule):
    """The part of a causal core attention that does not depend on the kind of attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        *,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        layout: str | None = None,
        **unused,
    ) -> None:
        super().__init__(config=config)
        check_config(config, attn_mask_type, attention_type, attention_dropout)
        self.pg_collection = process_groups(pg_collection)
        self.tp_group, self.cp_group = self.pg_collection.tp, self.pg_collection.cp
        self.sequence_layout = sequence_layout(config, layout)
        # Set by `BatchSplitter`, which shards batches in the same layout.
        self.layout_confirmed = False
        self.norm = None
        self.saved_exchanges = SavedExchanges()

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

        Packed documents ("thd") come as [t, H, D] and return as [t, H * D]; over context-parallel
        ranks cu_seqlens_q counts in the full sequence.

        Args:
            attention_mask: ignored: attention is causal.

        Raises:
            ValueError: a call that is not supported.
        """
        cu_seqlens = check_call(self, query, key, attn_mask_type, attention_bias, packed_seq_params)
        is_packed = query.dim() == 3
        if is_packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        sharding, saving = {}, contextlib.nullcontext()
        if self.cp_group.size() > 1:
            sharding = dict(group=self.cp_group, layout=self.sequence_layout)
            saving = self.saved_exchanges.around(k)
        with saving:
            o = self.attend(q, k, v, cu_seqlens=cu_seqlens, **sharding)
        o = o.transpose(0, 1).flatten(2)
        if self.norm is not None:
            o = self.norm(o)
        return o.squeeze(1) if is_packed else o


class LaspCoreAttention(_CoreAttention):
    """Causal linear attention with a constant decay per head, over Megatron's context-parallel
    ranks (arXiv 2405.17381 eq. 11, 2404.02882).

        o = SRMSNorm(lightning_attention(phi(q), phi(k), v)),  the norm over all heads of all ranks

    Only D x D states cross ranks, not keys and values. Options go in the spec:
    `ModuleSpec(module=LaspCoreAttention, params=dict(exchange="all_gather"))`; the other arguments
    are Megatron's, by keyword. It has no parameters.

    Args:
        layout: "zigzag" (Megatron's batches) or "contiguous" (see `BatchSplitter`); None:
            config.linear_cp_layout where Megatron has that field, else "zigzag".
        exchange: "ring", "all_gather", "doubling" or "auto"; None: from cp_comm_type ("p2p" is the
            ring).
        decay: "tnl", "minimax", "ling", "retention" or "none".
        decay_index, num_decay_layers: this layer's index from 0, and the number of layers, that the
            decay depends on; None: layer_number - 1 of config.num_layers. Give both in a hybrid
            stack, which counts MLPs as layers too. A list is indexed by layer_number - 1.
        feature_map: "silu", "silu_qkv", "elu_plus_one" or "none".
        output_norm: False leaves out the norm. (Nothing else keeps the output bounded.)
        scale: factor on the output before the norm; softmax's 1/sqrt(D) does not apply here.

    Raises:
        ValueError: an option that linear attention does not support, or an unknown name.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        *,
        cp_comm_type: str | None = None,
        exchange: str | None = None,
        decay: str = "tnl",
        decay_index: int | Sequence[int | None] | None = None,
        num_decay_layers: int | None = None,
        feature_map: str = "silu",
        output_norm: bool = True,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, **options)
        self.exchange = _exchange(exchange, cp_comm_type)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        self.feature_map = FEATURE_MAPS[feature_map]
        self.scale = scale

        num_heads = config.num_attention_heads
        self.num_heads_per_tp = num_heads // self.tp_group.size()
        if isinstance(decay_index, Sequence):
            decay_index = decay_index[layer_number - 1]
        index = layer_number - 1 if decay_index is None else decay_index
        check_choice("decay", decay, _DECAYS)
        log_decay = _DECAYS[decay](num_heads, index, num_decay_layers or config.num_layers)
        first = self.tp_group.rank() * self.num_heads_per_tp
        # A plain attribute: Float16Module would cast a buffer to bfloat16.
        self._log_decay = None if log_decay is None else log_decay[first:][: self.num_heads_per_tp]
        if output_norm:
            width = config.kv_channels * num_heads
            self.norm = HeadsNorm(width, config.layernorm_epsilon, self.tp_group)

    def attend(self, q, k, v, **options: Any) -> torch.Tensor:
        """q [b, s, H, D], k and v [b, s, G, D] -> [b, s, H, D], without the norm."""
        if q.shape[2] != self.num_heads_per_tp:
            raise ValueError(
                f"query has {q.shape[2]} heads: this rank was built for {self.num_heads_per_tp} "
                "(config.num_attention_heads / tensor-parallel size)."
            )
        q, k, v = self.feature_map(q, k, v)
        repeats = q.shape[2] // k.shape[2]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        options |= dict(scale=self.scale, exchange=self.exchange)
        return lasp.lightning_attention(q, k, v, self.log_decay(q.device), **options)

    def log_decay(self, device: torch.device) -> torch.Tensor | None:
        """float32 [H] of this rank's heads on `device`, copied there once."""
        if self._log_decay is not None and self._log_decay.device != device:
            self._log_decay = self._log_decay.to(device)
        return self._log_decay


class LaspSoftmaxAttention(_CoreAttention):
    """`lasp.softmax_attention`: causal, with grouped queries, over context-parallel ranks.

    For the softmax layers of a hybrid without Transformer Engine: Megatron's own
    DotProductAttention refuses context parallelism. Each rank gathers all keys and values (LASP-2H,
    arXiv 2502.07563). It has no parameters.

    Args:
        layout: "zigzag" or "contiguous", as in `LaspCoreAttention`. The rest is Megatron's.

    Raises:
        ValueError: dropout, a window, an attention sink or a mask other than causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        *,
        softmax_scale: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, **options)
        if config.softmax_type != "vanilla":
            raise ValueError(
                f"config.softmax_type is {config.softmax_type!r}: only 'vanilla' is supported."
            )
        self.scale = softmax_scale

    def attend(self, q, k, v, **options: Any) -> torch.Tensor:
        """q [b, s, H, D], k and v [b, s, G, D] -> [b, s, H, D]."""
        if "group" in options:
            # Megatron shards evenly, so the ranks need not exchange their lengths.
            options["shard_lengths"] = [q.shape[1]] * self.cp_group.size()
        return lasp.softmax_attention(q, k, v, scale=self.scale, **options)


def process_groups(pg_collection: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """The groups that Megatron passed, or its global ones. Never creates a group."""
    if pg_collection is not None:
        return pg_collection
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])


def _exchange(exchange, comm_type):
    if exchange is not None:
        check_choice("exchange", exchange, sorted(METHODS))
        return exchange
    if comm_type not in _EXCHANGES:
        raise ValueError(
            f"cp_comm_type is {comm_type!r}: states are exchanged by 'p2p' (ring) or "
            "'all_gather'; or name the exchange in the spec (exchange='doubling')."
        )
    return _EXCHANGES[comm_type]
