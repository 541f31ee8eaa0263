"""TNL in Megatron's hybrid stack, where a pattern gives the kind of each layer.

One symbol is one mixer: "M" (MambaModel, megatron-core 0.16 and 0.17) or "G" (HybridModel, from
0.18) is linear attention, "*" softmax attention, "-" a channel mixer: a TNL is "M-M-M-". Importing
this module imports Megatron's hybrid stack, which needs triton.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack as _Stack
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as _Submodules

    LINEAR, _LINEAR_SLOT = "G", "gdn_layer"
except ImportError:
    from megatron.core.ssm.mamba_block import MambaStack as _Stack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as _Submodules

    LINEAR, _LINEAR_SLOT = "M", "mamba_layer"

from parallel.megatron.norm import MegatronSRMSNorm
from parallel.megatron.specs import mlp_spec, softmax_spec, tnl_mixer_spec, tnl_style_layer
from parallel.megatron.tnl import TNLTransformerLayer

__all__ = ["LINEAR", "TNLHybridStack", "get_tnl_hybrid_stack_spec"]


class TNLHybridStack(_Stack):
    """Megatron's hybrid stack with TNL's final norm in place of Transformer Engine's."""

    def __init__(self, config, submodules, *args, post_layer_norm: bool = True, **kwargs) -> None:
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = MegatronSRMSNorm(config, config.hidden_size, config.layernorm_epsilon)


class TNLMixerLayer(TNLTransformerLayer):
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
    index = {position: i for i, position in enumerate(mixers)}
    decay_index = [index.get(position) for position in range(len(symbols))]
    core_params = dict(decay_index=decay_index, num_decay_layers=len(mixers)) | core_params
    mixer = tnl_mixer_spec(backend, [mixers[i] for i in lrpe_layers], feature_map, core_params)
    common = dict(scale_embedding=scale_embedding)
    softmax = softmax_spec(softmax_core, backend, core_params.get("layout"))
    layers = {
        _LINEAR_SLOT: tnl_style_layer(mixer, None, module=TNLMixerLayer, **common),
        "attention_layer": tnl_style_layer(softmax, None, **common),
        "mlp_layer": tnl_style_layer(None, mlp_spec(backend), **common),
    }
    return ModuleSpec(module=TNLHybridStack, submodules=_Submodules(**layers))
