"""Megatron's self-attention layers with packed documents over ranks, and the linear layer of
hybrids: projections, positions, output norm and gate of their own.

Shapes, Megatron's order: s tokens of this context-parallel rank, b batch, d model width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.compile import fused
from parallel.megatron.attention import process_groups
from parallel.megatron.documents import Documents
from parallel.megatron.rotary import ShardedRotaryEmbedding, document_positions
from parallel.megatron.validation import (
    MEGATRON_ONLY,
    check_choice,
    check_options,
    check_precision,
)

__all__ = [
    "LaspMLASelfAttention",
    "LaspSelfAttention",
    "LightningSelfAttention",
    "PackedAttention",
    "linear_layer_config",
]

# Gates on the output, from their projection.
OUTPUT_GATES = {"sigmoid": torch.sigmoid, "silu": F.silu}


class PackedAttention:
    """Mixin for self-attention whose core is one of `attention.py`: packed documents ("thd") are
    cut over the context-parallel ranks as one sequence, and each token gets the rotary position
    that it has within its document."""

    def documents_and_positions(
        self, hidden_states: torch.Tensor, packed: Any
    ) -> tuple[Any, torch.Tensor | None]:
        """(what the core is given, positions [t] of this rank's tokens in their documents), both
        None if nothing is packed.

        Raises:
            ValueError: documents over ranks with a core attention of Megatron's.
        """
        if packed is None:
            return None, None
        core = self.core_attention
        layout = getattr(core, "sequence_layout", None)
        group = self.pg_collection.cp
        if layout is None:
            if group.size() > 1:
                raise ValueError(
                    f"packed_seq_params (thd) over {group.size()} context-parallel ranks with a "
                    f"{type(core).__name__}, which cuts each document over the ranks by itself. "
                    "Use LaspSoftmaxAttention as core attention of the softmax layers."
                )
            return packed, None
        documents = Documents.of(packed)
        num_tokens = hidden_states.shape[0]
        if self.config.sequence_parallel:
            num_tokens *= self.config.tensor_model_parallel_size
        # Once per batch: every layer asks.
        boundaries = documents.cu_seqlens
        key = (id(boundaries), boundaries._version, num_tokens, layout, hidden_states.device)
        known = getattr(packed, "lasp_positions", None)
        if known is None or known[0] != key:
            positions = document_positions(boundaries, num_tokens, layout, group)
            known = packed.lasp_positions = key, positions.to(hidden_states.device)
        return documents, known[1]


class LaspSelfAttention(PackedAttention, SelfAttention):
    """Megatron's SelfAttention, with packed documents over ranks; see `PackedAttention`.

    Raises:
        ValueError: FP8 or FP4 with Megatron's local linear layers.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **keywords: Any) -> None:
        super().__init__(config, *args, **keywords)
        check_precision(config, self.linear_proj)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params=None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As SelfAttention.forward: [s, b, d] -> ([s, b, d], bias)."""
        documents, positions = self.documents_and_positions(hidden_states, packed_seq_params)
        angles = self.rotary_angles(hidden_states, rotary_pos_emb, documents, positions)
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=angles,
            packed_seq_params=documents,
            **keywords,
        )

    def rotary_angles(self, hidden_states, rotary_pos_emb, documents, positions):
        """Angles [s, 1, 1, dim] of this rank's tokens; `rotary_pos_emb`: the model's."""
        if positions is None or rotary_pos_emb is None:
            return rotary_pos_emb
        if isinstance(rotary_pos_emb, tuple):
            return tuple(
                self.rotary_angles(hidden_states, x, documents, positions) for x in rotary_pos_emb
            )
        documents.check_longest(rotary_pos_emb.shape[0])
        return rotary_pos_emb[positions]


class LaspMLASelfAttention(PackedAttention, MLASelfAttention):
    """Megatron's multi-latent attention in either layout, with packed documents over ranks.

    Without Transformer Engine it also corrects a gradient: Megatron's projection to the latents is
    then sharded, and the backward of its gather leaves out the other ranks' heads in the gradient
    of the rotary part of the keys, which all heads share.

    Raises:
        ValueError: apply_rope_fusion, whose kernel counts positions by itself; tensor parallelism
            without sequence parallelism; FP8 or FP4 with Megatron's local linear layers.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **keywords: Any) -> None:
        super().__init__(config, *args, **keywords)
        check_precision(config, self.linear_proj)
        if self.pg_collection.tp.size() > 1:
            self._correct_rotary_keys()
        layout = getattr(self.core_attention, "sequence_layout", None)
        if layout is None:
            return
        if config.apply_rope_fusion:
            raise ValueError(
                "config.apply_rope_fusion is True with latent attention: its kernel counts "
                "positions by itself, in Megatron's zigzag only and without regard to packed "
                "documents. Set it to False."
            )
        self.rotary_pos_emb = ShardedRotaryEmbedding(
            self.rotary_pos_emb, layout, self.pg_collection.cp
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params=None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As MLASelfAttention.forward: [s, b, d] -> ([s, b, d], bias). It has its own rotary
        embedding: angles of the model, which GPTModel does not make here, are not read."""
        documents, positions = self.documents_and_positions(hidden_states, packed_seq_params)
        if isinstance(self.rotary_pos_emb, ShardedRotaryEmbedding):
            self.rotary_pos_emb.positions = positions
            if positions is not None:
                longest = max(documents.max_seqlen_q, documents.max_seqlen_kv)
                documents.check_longest(longest)
        return super().forward(
            hidden_states, attention_mask, *args, packed_seq_params=documents, **keywords
        )

    def _correct_rotary_keys(self):
        if not self.config.sequence_parallel:
            raise ValueError(
                f"latent attention over {self.pg_collection.tp.size()} tensor-parallel ranks "
                "without sequence_parallel: Megatron then sums the gradients of its norms too "
                "often. Set config.sequence_parallel to True."
            )
        down = self.linear_kv_down_proj
        if down.weight.shape[0] < self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            down.register_forward_hook(self._gather_latents)

    def _gather_latents(self, module, args, output):
        """[s, b, latents / tp] -> [s / tp, b, latents], as a projection that is not sharded gives
        them: from these Megatron gathers the keys in a way that sums their gradients."""
        latents, bias = output
        latents = gather_from_tensor_model_parallel_region(latents, self.pg_collection.tp)
        return scatter_to_sequence_parallel_region(latents, self.pg_collection.tp), bias


class LightningSelfAttention(LaspSelfAttention):
    """The linear layer of a hybrid: y = W_o(gate(W_g x) * norm(o)), o = lightning attention.

    As in MiniMax-01 (arXiv 2501.08313) and Ling and Ring linear (arXiv 2510.19338), beside layers
    of softmax attention of any kind, MLA included: shapes, positions and gate are this layer's, not
    the model's. The norm is an option of `LaspCoreAttention` (output_norm). The rows of linear_qkv
    are Megatron's: for each key head its queries, the gates of these, its key, its value.

    Args:
        num_query_groups: key heads; None: as many as query heads.
        head_dim: None: config.kv_channels.
        output_gate: "sigmoid" or "silu" of a projection of the layer's input; "none" or None.
        rotary: "model": the angles that the model passes; "own": those of an embedding of this
            layer; "none". None: "own" in a model with MLA, which passes none, else "model".
        rotary_percent, rotary_base: of an own embedding; the base's default is config.rotary_base
            where Megatron's config has that field (MLA), else 10,000.

    Raises:
        ValueError: an unknown option, or an option of another kind of rotary positions.
    """

    OPTIONS = (
        "num_query_groups",
        "head_dim",
        "output_gate",
        "rotary",
        "rotary_percent",
        "rotary_base",
    )

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        num_query_groups: int | None = None,
        head_dim: int | None = None,
        output_gate: str | None = None,
        rotary: str | None = None,
        rotary_percent: float | None = None,
        rotary_base: float | None = None,
        **megatron: Any,
    ) -> None:
        others = {x: megatron[x] for x in megatron if x not in MEGATRON_ONLY}
        check_options("LightningSelfAttention", others, self.OPTIONS)
        check_choice("output_gate", output_gate or "none", (*OUTPUT_GATES, "none"))
        self_config = linear_layer_config(config, num_query_groups, head_dim)
        self_config.attention_output_gate = output_gate in OUTPUT_GATES
        super().__init__(
            self_config,
            submodules,
            layer_number,
            attn_mask_type,
            cp_comm_type,
            process_groups(pg_collection),
            **megatron,
        )
        self.gate_function = OUTPUT_GATES.get(output_gate)
        self.rotary = rotary or ("own" if config.multi_latent_attention else "model")
        check_choice("rotary", self.rotary, ("model", "own", "none"))
        if self.rotary != "own" and (rotary_percent is not None or rotary_base is not None):
            raise ValueError(
                f"rotary_percent is {rotary_percent} and rotary_base {rotary_base} with "
                f"rotary={self.rotary!r}: they are options of rotary='own'."
            )
        if self.rotary == "own":
            self.own_rotary = self._build_rotary(config, rotary_percent, rotary_base)

    def forward(self, *args: Any, inference_context=None, inference_params=None, **keywords: Any):
        """As SelfAttention.forward: [s, b, d] -> ([s, b, d], bias).

        Raises:
            ValueError: an inference context.
        """
        if inference_context is not None or inference_params is not None:
            raise ValueError(
                "an inference context is given: a linear-attention layer has no key-value cache, "
                "and does not support Megatron's inference. Evaluate full sequences, or export the "
                "weights and decode in another program."
            )
        return super().forward(*args, **keywords)

    def rotary_angles(self, hidden_states, rotary_pos_emb, documents, positions):
        """Angles [s, 1, 1, dim] of this rank's tokens, or None."""
        if self.rotary == "none":
            return None
        if self.rotary == "model":
            return super().rotary_angles(hidden_states, rotary_pos_emb, documents, positions)
        if positions is not None:
            longest = documents.max_seqlen_q or int(documents.cu_seqlens.diff().max())
            documents.check_longest(longest)
            return self.own_rotary.stock.get_emb(longest)[positions]
        length = hidden_states.shape[0] * self.pg_collection.cp.size()
        if self.config.sequence_parallel:
            length *= self.config.tensor_model_parallel_size
        return self.own_rotary(length)

    def _build_rotary(self, config, percent, base):
        if base is None:
            base = getattr(config, "rotary_base", 10000)
        stock = RotaryEmbedding(
            self.config.kv_channels,
            1.0 if percent is None else percent,
            rotary_interleaved=self.config.rotary_interleaved,
            rotary_base=base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )
        layout = self.core_attention.sequence_layout
        return ShardedRotaryEmbedding(stock, layout, self.pg_collection.cp)

    def _apply_output_gate(self, x, gate):
        """Megatron's, with this layer's function: x, gate [s, b, width] -> the same."""
        return _gated(x, gate.reshape(x.shape), self.gate_function)


@fused
def _gated(x, gate, function):
    return (x * function(gate.float())).to(x.dtype)


def linear_layer_config(
    config: TransformerConfig, num_query_groups: int | None, head_dim: int | None
) -> TransformerConfig:
    """A copy of the model's config for a linear layer: without what is about softmax or MLA.

    Raises:
        ValueError: key heads that do not divide the heads.
    """
    num_heads = config.num_attention_heads
    groups = num_heads if num_query_groups is None else num_query_groups
    if groups < 1 or num_heads % groups:
        raise ValueError(
            f"num_query_groups is {groups}: it must divide the {num_heads} heads of the model."
        )
    config = copy.copy(config)
    config.multi_latent_attention = False
    config.num_query_groups = groups
    config.kv_channels = head_dim or config.kv_channels
    config.softmax_scale = None
    config.softmax_type = "vanilla"
    config.window_size = None
    return config
