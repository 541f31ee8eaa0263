"""Block specs of hybrids: linear layers beside softmax layers (GQA or MLA), dense or MoE, with
layers of multi-token prediction (MTP), as Ling, Ring and MiniMax have them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from parallel.megatron.attention import LaspCoreAttention, LaspSoftmaxAttention
from parallel.megatron.layout import layers_of_stage
from parallel.megatron.norm import MegatronRMSNorm
from parallel.megatron.residual import LightningHybridLayer, global_layer_number
from parallel.megatron.self_attention import (
    LaspMLASelfAttention,
    LaspSelfAttention,
    LightningSelfAttention,
)
from parallel.megatron.validation import check_choice, check_options

__all__ = [
    "PatternLayer",
    "get_lightning_hybrid_block_spec",
    "get_lightning_hybrid_layer_spec",
    "get_lightning_hybrid_mtp_spec",
    "hybrid_mtp_spec",
    "layer_kinds",
    "single_mixers",
]

# Megatron's attention -> ours, which takes packed documents over ranks.
_OURS = {SelfAttention: LaspSelfAttention, MLASelfAttention: LaspMLASelfAttention}


@dataclass
class _Options:
    """Keyword arguments of the specs; see `get_lightning_hybrid_block_spec`."""

    softmax: str | None = None
    dense_first: int | None = None
    use_transformer_engine: bool = False
    softmax_core: ModuleSpec | type | None = None
    qk_norm: bool | None = None
    residual: dict[str, Sequence[float]] | None = None
    attention: dict[str, Any] = field(default_factory=dict)
    core: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def sort(cls, options: dict[str, Any]) -> _Options:
        """Sort keyword arguments by what reads them; ValueError for one that nothing reads."""
        own = [each.name for each in fields(cls) if each.name not in ("attention", "core")]
        groups = {
            "own": own,
            "attention": LightningSelfAttention.OPTIONS,
            "core": ("layout", *LaspCoreAttention.OPTIONS),
        }
        known = [name for names in groups.values() for name in names]
        unknown = {name: options[name] for name in options if name not in known}
        check_options("a lightning hybrid", unknown, known)
        parts = {
            group: {name: options[name] for name in names if name in options}
            for group, names in groups.items()
        }
        return cls(**parts["own"], attention=parts["attention"], core=parts["core"])


def get_lightning_hybrid_block_spec(
    config: TransformerConfig,
    pattern: str | Sequence[str] = "7:1",
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **options: Any,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the final norm.

    The MLP of a layer, dense or MoE, is the one that Megatron's own specs give it by
    config.num_moe_experts and moe_layer_freq, and softmax layers are Megatron's, MLA if
    config.multi_latent_attention. Linear layers are `LightningSelfAttention`. Sets
    config.hetereogenous_dist_checkpoint, without which Megatron's checkpoints assume that all
    layers are alike.

    Args:
        pattern: "7:1": 7 linear layers, then 1 softmax layer, repeated; or letters L (linear) and S
            (softmax), as a string or list, repeated too. Its length must divide the layers.
        softmax: "mla" or "gqa", to check the config; None: what the config says.
        dense_first: the first so many layers have a dense MLP, the others experts; sets
            config.moe_layer_freq. None: as config.moe_layer_freq says.
        use_transformer_engine: take linear layers, norms and softmax attention from it.
        softmax_core: core attention of softmax layers; None: `LaspSoftmaxAttention`, or Transformer
            Engine's.
        qk_norm: whether linear layers normalize queries and keys; None: config.qk_layernorm.
        residual: factors of a residual connection after the norm (see `LightningHybridLayer`), as
            dict(linear=(a, b), softmax=(a, b), mlp=(a, b)).
        vp_stage, pp_rank: as in Megatron's own block specs.
        options: those of `LightningSelfAttention` (num_query_groups, head_dim, output_gate, rotary,
            ...) and of `LaspCoreAttention` (layout, exchange, decay, feature_map, output_norm, ...)
            for all linear layers. A decay counts all layers, linear and softmax, unless decay_index
            (a list with an entry per layer) and num_decay_layers are given.

    Raises:
        ValueError: an unknown option, a pattern that does not fit, or options that contradict the
            config.
    """
    chosen = _Options.sort(options)
    kinds = layer_kinds(pattern, config.num_layers)
    base = _base_specs(config, chosen)
    specs = [_layer(config, chosen, base[i], kind, i) for i, kind in enumerate(kinds)]
    config.hetereogenous_dist_checkpoint = True
    return TransformerBlockSubmodules(
        layer_specs=layers_of_stage(config, specs, vp_stage, pp_rank),
        layer_norm=_norm(config, chosen),
    )


