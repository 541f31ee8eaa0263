"""Megatron's layer with a scaled residual connection around the norm, as in MiniMax-01."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

__all__ = ["LightningHybridLayer", "global_layer_number", "resolve_comm_type"]


class LightningHybridLayer(TransformerLayer):
    """A layer of a hybrid: Megatron's, or with factors on both branches and the residual after the
    norm (MiniMax-01, arXiv 2501.08313):

        x = norm_1(input)
        z = norm_2(a_attn * x + b_attn * attention(x))
        y = a_mlp * z + b_mlp * mlp(z)

    Args:
        attn_factors, mlp_factors: (a, b); both or none. None: y = x + f(norm(x)), as Megatron.

    Raises:
        ValueError: factors of one branch only, or norms inside the linear layers (Transformer
            Engine's), which the residual cannot come after.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *args: Any,
        attn_factors: Sequence[float] | None = None,
        mlp_factors: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        config = resolve_comm_type(config, layer_number, kwargs)
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        if attn_factors is None and mlp_factors is None:
            self.residual_norm = None
            return
        if attn_factors is None or mlp_factors is None:
            raise ValueError(
                f"attn_factors is {attn_factors} and mlp_factors {mlp_factors}: give both, each "
                "the factor of the residual and that of the branch, or none."
            )
        norms = self.input_layernorm, self.pre_mlp_layernorm
        if any(isinstance(norm, IdentityOp) for norm in norms):
            raise ValueError(
                "residual factors need norms of their own, and this backend has them inside its "
                "linear layers: use use_transformer_engine=False."
            )
        # Megatron takes the residual before its norms; so the norms go before that.
        self.residual_norm, self.post_attention_norm = norms
        self.input_layernorm, self.pre_mlp_layernorm = IdentityOp(), IdentityOp()
        self.self_attn_bda = _scaled_add(*attn_factors, self.post_attention_norm)
        self.mlp_bda = _scaled_add(*mlp_factors)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        """As TransformerLayer.forward: [s, b, d] -> ([s, b, d], context)."""
        if self.residual_norm is not None:
            hidden_states = self.residual_norm(hidden_states)
        return super().forward(hidden_states, *args, **kwargs)


def _scaled_add(residual_factor, branch_factor, norm=None):
    """In the place of Megatron's get_bias_dropout_add."""

    def select(training, fused):
        def add(branch_and_bias, residual, dropout):
            x, bias = branch_and_bias
            x = x if bias is None else x + bias
            x = F.dropout(x, dropout, training)
            x = residual_factor * residual + branch_factor * x
            return x if norm is None else norm(x)

        return add

    return select


def resolve_comm_type(config, layer_number: int, kwargs: dict[str, Any]) -> TransformerConfig:
    """`config`, or a copy with this layer's entry of a list of cp_comm_type.

    megatron-core 0.16 indexes the list by a number that counts from 1.

    Args:
        kwargs: of TransformerLayer's constructor.
    """
    if not isinstance(config.cp_comm_type, list | tuple):
        return config
    number = global_layer_number(config, layer_number, kwargs)
    config = copy.copy(config)
    config.cp_comm_type = config.cp_comm_type[number - 1]
    return config


def global_layer_number(config, layer_number: int, kwargs: dict[str, Any]) -> int:
    """The number of a layer in the model, from 1; arguments as TransformerLayer's constructor."""
    if not kwargs.get("add_layer_offset", True):
        return layer_number
    groups = kwargs.get("pg_collection")
    pp_rank = None if groups is None else groups.pp.rank()
    return layer_number + get_transformer_layer_offset(config, kwargs.get("vp_stage"), pp_rank)
