"""Weights of the released TransNormerLLM checkpoints, to and from those of this model.

According to the published PyTorch class (TransnormerForCausalLM, code of the 385M/1B/7B
checkpoints), `qkvu_proj` is split by chunk(4), so its rows are all q, then all k, v, u, where ours
are ordered by head; `l1 * l2 -> l3` is our `w1 * w2 -> w3`; `lrpe.theta` is [H, 1, D]; norms have
no weights; `lm_head` is tied to the embedding. No checkpoint file was read: the tests reimplement
that class's forward and compare logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lasp.tnl.config import TNLConfig
from lasp.tnl.model import TNL

__all__ = ["config_from_released", "from_released", "to_released"]

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def config_from_released(values: Mapping[str, Any]) -> TNLConfig:
    """The TNLConfig of a released `config.json`.

    Missing keys take the defaults of the published configuration class.

    Raises:
        ValueError: a variant that is not supported (biases, other norms, inner widths).
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
            differs from the embedding, or softmax layers or a learned decay in the config.
    """
    released_names, shapes = _names_and_shapes(config)
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
    for ours, theirs in released_names.items():
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

    `lm_head.weight` is the embedding's tensor itself. Drop it for file formats that refuse shared
    memory (safetensors): the published class ties it again.

    Raises:
        ValueError: keys missing or unexpected.
    """
    names, _ = _names_and_shapes(config)
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


def _names_and_shapes(config: TNLConfig) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """This model's parameter names -> the released ones, and the shapes by released name."""
    if config.num_softmax_layers:
        raise ValueError(
            f"layer_types is {config.layer_types!r}, but the released models have no softmax "
            'layers: only a model of "L" converts.'
        )
    if config.decay != "fixed":
        raise ValueError(
            f"decay is {config.decay!r}, but that of the released models is fixed: convert with "
            'decay="fixed". A model with a learned decay starts from such weights by '
            "load_state_dict(weights, strict=False)."
        )
    with torch.device("meta"):
        parameters = TNL(config).state_dict()
    names = {
        name: name.replace("embedding.", "model.embed_tokens.")
        .replace("blocks.", "model.layers.")
        .replace("channel_mixer.w", "channel_mixer.l")
        for name in parameters
    }
    shapes = {theirs: tuple(parameters[ours].shape) for ours, theirs in names.items()}
    return names, shapes | {_HEAD: shapes[_EMBEDDING]}
