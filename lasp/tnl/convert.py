"""Weights of the released TransNormerLLM checkpoints, to and from this model's layout.

Names and layouts were read in the published PyTorch class (TransnormerForCausalLM, code of the
385M/1B/7B checkpoints): `qkvu_proj` is split by chunk(4), so its rows are all q, then all k, v, u,
where ours go head by head; `l1 * l2 -> l3` is our `w1 * w2 -> w3`; `lrpe.theta` is [H, 1, D]; norms
have no weights; `lm_head` is tied to the embedding. No checkpoint file was read: the tests rebuild
that class's forward independently and compare logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lasp.tnl.config import TNLConfig

__all__ = ["config_from_released", "from_released", "to_released"]

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def config_from_released(values: Mapping[str, Any]) -> TNLConfig:
    """The TNLConfig of a released `config.json`.

    Keys it lacks take the defaults of the published configuration class.

    Raises:
        ValueError: a variant that this model does not have (biases, other norms, inner widths).
    """
    dim = values.get("decoder_embed_dim", 1024)
    num_layers = values.get("decoder_layers", 24)
    activation = {"silu": "silu", "swish": "silu", "none": "none"}.get(
        values.get("linear_act_fun", "silu")
    )
    refused = {
        "bias": bool(values.get("bias", False)),
        "norm_type": values.get("norm_type", "simplermsnorm") != "simplermsnorm",
        "hidden_dim": values.get("hidden_dim", 1024) != dim,
        "linear_act_fun": activation is None,
        "gate_dim": values.get("gate_dim") is not None,
        "tie_word_embeddings": not values.get("tie_word_embeddings", True),
    }
    unsupported = {name: values.get(name) for name, bad in refused.items() if bad}
    if unsupported:
        raise ValueError(
            f"this checkpoint's config has {unsupported}; supported are no biases, simplermsnorm, "
            f"hidden_dim == decoder_embed_dim ({dim}), silu/swish/none, a full-width gate and a "
            "tied head."
        )
    uses = values.get("linear_use_lrpe_list") or []
    if not uses:
        uses = [values.get("linear_use_lrpe", False)] * num_layers
    glu_dim = values.get("glu_dim", 2816)
    return TNLConfig(
        vocab_size=values.get("vocab_size", 64000),
        dim=dim,
        num_layers=num_layers,
        num_heads=values.get("decoder_attention_heads", 8),
        glu_dim=dim if glu_dim == -1 else glu_dim,
        activation=activation,
        lrpe_layers=tuple(layer for layer, used in enumerate(uses) if used),
        scale_embedding=not values.get("no_scale_embedding", False),
        init_std=values.get("init_std", 0.02),
        pad_token_id=values.get("pad_token_id", 0),
    )


def from_released(
    state_dict: Mapping[str, torch.Tensor], config: TNLConfig
) -> dict[str, torch.Tensor]:
    """A released state dict as one for `TNL(config).load_state_dict`; dtypes are kept, except that
    LRPE rates become float32.

    Raises:
        ValueError: keys missing, unexpected or of the wrong shape (all are named), a head that
            differs from the embedding, or softmax layers in the config.
    """
    shapes = _released_shapes(config)
    missing = sorted(shapes.keys() - state_dict.keys() - {_HEAD})
    extra = sorted(state_dict.keys() - shapes.keys())
    wrong = [
        f"{name} {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", extra), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"not a released TransNormerLLM of {config}: "
            + "; ".join(problems)
            + ". Build the config with config_from_released(json of the checkpoint's config.json)."
        )
    head = state_dict.get(_HEAD)
    if head is not None and not torch.equal(head, state_dict[_EMBEDDING]):
        raise ValueError(f"{_HEAD} differs from {_EMBEDDING}: this model has one tied matrix.")
    converted = {}
    for ours, theirs in _names(config).items():
        tensor = state_dict[theirs]
        if ours.endswith("qkvu_proj.weight"):
            tensor = _swap_blocks(tensor, 4, config.num_heads)
        elif ours.endswith("lrpe.theta"):
            tensor = tensor.float()
        converted[ours] = tensor
    return converted


def to_released(
    state_dict: Mapping[str, torch.Tensor], config: TNLConfig
) -> dict[str, torch.Tensor]:
    """The inverse of `from_released`: `TNL(config).state_dict()` under the released names.

    `lm_head.weight` is the embedding's tensor itself; drop it for file formats that refuse shared
    memory (safetensors), the published class ties it again.

    Raises:
        ValueError: keys missing or unexpected.
    """
    names = _names(config)
    if names.keys() != state_dict.keys():
        missing, extra = names.keys() - state_dict.keys(), state_dict.keys() - names.keys()
        raise ValueError(
            f"not the state dict of a TNL of {config}: missing {sorted(missing)}, "
            f"unexpected {sorted(extra)}."
        )
    converted = {}
    for ours, theirs in names.items():
        tensor = state_dict[ours]
        if ours.endswith("qkvu_proj.weight"):
            tensor = _swap_blocks(tensor, config.num_heads, 4)
        converted[theirs] = tensor
    converted[_HEAD] = converted[_EMBEDDING]
    return converted


def _swap_blocks(weight: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Rows ordered (outer, inner, D) -> rows ordered (inner, outer, D)."""
    return weight.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def _names(config: TNLConfig) -> dict[str, str]:
    """This model's parameter names -> the released ones."""
    if config.num_softmax_layers:
        raise ValueError(
            f"layer_types is {config.layer_types!r}, but the released models have no softmax "
            'layers: only a model of "L" converts.'
        )
    names = {"embedding.weight": _EMBEDDING}
    for i in range(config.num_layers):
        mine, theirs = f"blocks.{i}.", f"model.layers.{i}."
        for name in ("qkvu_proj", "out_proj"):
            names[f"{mine}token_mixer.{name}.weight"] = f"{theirs}token_mixer.{name}.weight"
        if i in config.lrpe_layers:
            names[f"{mine}token_mixer.lrpe.theta"] = f"{theirs}token_mixer.lrpe.theta"
        for j in (1, 2, 3):
            names[f"{mine}channel_mixer.w{j}.weight"] = f"{theirs}channel_mixer.l{j}.weight"
    return names


def _released_shapes(config: TNLConfig) -> dict[str, tuple[int, ...]]:
    d, g = config.dim, config.glu_dim
    by_ending = {
        "embed_tokens.weight": (config.vocab_size, d),
        "qkvu_proj.weight": (4 * d, d),
        "out_proj.weight": (d, d),
        "lrpe.theta": (config.num_heads, 1, config.head_dim),
        "l1.weight": (g, d),
        "l2.weight": (g, d),
        "l3.weight": (d, g),
    }
    shapes = {_HEAD: (config.vocab_size, d)}
    for name in _names(config).values():
        shapes[name] = next(shape for end, shape in by_ending.items() if name.endswith(end))
    return shapes
