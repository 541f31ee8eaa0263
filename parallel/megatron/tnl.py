"""TransNormerLLM's layer made of Megatron's parts.

Shapes, Megatron's order: s tokens of this context-parallel rank, b batch, d model width, H heads of
this tensor-parallel rank, D head dim.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

from lasp.tnl.heads import split_heads
from lasp.tnl.positions import LRPE
from parallel.compile import fused
from parallel.megatron.attention import process_groups
from parallel.megatron.documents import Documents
from parallel.megatron.layout import segments
from parallel.megatron.optimizer import save_float32_parameters
from parallel.megatron.residual import resolve_comm_type
from parallel.megatron.validation import (
    MEGATRON_ONLY,
    check_choice,
    check_options,
    check_precision,
)

__all__ = [
    "SGLU",
    "TNLSelfAttention",
    "TNLSelfAttentionSubmodules",
    "TNLTransformerLayer",
    "identity",
    "tnl_layer_config",
]


@dataclass
class TNLSelfAttentionSubmodules:
    """The submodules of a `TNLSelfAttention`."""

    linear_qkvu: ModuleSpec | type | None = None
    core_attention: ModuleSpec | type | None = None
    linear_proj: ModuleSpec | type | None = None


class TNLSelfAttention(MegatronModule):
    """TNL's token mixer in Megatron's self-attention slot: y = W_o(u * core(phi(q), phi(k), v)).

    arXiv 2405.17381 eq. 11 and 13. The rows of linear_qkvu are ordered head by head, and within a
    head q, k, v, u, as in `lasp.tnl`: any tensor-parallel size shards one checkpoint by rows.

    Args:
        feature_map: on queries and keys, before the positions: "silu" or "none".
        lrpe_layers: layers, from 0, whose queries and keys carry LRPE positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TNLSelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        feature_map: str = "silu",
        lrpe_layers: tuple[int, ...] = (0,),
        **others: Any,
    ) -> None:
        super().__init__(config=config)
        unknown = {name: others[name] for name in others if name not in MEGATRON_ONLY}
        check_options("TNLSelfAttention", unknown, ("feature_map", "lrpe_layers"))
        self.layer_number = layer_number
        self.pg_collection = process_groups(pg_collection)
        self.tp_group, self.cp_group = self.pg_collection.tp, self.pg_collection.cp
        self.head_dim = config.kv_channels
        check_choice("feature_map", feature_map, ("silu", "none"))
        self.feature_map = (feature_map, _silu if feature_map == "silu" else None)
        width = config.kv_channels * config.num_attention_heads
        common = dict(config=config, bias=False, is_expert=False, tp_group=self.tp_group)
        self.linear_qkvu = build_module(
            submodules.linear_qkvu,
            config.hidden_size,
            4 * width,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=self.pg_collection,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **common,
        )
        check_precision(config, self.linear_proj)
        self.lrpe = self._build_lrpe() if layer_number - 1 in lrpe_layers else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params=None,
        inference_context=None,
        inference_params=None,
        **unused,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, d] -> ([s, b, d], None); with sequence_parallel s is divided by tp at both ends.

        Rotary embeddings are ignored: TNL's positions are its decay and LRPE.
        """
        if inference_context is not None or inference_params is not None:
            raise ValueError(
                "an inference context is given: a TNL layer does not support Megatron's inference. "
                "Generate with the native model (parallel.megatron.from_megatron)."
            )
        qkvu, _ = self.linear_qkvu(hidden_states)
        qkvu = qkvu.unflatten(-1, (-1, 4, self.head_dim))
        q, k, v, u = split_heads(qkvu, *self.feature_map)
        if self.lrpe is not None:
            if packed_seq_params is not None:
                raise ValueError(
                    "packed_seq_params is given: LRPE counts positions from the start of the "
                    "sequence. Use lrpe_layers=() or one document per sequence."
                )
            q, k = self._with_positions(q, k)
        if packed_seq_params is not None:
            packed_seq_params = Documents.of(packed_seq_params)
        o = self.core_attention(
            q,
            k,
            v,
            attention_mask,
            attn_mask_type=AttnMaskType.causal,
            attention_bias=None,
            packed_seq_params=packed_seq_params,
            gate=u,
        )
        return self.linear_proj(o)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Megatron's checkpoint entries; LRPE rates are sharded by heads."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = {}
        for name in ("linear_qkvu", "core_attention", "linear_proj"):
            module = getattr(self, name)
            state |= module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        if self.lrpe is not None:
            theta = make_sharded_tensors_for_checkpoint(
                {"theta": self.lrpe.theta},
                f"{prefix}lrpe.",
                {"theta": 0},
                # No offset: Megatron stacks equal layers into one entry, but only some layers have
                # rates. Their layer's number is in the name instead.
                (),
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            (entry,) = theta.values()
            entry.key = f"{prefix}lrpe.layer_{self.layer_number - 1}.theta"
            state |= theta
        return state

    def _build_lrpe(self) -> LRPE:
        num_heads = self.config.num_attention_heads
        local_heads = num_heads // self.tp_group.size()
        first = self.tp_group.rank() * local_heads
        lrpe = _FlatLRPE(num_heads, self.head_dim, slice(first, first + local_heads))
        if not self.config.use_cpu_initialization:
            lrpe.to(torch.cuda.current_device())
        set_tensor_model_parallel_attributes(lrpe.theta, True, 0, 1)
        save_float32_parameters()
        return lrpe

    def _with_positions(self, q, k):
        """q, k [s, b, H, D] -> [s, b, H, 2D], by the global positions of this rank's tokens."""
        rank, size = self.cp_group.rank(), self.cp_group.size()
        ranges = segments(q.shape[0] * size, self.core_attention.sequence_layout, rank, size)
        q, k = (x.transpose(0, 1) for x in (q, k))
        return (x.transpose(0, 1) for x in self.lrpe(q, k, *(start for start, _ in ranges)))