def get_lightning_hybrid_layer_spec(
    pattern: str | Sequence[str] = "7:1", **options: Any
) -> ModuleSpec:
    """One spec for all layers, each of which takes the kind of its number: an object of it, made
    without a config, is what Megatron-LM's --spec can import.

    Megatron then adds its own final norm, and accepts no such spec for multi-token prediction; a
    model provider of one's own rather uses `get_lightning_hybrid_block_spec`, which has the
    arguments.
    """
    _Options.sort(options)
    return ModuleSpec(
        module=PatternLayer,
        params=dict(pattern=pattern, options=options),
        submodules=TransformerLayerSubmodules(),
    )


class PatternLayer(LightningHybridLayer):
    """The layer of a pattern that has this number; see `get_lightning_hybrid_layer_spec`."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *args: Any,
        pattern: str | Sequence[str],
        options: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        chosen = _Options.sort(options)
        kinds = layer_kinds(pattern, config.num_layers)
        index = global_layer_number(config, layer_number, kwargs) - 1
        spec = _layer(config, chosen, _base_specs(config, chosen)[index], kinds[index], index)
        config.hetereogenous_dist_checkpoint = True
        super().__init__(config, spec.submodules, layer_number, *args, **spec.params, **kwargs)


def get_lightning_hybrid_mtp_spec(
    config: TransformerConfig,
    kind: str = "S",
    *,
    decay_index: int | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **options: Any,
) -> MultiTokenPredictionBlockSubmodules | None:
    """GPTModel's mtp_block_spec: config.mtp_num_layers layers of one kind; None on a stage that has
    none. The MLP is that of the model's last layer.

    Args:
        kind: "S" (softmax) or "L" (linear).
        decay_index: for "L", the layer, from 0, whose decay the MTP layers have. It must be given:
            versions of Megatron number these layers differently.
        options: those of `get_lightning_hybrid_block_spec`.

    Raises:
        ValueError: an unknown option or kind, or a decay without a layer.
    """
    check_choice("kind", kind, ("S", "L"))
    chosen = _Options.sort(options)
    if kind == "L" and decay_index is None:
        raise ValueError(
            "decay_index is None for linear layers of multi-token prediction: give the layer, from "
            "0, whose decay they have."
        )
    base = _base_specs(config, chosen)
    layer = _layer(config, chosen, base[-1], kind, decay_index)
    spec = get_gpt_mtp_block_spec_for_backend(
        config,
        TransformerBlockSubmodules(layer_specs=[layer]),
        _backend(chosen),
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if spec is None:
        return None
    spec = copy.deepcopy(spec)
    for each in spec.layer_specs:
        for name in ("enorm", "hnorm", "layer_norm"):
            setattr(each.submodules, name, _norm(config, chosen))
    return spec


def layer_kinds(pattern: str | Sequence[str], num_layers: int) -> str:
    """Letters L (linear) and S (softmax), one per layer.

    Raises:
        ValueError: a pattern that is neither "7:1" nor letters, or does not divide the layers.
    """
    letters = "".join(pattern)
    linear, colon, softmax = letters.partition(":")
    if colon and linear.isdecimal() and softmax.isdecimal():
        letters = "L" * int(linear) + "S" * int(softmax)
    if not letters or letters.strip("LS") or num_layers % len(letters):
        raise ValueError(
            f"pattern is {pattern!r}: it must be linear:softmax layers, such as '7:1', or letters "
            f"L (linear) and S (softmax), for as many layers as the model has or a divisor of that "
            f"({num_layers})."
        )
    return letters * (num_layers // len(letters))


def _base_specs(config, chosen):
    """Megatron's own spec of each layer of the model."""
    has_mla = config.multi_latent_attention
    softmax = chosen.softmax or ("mla" if has_mla else "gqa")
    check_choice("softmax", softmax, ("mla", "gqa"))
    if (softmax == "mla") != has_mla:
        raise ValueError(
            f"softmax is {softmax!r} and config.multi_latent_attention {has_mla}: use an "
            "MLATransformerConfig for 'mla' and a TransformerConfig for 'gqa'."
        )
    if chosen.dense_first is not None:
        _set_dense_first(config, chosen.dense_first)
    if chosen.qk_norm and not config.qk_layernorm:
        raise ValueError(
            "qk_norm is True and config.qk_layernorm False: Megatron sums the gradients of these "
            "norms over tensor-parallel ranks only with config.qk_layernorm. Set it to True."
        )
    return get_gpt_decoder_layer_specs(
        config, chosen.use_transformer_engine, normalization=config.normalization
    )


