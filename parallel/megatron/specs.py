"""Specs: which modules Megatron builds a model from."""

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
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from lasp.tnl import TNLConfig
from parallel.megatron.attention import LaspCoreAttention
from parallel.megatron.norm import ApexSRMSNorm, MegatronSRMSNorm
from parallel.megatron.softmax import LaspSoftmaxAttention
from parallel.megatron.tnl import (
    TNLSelfAttention,
    TNLSelfAttentionSubmodules,
    TNLTransformerLayer,
    identity,
)

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
    """A copy of a GPT layer spec, its core attention replaced by `LaspCoreAttention`.

    Args:
        base: such as get_gpt_layer_local_spec() or get_gpt_layer_with_transformer_engine_spec().
            Left as it is: Megatron shares spec objects.
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
    *,
    softmax_every: int | None = None,
    softmax_core: ModuleSpec | type | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    backend: Any = None,
    scale_embedding: bool = True,
    norm: str = "torch",
    **layer_params: Any,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and TNL's own final norm.

    Args:
        config: the model's.
        softmax_every: make every n-th layer (n, 2n, ...) a softmax layer. It sets
            config.hetereogenous_dist_checkpoint, without which Megatron's checkpoints take all
            layers for alike.
        softmax_core: core attention of those; None: `LaspSoftmaxAttention`. On GPUs with
            Transformer Engine take TEDotProductAttention.
        vp_stage, pp_rank: as in Megatron's own block specs.
        layer_params: options of `get_tnl_layer_spec`.

    Raises:
        ValueError: softmax_every below 2.
    """
    style = dict(norm=norm, scale_embedding=scale_embedding)
    linear = get_tnl_layer_spec(backend=backend, **style, **layer_params)
    specs = [linear] * config.num_layers
    if softmax_every is not None:
        if softmax_every < 2:
            raise ValueError(
                f"softmax_every is {softmax_every}: at least 2 (every second layer), or None for "
                "linear attention throughout."
            )
        if softmax_core is None:
            softmax_core = ModuleSpec(
                module=LaspSoftmaxAttention, params=dict(layout=layer_params.get("layout"))
            )
        provider = backend or LocalSpecProvider()
        attention = softmax_spec(softmax_core, provider)
        softmax = tnl_style_layer(attention, mlp_spec(provider), **style)
        for i in range(softmax_every - 1, config.num_layers, softmax_every):
            specs[i] = softmax
        config.hetereogenous_dist_checkpoint = True
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=specs[first : first + count], layer_norm=srms_norm(norm)
    )


def tnl_transformer_config(
    tnl: TNLConfig, make: Callable[..., TransformerConfig] = TransformerConfig, **megatron: Any
) -> TransformerConfig:
    """Megatron's config of the TNL that `tnl` describes.

    Args:
        megatron: fields of TransformerConfig that `tnl` does not know (parallel sizes, dtypes,
            recomputation, ...), and overrides.
    """
    fields = dict(
        num_layers=tnl.num_layers,
        hidden_size=tnl.dim,
        num_attention_heads=tnl.num_heads,
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
            # The feature map comes before LRPE, so the mixer applies it.
            core_attention=ModuleSpec(
                module=LaspCoreAttention, params=dict(core_params, feature_map="none")
            ),
            linear_proj=backend.row_parallel_linear(),
        ),
    )


def softmax_spec(core, backend) -> ModuleSpec:
    """The spec of Megatron's softmax attention around a core attention."""
    return ModuleSpec(
        module=SelfAttention,
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
    """The class that fills Megatron's norm slots; ValueError for an unknown name."""
    if norm not in _NORMS:
        raise ValueError(f"norm is {norm!r}: choose one of {', '.join(_NORMS)}.")
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
    """A pre-norm layer with TNL's norm and either mixer, or both."""
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
# nothing. Megatron then adds a final norm of its own (RMSNorm with a weight).
tnl_layer_spec = get_tnl_layer_spec()