class _FlatLRPE(LRPE):
    """LRPE of some heads, theta [H * D]: Megatron's optimizers exclude one-dimensional parameters
    from weight decay, which would change the positions."""

    def __init__(self, num_heads: int, head_dim: int, heads: slice) -> None:
        super().__init__(num_heads, head_dim)
        self.keep_heads(heads)
        self.theta = torch.nn.Parameter(self.theta.detach().flatten())

    def _local_theta(self, num_heads):
        return self.theta.view(num_heads, 1, self.head_dim)


class TNLTransformerLayer(TransformerLayer):
    """Megatron's layer with TNL's channel mixer (SGLU) and its scaled embeddings.

    Args:
        scale_embedding: multiply the input of the model's first layer by sqrt(d), which scales the
            embedding. It is done here because a spec reaches layers only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *args: Any,
        scale_embedding: bool = True,
        **kwargs: Any,
    ) -> None:
        config = resolve_comm_type(tnl_layer_config(config), layer_number, kwargs)
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        if type(self.mlp) is MLP:
            _check_plain(self.config)
            # Not in the spec: 0.16 gives its groups to MLP itself only.
            self.mlp.__class__ = SGLU
        is_first = self.layer_number == 1
        self.input_scale = math.sqrt(config.hidden_size) if is_first and scale_embedding else None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        """As TransformerLayer.forward: [s, b, d] -> ([s, b, d], context)."""
        if self.input_scale is not None:
            hidden_states = hidden_states * self.input_scale
        return super().forward(hidden_states, *args, **kwargs)


class SGLU(MLP):
    """Megatron's MLP as TNL's channel mixer: y = W_2(a * b), where a, b = W_1 x."""

    def forward(
        self, hidden_states: torch.Tensor, *unused: Any, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, d] -> ([s, b, d], None), as MLP.forward."""
        halves, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(_product_of_halves(halves))


def _check_plain(config):
    for field, plain in (("glu_linear_offset", 0.0), ("activation_func_clamp_value", None)):
        value = getattr(config, field, plain)
        if value != plain:
            raise ValueError(
                f"config.{field} is {value}: TNL's channel mixer is a product and nothing else. "
                f"Leave it at {plain}."
            )


@fused
def _silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x)


@fused
def _product_of_halves(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * b


def tnl_layer_config(config: TransformerConfig) -> TransformerConfig:
    """A copy in which Megatron's MLP is SGLU: gated, without activation or bias."""
    config = copy.copy(config)
    config.gated_linear_unit = True
    config.activation_func = identity
    config.bias_activation_fusion = False
    config.use_te_activation_func = False
    config.add_bias_linear = False
    return config


def identity(x: torch.Tensor) -> torch.Tensor:
    """SGLU's activation."""
    return x