def _set_dense_first(config, dense_first):
    total = config.num_layers
    if not config.num_moe_experts or not 0 <= dense_first <= total:
        raise ValueError(
            f"dense_first is {dense_first} with {config.num_moe_experts} experts: it needs "
            f"config.num_moe_experts, and 0 to {total} layers."
        )
    frequency = [0] * dense_first + [1] * (total - dense_first)
    if config.moe_layer_freq not in (1, frequency):
        raise ValueError(
            f"dense_first is {dense_first} and config.moe_layer_freq {config.moe_layer_freq}: give "
            "one of them."
        )
    config.moe_layer_freq = frequency


def _layer(config, chosen, base, kind, index):
    """The spec of one layer of the model: `base` with the attention of its kind."""
    spec = copy.deepcopy(base)
    spec.module = LightningHybridLayer
    if chosen.residual is not None:
        factors = _residual_factors(chosen.residual)
        attention = factors["linear" if kind == "L" else "softmax"]
        spec.params = dict(attn_factors=attention, mlp_factors=factors["mlp"])
    parts = spec.submodules
    if kind == "L":
        core = _core_options(config, chosen, index)
        parts.self_attention = _linear_attention(config, chosen, core)
        parts.input_layernorm = _norm_before(config, chosen)
    else:
        parts.self_attention = _softmax_attention(config, chosen, parts.self_attention)
    if not chosen.use_transformer_engine:
        _use_our_norms(parts, _norm(config, chosen))
    return spec


def single_mixers(config: TransformerConfig, options: dict[str, Any]) -> dict[str, ModuleSpec]:
    """Specs of layers with one mixer each, for a hybrid stack: "linear", "dense" and, if the
    config has them, "softmax" and "experts"."""
    chosen = _Options.sort(options)
    backend = _backend(chosen)

    def layer(**parts):
        submodules = TransformerLayerSubmodules(**parts)
        return ModuleSpec(module=LightningHybridLayer, submodules=submodules)

    def mixer(attention, norm):
        parts = dict(input_layernorm=norm, self_attn_bda=get_bias_dropout_add)
        return layer(self_attention=attention, **parts)

    def mlp(norm, **experts):
        parts = dict(pre_mlp_layernorm=norm, mlp_bda=get_bias_dropout_add)
        return layer(mlp=get_mlp_module_spec_for_backend(backend, **experts), **parts)

    norm = _norm_before(config, chosen)
    layers = {
        "linear": mixer(_linear_attention(config, chosen, chosen.core), norm),
        "dense": mlp(norm),
    }
    if chosen.softmax is not None:
        base = _base_specs(config, chosen)[0].submodules
        fused = base.input_layernorm is IdentityOp
        before = IdentityOp if fused else _norm(config, chosen)
        attention = _softmax_attention(config, chosen, base.self_attention)
        layers["softmax"] = mixer(attention, before)
    if config.num_moe_experts:
        # Experts have no norm in their linear layers.
        layers["experts"] = mlp(
            _norm(config, chosen),
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
        )
    return layers


def hybrid_mtp_spec(config: TransformerConfig, options: dict[str, Any]) -> ModuleSpec:
    """mtp_block_spec of a hybrid stack, whose layers the stack builds by its pattern."""
    chosen = _Options.sort(options)
    norm = _norm(config, chosen)
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            layer_norm=norm,
            eh_proj=_backend(chosen).column_parallel_linear(),
            mtp_model_layer=None,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )


