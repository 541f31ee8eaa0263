"""TNL and lightning hybrids in Megatron's hybrid stack, where a pattern gives the kind of each
layer.

One symbol is one mixer: "M" (MambaModel, megatron-core 0.16 and 0.17) or "G" (HybridModel, from
0.18) is linear attention, "*" softmax attention, "+" latent attention (MLA, HybridModel only), "-"
a channel mixer, "E" experts: a TNL is "M-M-M-". In HybridModel "|" stands between pipeline stages,
and "/" before each layer of multi-token prediction. Importing this module imports Megatron's hybrid
stack, which needs triton.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack as _Stack
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as _Submodules

    LINEAR, _LINEAR_SLOT = "G", "gdn_layer"
except ImportError:
    from megatron.core.ssm.mamba_block import MambaStack as _Stack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as _Submodules

    LINEAR, _LINEAR_SLOT = "M", "mamba_layer"

from parallel.megatron.lightning_hybrid import hybrid_mtp_spec, single_mixers
from parallel.megatron.norm import MegatronRMSNorm, MegatronSRMSNorm
from parallel.megatron.residual import LightningHybridLayer
from parallel.megatron.specs import mlp_spec, softmax_spec, tnl_mixer_spec, tnl_style_layer
from parallel.megatron.tnl import TNLTransformerLayer
from parallel.megatron.validation import check_options

__all__ = [
    "LINEAR",
    "LightningHybridStack",
    "TNLHybridStack",
    "get_lightning_hybrid_stack_spec",
    "get_tnl_hybrid_stack_spec",
]


class TNLHybridStack(_Stack):
    """Megatron's hybrid stack with TNL's final norm in place of Transformer Engine's."""

    norm: type = MegatronSRMSNorm

    def __init__(self, config, submodules, *args, post_layer_norm: bool = True, **kwargs) -> None:
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = self.norm(config, config.hidden_size, config.layernorm_epsilon)


class LightningHybridStack(TNLHybridStack):
    """Megatron's hybrid stack with a final RMSNorm that needs no Transformer Engine."""

    norm = MegatronRMSNorm


class _LinearSlot:
    """A token mixer in the linear slot, which passes more arguments than a TransformerLayer has."""

    def __init__(
        self,
        config,
        submodules,
        layer_number: int = 1,
        *args: Any,
        residual_in_fp32: bool = False,
        pp_layer_offset: int = 0,
        **kwargs: Any,
    ) -> None:
        # MambaStack has added the pipeline stage's offset, and TransformerLayer adds it again.
        super().__init__(config, submodules, layer_number - pp_layer_offset, *args, **kwargs)


class TNLMixerLayer(_LinearSlot, TNLTransformerLayer):
    """TNL's token mixer alone."""


class LightningMixerLayer(_LinearSlot, LightningHybridLayer):
    """The attention of a lightning hybrid alone."""


def get_tnl_hybrid_stack_spec(
    pattern: str,
    *,
    backend: Any = None,
    softmax_core: ModuleSpec | type | None = None,
    lrpe_layers: tuple[int, ...] = (0,),
    feature_map: str = "silu",
    scale_embedding: bool = True,
    **core_params: Any,
) -> ModuleSpec:
    """The stack spec of a model whose layers follow `pattern`; give the model the same pattern.

    Args:
        pattern: of the full model; "|" between pipeline stages where Megatron supports it.
        lrpe_layers: layers with LRPE, counted as in `lasp.tnl`: from 0 among the token mixers,
            linear and softmax. Decays count layers in the same way, unless core_params override it
            (decay_index, a list with an entry per symbol of the pattern, and num_decay_layers).
        softmax_core, backend, feature_map, scale_embedding, core_params: as in
            `get_tnl_block_spec` and `get_tnl_layer_spec`.

    Raises:
        ValueError: a pattern with other symbols, or without a linear layer.
    """
    symbols = pattern.replace("|", "")
    if set(symbols) - {LINEAR, "*", "-"} or LINEAR not in symbols:
        raise ValueError(
            f"pattern is {pattern!r}: it needs a {LINEAR} (linear attention); other symbols are "
            "* (softmax attention), - (channel mixer) and | (between pipeline stages)."
        )
    backend = backend or LocalSpecProvider()
    mixers = [position for position, symbol in enumerate(symbols) if symbol != "-"]
    core_params = _decay_options(symbols) | core_params
    mixer = tnl_mixer_spec(backend, [mixers[i] for i in lrpe_layers], feature_map, core_params)
    common = dict(scale_embedding=scale_embedding)
    softmax = softmax_spec(softmax_core, backend, core_params.get("layout"))
    layers = {
        _LINEAR_SLOT: tnl_style_layer(mixer, None, module=TNLMixerLayer, **common),
        "attention_layer": tnl_style_layer(softmax, None, **common),
        "mlp_layer": tnl_style_layer(None, mlp_spec(backend), **common),
    }
    return ModuleSpec(module=TNLHybridStack, submodules=_Submodules(**layers))


