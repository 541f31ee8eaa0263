"""Megatron models of the shapes of published ones: Ling and Ring linear, and MiniMax-01.

    preset = ling_mini_linear_2_0(megatron=dict(tensor_model_parallel_size=2, bf16=True, ...))
    model = preset.gpt_model(max_sequence_length=131072)

or config, block spec and the arguments of GPTModel one by one. Each preset takes overrides of
fields of the published config.json (`num_hidden_layers=4`), for tests and for models of other
sizes, and `megatron`, fields of Megatron's TransformerConfig. `from_hf_folder` reads config.json
itself. Weights: `parallel.megatron.hf_weights`.

Which public code each follows: Ling and Ring, modeling_bailing_moe_v2_5.py of inclusionAI/Ring-V2.5
and of the published folders; their decay counts layer - 1 (`lasp.decay.ling`), which vLLM's does
not. MiniMax, the class of transformers (`lasp.decay.minimax`), but for rotary positions: the
published config, vLLM and the paper rotate rotary_dim (half) of each head, that class all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from parallel.megatron.hf_config import PublishedModel, published_model
from parallel.megatron.hf_folder import read_config
from parallel.megatron.hf_layout import is_softmax_layer
from parallel.megatron.lightning_hybrid import (
    get_lightning_hybrid_block_spec,
    get_lightning_hybrid_mtp_spec,
)

__all__ = [
    "HybridPreset",
    "from_hf_config",
    "from_hf_folder",
    "ling_2_5_1t",
    "ling_2_6_flash",
    "ling_mini_linear_2_0",
    "minimax_01",
]


@dataclass(frozen=True)
class HybridPreset:
    """A published shape for Megatron.

    Attributes:
        model: the published config.
        config: Megatron's.
        pattern: letters L (linear) and S (softmax), one per layer.
        spec: options of `get_lightning_hybrid_block_spec`, which may be changed (layout, exchange,
            use_transformer_engine, ...).
        positions: arguments of GPTModel.
    """

    model: PublishedModel
    config: TransformerConfig
    pattern: str
    spec: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, Any] = field(default_factory=dict)

    def block_spec(
        self, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> TransformerBlockSubmodules:
        """The layers of this pipeline stage."""
        stage = dict(vp_stage=vp_stage, pp_rank=pp_rank)
        return get_lightning_hybrid_block_spec(self.config, self.pattern, **self.spec, **stage)

    def mtp_spec(
        self, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> MultiTokenPredictionBlockSubmodules | None:
        """The layers of multi-token prediction of this stage: softmax ones, as published."""
        if not self.config.mtp_num_layers:
            return None
        stage = dict(vp_stage=vp_stage, pp_rank=pp_rank)
        return get_lightning_hybrid_mtp_spec(self.config, "S", **self.spec, **stage)

    def gpt_model(self, max_sequence_length: int, **options: Any) -> GPTModel:
        """This pipeline stage of the model, with random weights.

        Args:
            options: arguments of GPTModel, such as a padded vocab_size, or the vp_stage of a
                virtual pipeline.
        """
        vp_stage = options.get("vp_stage")
        stage = dict(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        arguments = dict(
            vocab_size=self.model.hf["vocab_size"],
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            mtp_block_spec=self.mtp_spec(vp_stage),
            share_embeddings_and_output_weights=False,
            **self.positions,
        )
        spec = self.block_spec(vp_stage)
        arguments |= dict(max_sequence_length=max_sequence_length) | options
        return GPTModel(self.config, spec, **arguments)


def ling_mini_linear_2_0(
    *, megatron: Mapping[str, Any] | None = None, **overrides: Any
) -> HybridPreset:
    """Ling-mini-linear-2.0 and Ring-mini-linear-2.0: 16B parameters, 1.6B active, 20 layers in
    groups of four linear and one softmax (arXiv 2510.19338).

    Args:
        megatron: fields of TransformerConfig.
        overrides: fields of the published config.json.

    Raises:
        ValueError: an override that is no field, or that makes a model that is not supported.
    """
    return _override(_LING_MINI_LINEAR_2_0, overrides, megatron)


def ling_2_6_flash(*, megatron: Mapping[str, Any] | None = None, **overrides: Any) -> HybridPreset:
    """Ling-2.6-flash: 104B parameters, 7.4B active, 32 layers in groups of seven linear and one
    MLA, and one layer of multi-token prediction. Arguments as of `ling_mini_linear_2_0`."""
    return _override(_LING_2_6_FLASH, overrides, megatron)


def ling_2_5_1t(*, megatron: Mapping[str, Any] | None = None, **overrides: Any) -> HybridPreset:
    """Ling and Ring 2.5-1T and 2.6-1T: 1T parameters, 63B of them active, 80 layers in
    groups of seven linear and one MLA, and one layer of multi-token prediction. Arguments as of
    `ling_mini_linear_2_0`."""
    return _override(_LING_2_5_1T, overrides, megatron)


def minimax_01(*, megatron: Mapping[str, Any] | None = None, **overrides: Any) -> HybridPreset:
    """MiniMax-Text-01 (arXiv 2501.08313) and MiniMax-M1: 456B parameters, 46B active, 80 layers in
    groups of seven linear and one softmax. Arguments as of `ling_mini_linear_2_0`."""
    return _override(_MINIMAX_01, overrides, megatron)


def from_hf_folder(folder: Path, megatron: Mapping[str, Any] | None = None) -> HybridPreset:
    """The preset of a published folder, by its config.json.

    Raises:
        ValueError: config.json is missing, damaged, or of a model that is not supported.
    """
    return _preset(read_config(Path(folder)), megatron)


def from_hf_config(
    values: Mapping[str, Any], megatron: Mapping[str, Any] | None = None
) -> HybridPreset:
    """The preset of the content of a config.json.

    Raises:
        ValueError: a model that is not supported.
    """
    return _preset(published_model(values), megatron)


def _override(values, overrides, megatron):
    unknown = sorted(overrides.keys() - values.keys())
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no field of this model's config.json: overrides are "
            f"{', '.join(values)}; fields of Megatron's config go into megatron=dict(...)."
        )
    return from_hf_config(values | overrides, megatron)


def _preset(model, megatron):
    return _FAMILIES[model.family](model, dict(megatron or {}))


# What both families have in common: RMSNorm, SwiGLU, no biases, no dropout.
_COMMON: dict[str, Any] = dict(
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=F.silu,
    bias_activation_fusion=False,
    add_bias_linear=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    moe_token_dispatcher_type="alltoall",
    hetereogenous_dist_checkpoint=True,
)


def _sizes(hf):
    return dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        layernorm_epsilon=hf["rms_norm_eps"],
        init_method_std=hf.get("initializer_range", 0.02),
        moe_router_topk=hf["num_experts_per_tok"],
    )


def _ling(model, megatron):
    hf = model.hf
    layers, dense, inner = (
        hf[name] for name in ("num_hidden_layers", "first_k_dense_replace", "moe_intermediate_size")
    )
    dense = min(dense, layers)
    fields = dict(
        qk_layernorm=True,
        num_moe_experts=hf["num_experts"],
        moe_ffn_hidden_size=inner,
        moe_shared_expert_intermediate_size=inner * hf["num_shared_experts"],
        moe_layer_freq=[0] * dense + [1] * (layers - dense),
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        # The bias balances the experts, without an auxiliary loss.
        moe_router_load_balancing_type="none",
        moe_router_num_groups=hf["n_group"],
        moe_router_group_topk=hf["topk_group"],
        moe_router_topk_scaling_factor=hf["routed_scaling_factor"],
        moe_router_dtype="fp32",
        mtp_num_layers=hf["num_nextn_predict_layers"] or None,
    )
    spec = dict(
        decay="ling",
        feature_map="none",
        # That of the published kernel.
        scale=hf["head_dim"] ** -0.5,
        output_norm="rms",
        output_norm_groups=hf["group_norm_size"],
        output_gate="sigmoid",
    )
    rotary = dict(rotary_percent=hf["partial_rotary_factor"], rotary_base=hf["rope_theta"])
    make: type[TransformerConfig] = TransformerConfig
    if hf.get("kv_lora_rank"):
        make = MLATransformerConfig
        fields |= _latent(hf)
        spec |= dict(rotary="own", **rotary)
    pattern = "".join("S" if is_softmax_layer(hf, i) else "L" for i in range(layers))
    config = make(**(_COMMON | _sizes(hf) | fields | megatron))
    # With MLA, Megatron's layers make their own angles.
    return HybridPreset(
        model, config, pattern, spec, dict(position_embedding_type="rope", **rotary)
    )


def _latent(hf):
    return dict(
        # As many key heads as heads, in MLA as in the linear layers.
        num_query_groups=None,
        q_lora_rank=hf["q_lora_rank"],
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        rope_type="rope",
        rotary_base=hf["rope_theta"],
        rotary_scaling_factor=1.0,
    )


def _minimax(model, megatron):
    hf = model.hf
    fields = dict(
        num_moe_experts=hf["num_local_experts"],
        moe_ffn_hidden_size=hf["intermediate_size"],
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=hf.get("router_aux_loss_coef", 0.001),
    )
    residual = {
        kind: (hf[f"{name}_alpha_factor"], hf[f"{name}_beta_factor"])
        for kind, name in (("linear", "linear_attn"), ("softmax", "full_attn"), ("mlp", "mlp"))
    }
    spec = dict(
        decay="minimax",
        feature_map="silu_qkv",
        output_norm="rms",
        # The published code takes its norm's default, not rms_norm_eps.
        output_norm_eps=1e-6,
        output_gate="sigmoid",
        rotary="none",
        residual=residual,
    )
    positions = dict(
        position_embedding_type="rope",
        rotary_percent=hf["rotary_dim"] / hf["head_dim"],
        rotary_base=hf["rope_theta"],
    )
    pattern = "".join("L" if kind == "linear_attention" else "S" for kind in hf["layer_types"])
    config = TransformerConfig(**(_COMMON | _sizes(hf) | fields | megatron))
    return HybridPreset(model, config, pattern, spec, positions)


_FAMILIES = {"ling": _ling, "minimax": _minimax}

_LING_MINI_LINEAR_2_0: dict[str, Any] = dict(
    model_type="bailing_moe_linear",
    vocab_size=157184,
    hidden_size=2048,
    intermediate_size=5120,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    layer_group_size=5,
    group_norm_size=4,
    first_k_dense_replace=1,
    num_experts=256,
    num_experts_per_tok=8,
    num_shared_experts=1,
    n_group=8,
    topk_group=4,
    moe_intermediate_size=512,
    routed_scaling_factor=2.5,
    partial_rotary_factor=0.5,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    initializer_range=0.02,
    num_nextn_predict_layers=0,
)
_LING_2_6_FLASH = _LING_MINI_LINEAR_2_0 | dict(
    model_type="bailing_hybrid",
    hidden_size=4096,
    intermediate_size=9216,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    layer_group_size=8,
    moe_intermediate_size=1024,
    rope_theta=6e6,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_nextn_predict_layers=1,
)
_LING_2_5_1T = _LING_2_6_FLASH | dict(
    hidden_size=8192,
    intermediate_size=18432,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=64,
    group_norm_size=8,
    first_k_dense_replace=4,
    moe_intermediate_size=2048,
)
_MINIMAX_01: dict[str, Any] = dict(
    model_type="minimax_text_01",
    vocab_size=200064,
    hidden_size=6144,
    intermediate_size=9216,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=32,
    num_experts_per_tok=2,
    attn_type_list=[0, 0, 0, 0, 0, 0, 0, 1] * 10,
    layernorm_linear_attention_alpha=3.5565588200778455,
    layernorm_linear_attention_beta=1.0,
    layernorm_full_attention_alpha=3.5565588200778455,
    layernorm_full_attention_beta=1.0,
    layernorm_mlp_alpha=3.5565588200778455,
    layernorm_mlp_beta=1.0,
    rotary_dim=64,
    rope_theta=1e7,
    rms_norm_eps=1e-5,
    router_aux_loss_coef=0.001,
    initializer_range=0.02,
)