def _residual_factors(residual):
    names = ("linear", "softmax", "mlp")
    check_options("residual", {x: residual[x] for x in residual if x not in names}, names)
    missing = [name for name in names if name not in residual]
    if missing:
        raise ValueError(
            f"residual has no factors for {', '.join(missing)}: give (residual, branch) for each "
            "of linear, softmax and mlp."
        )
    return residual


def _core_options(config, chosen, index):
    """Options of the core attention of a linear layer, from 0."""
    core = dict(chosen.core)
    if isinstance(core.get("decay_index"), Sequence):
        indices = core["decay_index"]
        if len(indices) != config.num_layers:
            raise ValueError(
                f"decay_index has {len(indices)} entries: it needs one per layer "
                f"({config.num_layers})."
            )
        index = indices[index]
    core["decay_index"] = index
    core.setdefault("num_decay_layers", config.num_layers)
    return core


def _linear_attention(config, chosen, core):
    backend = _backend(chosen)
    has_norm = config.qk_layernorm if chosen.qk_norm is None else chosen.qk_norm
    if not has_norm:
        qk_norm = IdentityOp
    elif chosen.use_transformer_engine:
        qk_norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
    else:
        qk_norm = _norm(config, chosen)
    fused = backend.fuse_layernorm_and_linear()
    column = backend.column_parallel_layer_norm_linear() if fused else None
    return ModuleSpec(
        module=LightningSelfAttention,
        params=dict(chosen.attention, attn_mask_type=AttnMaskType.causal),
        submodules=SelfAttentionSubmodules(
            linear_qkv=column or backend.column_parallel_linear(),
            core_attention=ModuleSpec(module=LaspCoreAttention, params=core),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _softmax_attention(config, chosen, base):
    """Megatron's attention of a layer, with our core and our handling of packed documents."""
    spec = copy.deepcopy(base)
    spec.module = _OURS[spec.module]
    core = chosen.softmax_core
    if core is None and not chosen.use_transformer_engine:
        core = ModuleSpec(
            module=LaspSoftmaxAttention, params=dict(layout=chosen.core.get("layout"))
        )
    if core is not None:
        spec.submodules.core_attention = core
    if not chosen.use_transformer_engine:
        _use_our_norms(spec.submodules, _norm(config, chosen))
    return spec


def _norm_before(config, chosen):
    """The norm before a projection: none where the backend has it inside the projection."""
    fused = _backend(chosen).fuse_layernorm_and_linear()
    return IdentityOp if fused else _norm(config, chosen)


def _norm(config, chosen):
    """The norm of layers, and the final one."""
    is_rms = config.normalization == "RMSNorm"
    if is_rms and not chosen.use_transformer_engine:
        return MegatronRMSNorm
    return _backend(chosen).layer_norm(rms_norm=is_rms)


def _use_our_norms(submodules, norm):
    names = ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "kv_layernorm")
    for name in names:
        if getattr(submodules, name, None) not in (IdentityOp, None):
            setattr(submodules, name, norm)


def _backend(chosen):
    if not chosen.use_transformer_engine:
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


# For Megatron-LM's `--spec parallel.megatron.lightning_hybrid ling_layer_spec` (or
# minimax_layer_spec): the layers of Ling 2.5 and of MiniMax-01, shapes by Megatron-LM's options.
ling_layer_spec = get_lightning_hybrid_layer_spec(
    "7:1",
    decay="ling",
    feature_map="none",
    output_norm="rms",
    output_norm_groups=8,
    output_gate="sigmoid",
    rotary="own",
    rotary_percent=0.5,
    scale=128**-0.5,
)
minimax_layer_spec = get_lightning_hybrid_layer_spec(
    "7:1",
    decay="minimax",
    feature_map="silu_qkv",
    output_norm="rms",
    output_norm_eps=1e-6,
    output_gate="sigmoid",
    rotary="none",
    # linear_attn_alpha_factor, full_attn_alpha_factor and mlp_alpha_factor of MiniMax-Text-01's
    # config.json; its beta factors are 1.
    residual=dict.fromkeys(("linear", "softmax", "mlp"), (3.5565588200778455, 1.0)),
)
