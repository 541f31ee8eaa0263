"""Specs of the modules from which Megatron builds a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from lasp.tnl import TNLConfig
from parallel.megatron.attention import LaspCoreAttention, LaspSoftmaxAttention
from parallel.megatron.layout import layers_of_stage
from parallel.megatron.norm import ApexSRMSNorm, MegatronSRMSNorm
from parallel.megatron.self_attention import LaspSelfAttention
from parallel.megatron.tnl import (
    TNLSelfAttention,
    TNLSelfAttentionSubmodules,
    TNLTransformerLayer,
    identity,
)
from parallel.megatron.validation import check_choice

__all__ = [
    "get_lasp_gpt_layer_spec",
    "get_tnl_block_spec",
    "get_tnl_layer_spec",
    "mlp_spec",
    "softmax_spec",
    "srms_norm",
    "tnl_layer_spec",
    "tnl_mixer_spec",
    "tnl_style_layer",
    "tnl_transformer_config",
]

_NORMS = {"torch": MegatronSRMSNorm, "apex": ApexSRMSNorm}


def get_lasp_gpt_layer_spec(base: ModuleSpec, **core_params: Any) -> ModuleSpec:
    """A copy of a GPT layer spec with `LaspCoreAttention` as core attention.

    Args:
        base: such as get_gpt_layer_local_spec() or get_gpt_layer_with_transformer_engine_spec().
            Not changed: Megatron shares spec objects.
        core_params: options of `LaspCoreAttention`.

    Raises:
        ValueError: a spec without that slot.
    """
    spec = copy.deepcopy(base)
    attention = getattr(getattr(spec.submodules, "self_attention", None), "submodules", None)
    if not hasattr(attention, "core_attention"):
        raise ValueError(
            f"base is {base!r}: it needs submodules.self_attention.submodules.core_attention, as "
            "Megatron's GPT layer specs have."
        )
    attention.core_attention = ModuleSpec(module=LaspCoreAttention, params=core_params)
    if spec.submodules.self_attention.module is SelfAttention:
        # The same, with packed documents over ranks.
        spec.submodules.self_attention.module = LaspSelfAttention
    return spec


def get_tnl_layer_spec(
    *,
    backend: Any = None,
    lrpe_layers: tuple[int, ...] = (0,),
    feature_map: str = "silu",
    scale_embedding: bool = True,
    norm: str = "torch",
    **core_params: Any,
) -> ModuleSpec:
    """The spec of a TNL layer: SRMSNorm, gated linear attention, SGLU.

    Args:
        backend: Megatron's provider of sharded linear layers, such as LocalSpecProvider() (the
            default) or TESpecProvider().
        lrpe_layers, feature_map: of `TNLSelfAttention`.
        scale_embedding: of `TNLTransformerLayer`.
        norm: "torch", or "apex" for its FusedRMSNorm.
        core_params: options of `LaspCoreAttention` (layout, exchange, decay, ...).
    """
    backend = backend or LocalSpecProvider()
    mixer = tnl_mixer_spec(backend, lrpe_layers, feature_map, core_params)
    return tnl_style_layer(mixer, mlp_spec(backend), norm=norm, scale_embedding=scale_embedding)


def get_tnl_block_spec(
    config: TransformerConfig,
    tnl: TNLConfig | None = None,
    *,
    layer_types: str | None = None,
    softmax_core: ModuleSpec | type | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    backend: Any = None,
    norm: str = "torch",
    **layer_params: Any,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and TNL's own final norm.

    Args:
        config: Megatron's, as from `tnl_transformer_config`.
        tnl: the model: its layer types, LRPE layers, activation and embedding scale are the
            defaults of the options below; None: those of a released TNL.
        layer_types: "L" for a linear, "S" for a softmax layer, repeated until there are
            config.num_layers. With softmax layers it sets config.hetereogenous_dist_checkpoint,
            without which Megatron's checkpoints assume that all layers are alike.
        softmax_core: core attention of softmax layers; None: `LaspSoftmaxAttention`.
        vp_stage, pp_rank: as in Megatron's own block specs.
        backend, norm, layer_params: options of `get_tnl_layer_spec`.

    Raises:
        ValueError: layer types of other letters, or whose number does not divide the layers.
    """
    if tnl is not None:
        of_model = dict(lrpe_layers=tnl.lrpe_layers, feature_map=tnl.activation)
        layer_params = of_model | dict(scale_embedding=tnl.scale_embedding) | layer_params
        layer_types = layer_types or tnl.layer_types
    layer_types = layer_types or "L"
    provider = backend or LocalSpecProvider()
    if layer_types.strip("LS") or config.num_layers % len(layer_types):
        raise ValueError(
            f"layer_types is {layer_types!r}: it must be letters L (linear) and S (softmax), as "
            f"many as there are layers or a divisor of that ({config.num_layers})."
        )
    layers = {"L": get_tnl_layer_spec(backend=provider, norm=norm, **layer_params)}
    if "S" in layer_types:
        layers["S"] = tnl_style_layer(
            softmax_spec(softmax_core, provider, layer_params.get("layout")),
            mlp_spec(provider),
            norm=norm,
            scale_embedding=layer_params.get("scale_embedding", True),
        )
        config.hetereogenous_dist_checkpoint = True
    specs = [layers[kind] for kind in layer_types * (config.num_layers // len(layer_types))]
    return TransformerBlockSubmodules(
        layer_specs=layers_of_stage(config, specs, vp_stage, pp_rank),
        layer_norm=srms_norm(norm),
    )


def tnl_transformer_config(
    tnl: TNLConfig, make: Callable[..., TransformerConfig] = TransformerConfig, **megatron: Any
) -> TransformerConfig:
    """Megatron's config of the TNL that `tnl` describes.

    Args:
        megatron: fields of TransformerConfig that `tnl` does not have (parallel sizes, dtypes,
            recomputation, ...), and overrides. With softmax layers the GPTModel needs
            position_embedding_type="rope" and rotary_base=tnl.rope_base.
    """
    fields = dict(
        num_layers=tnl.num_layers,
        hidden_size=tnl.dim,
        num_attention_heads=tnl.num_heads,
        # For the softmax layers: a linear layer has a key and a value per head.
        num_query_groups=tnl.num_key_value_heads,
        kv_channels=tnl.head_dim,
        ffn_hidden_size=tnl.glu_dim,
        layernorm_epsilon=tnl.norm_eps,
        init_method_std=tnl.init_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=identity,
        bias_activation_fusion=False,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return make(**(fields | megatron))


def tnl_mixer_spec(backend, lrpe_layers, feature_map, core_params) -> ModuleSpec:
    """The spec of TNL's token mixer."""
    return ModuleSpec(
        module=TNLSelfAttention,
        params=dict(feature_map=feature_map, lrpe_layers=tuple(lrpe_layers)),
        submodules=TNLSelfAttentionSubmodules(
            linear_qkvu=backend.column_parallel_linear(),
            # The mixer applies the feature map, because LRPE comes after it.
            core_attention=ModuleSpec(
                module=LaspCoreAttention, params=dict(core_params, feature_map="none")
            ),
            linear_proj=backend.row_parallel_linear(),
        ),
    )


def softmax_spec(core, backend, layout) -> ModuleSpec:
    """The spec of Megatron's softmax attention around a core; None: `LaspSoftmaxAttention`."""
    core = core or ModuleSpec(module=LaspSoftmaxAttention, params=dict(layout=layout))
    return ModuleSpec(
        module=LaspSelfAttention,
        params=dict(attn_mask_type=AttnMaskType.causal),
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=core,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )


def srms_norm(norm: str) -> type:
    """The class for Megatron's norm slots; ValueError for an unknown name."""
    check_choice("norm", norm, _NORMS)
    return _NORMS[norm]


def mlp_spec(backend) -> ModuleSpec:
    """The spec of the channel mixer (SGLU by `TNLTransformerLayer`'s config)."""
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(),
            linear_fc2=backend.row_parallel_linear(),
        ),
    )


def tnl_style_layer(
    attention: ModuleSpec | None,
    mlp: ModuleSpec | None,
    *,
    module: type = TNLTransformerLayer,
    norm: str = "torch",
    scale_embedding: bool = True,
) -> ModuleSpec:
    """A pre-norm layer with TNL's norm and one mixer or both."""
    submodules = TransformerLayerSubmodules()
    if attention is not None:
        submodules.input_layernorm = srms_norm(norm)
        submodules.self_attention = attention
        submodules.self_attn_bda = get_bias_dropout_add
    if mlp is not None:
        submodules.pre_mlp_layernorm = srms_norm(norm)
        submodules.mlp = mlp
        submodules.mlp_bda = get_bias_dropout_add
    return ModuleSpec(
        module=module, params=dict(scale_embedding=scale_embedding), submodules=submodules
    )


# For Megatron-LM's `--spec parallel.megatron.specs tnl_layer_spec`, which takes an object and calls
# no function. Megatron then adds its own final norm (RMSNorm with a weight).
tnl_layer_spec = get_tnl_layer_spec()