def get_lightning_hybrid_stack_spec(
    config: TransformerConfig, pattern: str, **options: Any
) -> ModuleSpec:
    """The stack spec of a lightning hybrid whose layers follow `pattern`; give the model the same
    pattern.

    Args:
        pattern: of the full model, with the symbols that the module's docstring names.
        options: those of `get_lightning_hybrid_block_spec` but softmax, which the pattern gives,
            and dense_first and residual, which a stack of single mixers has no place for. Decays
            count attention layers, linear and softmax.

    Raises:
        ValueError: a pattern with other symbols, without a linear layer, or with one after "/",
            whose decay Megatron's numbers do not give; an unknown option.
    """
    main, *mtp = pattern.split("/")
    symbols = main.replace("|", "")
    _check_pattern(pattern, symbols, mtp)
    unknown = {name: options[name] for name in ("dense_first", "residual") if name in options}
    check_options("a hybrid stack", unknown, ("pattern (- dense, E experts)",))
    softmax = "mla" if "+" in pattern else "gqa" if "*" in pattern else None
    options = dict(softmax=softmax) | options
    layers = single_mixers(config, _decay_options(symbols) | options)
    layers["linear"].module = LightningMixerLayer
    slots = {
        _LINEAR_SLOT: "linear",
        "mla_layer" if "+" in pattern else "attention_layer": "softmax",
        "mlp_layer": "dense",
        "moe_layer": "experts",
    }
    parts = {slot: layers[name] for slot, name in slots.items() if name in layers}
    if mtp:
        parts["mtp_block_spec"] = hybrid_mtp_spec(config, options)
    stack = _Stack if options.get("use_transformer_engine") else LightningHybridStack
    return ModuleSpec(module=stack, submodules=_Submodules(**parts))


def _check_pattern(pattern, symbols, mtp):
    known = {LINEAR, "*", "-", "E"} | ({"+"} if LINEAR == "G" else set())
    wrong = set(symbols).union(*mtp) - known
    if wrong or LINEAR not in symbols or (mtp and LINEAR != "G"):
        raise ValueError(
            f"pattern is {pattern!r}: it needs a {LINEAR} (linear attention); other symbols are "
            "* (softmax attention), - (channel mixer), E (experts) and, in HybridModel, + (MLA), | "
            "(between pipeline stages) and / (before layers of multi-token prediction)."
        )
    if any(LINEAR in part for part in mtp):
        raise ValueError(
            f"pattern is {pattern!r}: the layers of multi-token prediction, after /, cannot be "
            f"{LINEAR}, since Megatron gives them the numbers, and so the decays, of the first "
            "layers. Use softmax attention there, or get_lightning_hybrid_mtp_spec in a GPTModel."
        )


def _decay_options(symbols):
    """Options of the core attention by which decays count the token mixers of a pattern."""
    mixers = [position for position, symbol in enumerate(symbols) if symbol not in "-E"]
    index = {position: i for i, position in enumerate(mixers)}
    decay_index = [index.get(position) for position in range(len(symbols))]
    return dict(decay_index=decay_index, num_decay_layers=len(mixers))
