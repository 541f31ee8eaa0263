"""The config.json of published Ling, Ring and MiniMax models: what is supported, in one form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.megatron.hf_layout import Entry, ling_entries, minimax_entries

__all__ = ["PublishedModel", "published_model"]


@dataclass(frozen=True)
class PublishedModel:
    """A model that is supported.

    Attributes:
        family: "ling" or "minimax".
        hf: the fields of its config.json, with the names that are used here; see `published_model`.
    """

    family: str
    hf: Mapping[str, Any]

    def entries(self) -> Iterator[Entry]:
        """The tensors of the Megatron form."""
        return _FAMILIES[self.family][1](self.hf)


def published_model(values: Mapping[str, Any]) -> PublishedModel:
    """Read the content of a config.json.

    Known are Ling and Ring linear 2.0 (model_type bailing_moe_linear), 2.5 and 2.6
    (bailing_hybrid), and MiniMax-Text-01 and M1 in their own form (minimax_text_01, minimax_m1) and
    in that of transformers (minimax), whose fields have other names.

    Raises:
        ValueError: another model, a missing field, or a variant that is not supported.
    """
    kind = values.get("model_type")
    if kind not in _KINDS:
        raise ValueError(
            f"model_type is {kind!r}: supported are {', '.join(sorted(_KINDS))}; for others the "
            "layers can be built with get_lightning_hybrid_block_spec."
        )
    family = _KINDS[kind]
    return PublishedModel(family, _FAMILIES[family][0](values))


# Fields that must be there, whole numbers of at least 1.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
)
_LING_SIZES = (
    "num_experts",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "layer_group_size",
    "group_norm_size",
)
_LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

# Fields that select a variant, and what is supported.
_LING_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "linear_silu": False,
    "use_linear_silu": False,
    "linear_rope": True,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
}
_MINIMAX_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "postnorm": True,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def _ling(values: Mapping[str, Any]) -> dict[str, Any]:
    if any(name.startswith("kda_") for name in values) or "short_conv_kernel_size" in values:
        raise ValueError(
            "this is a Ling 3 model, whose linear layers are Kimi Delta Attention: supported are "
            "2.0-linear, 2.5 and 2.6, which have Lightning Attention."
        )
    latent = _LATENT_SIZES if values.get("kv_lora_rank") else ()
    _check(values, (*_SIZES, *_LING_SIZES, *latent), _LING_ONLY)
    hf = dict(values)
    hf["head_dim"] = _head_dim(values)
    hf["rope_theta"] = _rope(values, "rope_theta", 10000.0)
    hf["partial_rotary_factor"] = _rope(values, "partial_rotary_factor", 1.0)
    hf.setdefault("rms_norm_eps", 1e-6)
    hf.setdefault("q_lora_rank", None)
    hf["first_k_dense_replace"] = values.get("first_k_dense_replace", 0)
    hf["num_shared_experts"] = values.get("num_shared_experts", 1)
    hf["routed_scaling_factor"] = values.get("routed_scaling_factor", 1.0)
    hf["num_nextn_predict_layers"] = values.get("num_nextn_predict_layers") or 0
    if hf["num_nextn_predict_layers"] and not latent:
        raise ValueError(
            f"num_nextn_predict_layers is {hf['num_nextn_predict_layers']} without MLA "
            "(kv_lora_rank): no published model has that, and it is not supported."
        )
    # Megatron counts the best topk // topk_group experts of a group, the published code two.
    if hf["num_experts_per_tok"] // hf["topk_group"] != 2:
        raise ValueError(
            f"num_experts_per_tok is {hf['num_experts_per_tok']} and topk_group "
            f"{hf['topk_group']}: the router is supported for twice as many experts as groups."
        )
    shared = values.get("moe_shared_expert_intermediate_size", hf["moe_intermediate_size"])
    if shared != hf["moe_intermediate_size"] or not hf["num_shared_experts"]:
        raise ValueError(
            f"moe_shared_expert_intermediate_size is {shared} with {hf['num_shared_experts']} "
            f"shared experts: it must be moe_intermediate_size ({hf['moe_intermediate_size']}), "
            "with at least one."
        )
    return hf


def _minimax(values: Mapping[str, Any]) -> dict[str, Any]:
    _check(values, (*_SIZES, "num_local_experts"), _MINIMAX_ONLY)
    hf = dict(values)
    hf["head_dim"] = _head_dim(values)
    hf["rope_theta"] = _rope(values, "rope_theta", 1e6)
    hf.setdefault("rms_norm_eps", 1e-5)
    # The published code rotates rotary_dim of each head, the class of transformers all.
    partial = _rope(values, "partial_rotary_factor", 1.0)
    hf["rotary_dim"] = values.get("rotary_dim") or int(hf["head_dim"] * partial)
    for kind, ours in (("linear", "linear_attn"), ("full", "full_attn"), ("mlp", "mlp")):
        theirs = "layernorm_mlp" if kind == "mlp" else f"layernorm_{kind}_attention"
        for which in ("alpha", "beta"):
            field = f"{ours}_{which}_factor"
            hf[field] = values.get(field, values.get(f"{theirs}_{which}", 1.0))
    shared = values.get("shared_intermediate_size", 0)
    if any(shared if isinstance(shared, list) else [shared]):
        raise ValueError(
            f"shared_intermediate_size is {shared}: no published model has a shared expert, and it "
            "is not supported."
        )
    layers = hf["num_hidden_layers"]
    kinds = values.get("attn_type_list") or values.get("decoder_attention_types")
    if kinds is not None:
        hf["layer_types"] = ["full_attention" if kind else "linear_attention" for kind in kinds]
    types = hf.get("layer_types")
    if types is None:
        # The default of transformers.
        types = ["linear_attention" if i % 2 else "full_attention" for i in range(layers)]
    if len(types) != layers or set(types) - {"linear_attention", "full_attention"}:
        raise ValueError(
            f"layer_types has {len(types)} entries of {sorted(set(types))}: it must say "
            f"linear_attention or full_attention for each of {layers} layers."
        )
    hf["layer_types"] = types
    return hf


def _check(values, sizes, only):
    bad = [n for n in sizes if type(values.get(n)) is not int or values[n] < 1]
    if bad:
        raise ValueError(
            f"{bad[0]} is {values.get(bad[0])!r}: it must be a whole number of at least 1."
        )
    for name, supported in only.items():
        if values.get(name, supported) != supported:
            raise ValueError(f"{name} is {values[name]!r}: only {supported!r} is supported.")
    for field in ("rope_scaling", "rope_parameters"):
        scaling = values.get(field) or {}
        known = isinstance(scaling, Mapping)
        kind = (scaling.get("rope_type") or scaling.get("type") or "default") if known else None
        if kind != "default":
            raise ValueError(
                f"{field} is {scaling!r}: rotary positions are supported unscaled only."
            )
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise ValueError(
            f"num_attention_heads is {values['num_attention_heads']}: num_key_value_heads "
            f"({values['num_key_value_heads']}) must divide it."
        )


def _head_dim(values):
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def _rope(values, name, default):
    parameters = values.get("rope_parameters") or {}
    return parameters.get(name, values.get(name, default))


_FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "ling": (_ling, ling_entries),
    "minimax": (_minimax, minimax_entries),
}
_KINDS = {
    "bailing_moe_linear": "ling",
    "bailing_hybrid": "ling",
    "minimax": "minimax",
    "minimax_m1": "minimax",
    "minimax_text_01": "minimax",
}
