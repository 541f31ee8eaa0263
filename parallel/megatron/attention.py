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
from parallel.megatron.documents import Documents
from parallel.megatron.layout import sequence_layout
from parallel.megatron.norm import HeadsNorm
from parallel.megatron.validation import (
    MEGATRON_ONLY,
    check_call,
    check_choice,
    check_config,
    check_linear_config,
    check_options,
    decay_layer,
)

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

# Those that do not depend on the layer.
_SAME_IN_ALL_LAYERS = ("retention", "none")

# cp_comm_type -> exchange.
_EXCHANGES = {None: "ring", "p2p": "ring", "all_gather": "all_gather"}

# Options of a core attention in a spec, beside those of its class.
_COMMON_OPTIONS = ("layout", "attention_dropout")


class _CoreAttention(MegatronModule):
    """The part of a causal core attention that does not depend on the kind of attention."""

    # Names of options of a subclass, for hints.
    OPTIONS: tuple[str, ...] = ()

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
        **others: Any,
    ) -> None:
        super().__init__(config=config)
        unknown = {name: others[name] for name in others if name not in MEGATRON_ONLY}
        check_options(type(self).__name__, unknown, (*_COMMON_OPTIONS, *self.OPTIONS))
        check_config(config, attn_mask_type, attention_type, attention_dropout)
        self.pg_collection = process_groups(pg_collection)
        self.tp_group, self.cp_group = self.pg_collection.tp, self.pg_collection.cp
        self.sequence_layout = sequence_layout(config, layout)
        # Set by `BatchSplitter`, which shards batches in the same layout.
        self.layout_confirmed = False
        self.norm = None
        self.saved_exchanges = SavedExchanges(config)

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
        gate: torch.Tensor | None = None,
        **unused,
    ) -> torch.Tensor:
        """query [s, b, H, D], key and value [s, b, G, D] -> [s, b, H * D].

        Packed documents ("thd") come as [t, H, D] and return as [t, H * D]; over context-parallel
        ranks cu_seqlens_q counts in the full sequence. In layers of `self_attention.py` they
        return as [t, 1, H * D].

        Args:
            attention_mask: must be None: attention is causal.
            gate: [s, b, H, D], multiplied to the output, after a norm; None: 1.

        Raises:
            ValueError: a call that is not supported.
        """
        cu_seqlens = check_call(
            self, query, key, attention_mask, attn_mask_type, attention_bias, packed_seq_params
        )
        has_batch_dim = query.dim() == 4 or isinstance(packed_seq_params, Documents)
        if query.dim() == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        sharding, saving = {}, contextlib.nullcontext()
        if self.cp_group.size() > 1:
            sharding = dict(group=self.cp_group, layout=self.sequence_layout)
            saving = self.saved_exchanges.around(k, training=self.training)
        with saving:
            o = self.attend(q, k, v, cu_seqlens=cu_seqlens, **sharding)
        o = o.transpose(0, 1).flatten(2)
        if self.norm is not None:
            o = self.norm(o, gate)
        elif gate is not None:
            o = gate.reshape(o.shape) * o
        return o if has_batch_dim else o.squeeze(1)


class LaspCoreAttention(_CoreAttention):
    """Causal linear attention with a constant decay per head, over Megatron's context-parallel
    ranks (arXiv 2405.17381 eq. 11, 2404.02882).

        o = norm(lightning_attention(phi(q), phi(k), v)),  the norm over all heads of all ranks

    Only D x D states cross ranks, not keys and values. Options go in the spec:
    `ModuleSpec(module=LaspCoreAttention, params=dict(exchange="all_gather"))`; the other arguments
    are Megatron's, by keyword. The only parameter is the weight of output_norm="rms".

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
        output_norm: "srms", TNL's norm without a weight; "rms", with a weight of all heads'
            features; "none" or None. (Without a norm nothing keeps the output bounded.)
        output_norm_groups: the norm is taken over each of so many groups of heads.
        output_norm_eps: None: config.layernorm_epsilon.
        scale: factor on the output before the norm; softmax's 1/sqrt(D) does not apply here.

    Raises:
        ValueError: an option that linear attention does not support, or an unknown name.
    """

    OPTIONS = (
        "exchange",
        "decay",
        "decay_index",
        "num_decay_layers",
        "feature_map",
        "output_norm",
        "output_norm_groups",
        "output_norm_eps",
        "scale",
    )

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        *,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        exchange: str | None = None,
        decay: str = "tnl",
        decay_index: int | Sequence[int | None] | None = None,
        num_decay_layers: int | None = None,
        feature_map: str = "silu",
        output_norm: str | None = "srms",
        output_norm_groups: int = 1,
        output_norm_eps: float | None = None,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, **options)
        check_linear_config(softmax_scale, k_channels, v_channels)
        self.exchange = _exchange(exchange, cp_comm_type)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        check_choice("decay", decay, _DECAYS)
        check_choice("output_norm", output_norm or "none", ("srms", "rms", "none"))
        self.feature_map = FEATURE_MAPS[feature_map]
        self.scale = scale

        num_heads = config.num_attention_heads
        self.num_heads_per_tp = num_heads // self.tp_group.size()
        if decay in _SAME_IN_ALL_LAYERS:
            log_decay = _DECAYS[decay](num_heads, 0, 1)
        else:
            layer = decay_layer(decay_index, num_decay_layers, layer_number, config)
            log_decay = _DECAYS[decay](num_heads, *layer)
        first = self.tp_group.rank() * self.num_heads_per_tp
        # A plain attribute: Float16Module would cast a buffer to bfloat16.
        self._log_decay = None if log_decay is None else log_decay[first:][: self.num_heads_per_tp]
        if output_norm in ("srms", "rms"):
            self.norm = HeadsNorm(
                config.kv_channels * num_heads,
                config.layernorm_epsilon if output_norm_eps is None else output_norm_eps,
                self.tp_group,
                num_groups=output_norm_groups,
                config=config if output_norm == "rms" else None,
            )

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
    arXiv 2502.07563). Values may be narrower than keys, as in latent attention (MLA). It has no
    parameters.

    Args:
        layout: "zigzag" or "contiguous", as in `LaspCoreAttention`. The rest is Megatron's;
            cp_comm_type may be "all_gather", which it is, or "p2p", Megatron-LM's default.

    Raises:
        ValueError: dropout, a window, an attention sink, a mask other than causal, or an exchange
            of heads (cp_comm_type "a2a").
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType | None = None,
        *,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, **options)
        if cp_comm_type not in _EXCHANGES:
            raise ValueError(
                f"cp_comm_type is {cp_comm_type!r}: softmax layers gather keys and values "
                "('all_gather', or 'p2p', which means the same here)."
            )
        self.scale = softmax_scale

    def attend(self, q, k, v, **options: Any) -> torch.Tensor:
        """q [b, s, H, D], k [b, s, G, D], v [b, s, G, E], E <= D -> [b, s, H, E]."""
        if "group" in options:
            # Megatron shards evenly, so the ranks need not exchange their lengths.
            options["shard_lengths"] = [q.shape[1]] * self.cp_group.size()
        missing = k.shape[-1] - v.shape[-1]
        padded = F.pad(v, (0, missing)) if missing else v
        o = lasp.softmax_attention(q, k, padded, scale=self.scale, **options)
        return o[..., : v.shape[-1]]


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
