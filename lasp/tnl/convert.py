"""How weights of this model are named and ordered in files: in Hugging Face folders of its own, and
in those of the released TransNormerLLM checkpoints.

A folder of its own has the names of `TNL.state_dict()` after "model.", in the same order, and its
config.json holds the fields of TNLConfig under "tnl"; `lasp.tnl.hf` is the class that reads it.

The released ones: according to the published PyTorch class (TransnormerForCausalLM, code of the
385M/1B/7B checkpoints), `qkvu_proj` is split by chunk(4), so its rows are all q, then all k, v, u,
where ours are ordered by head; `l1 * l2 -> l3` is our `w1 * w2 -> w3`; `lrpe.theta` is [H, 1, D];
norms have no weights; `lm_head` is tied to the embedding. No checkpoint file was read: the tests
reimplement that class's forward and compare logits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lasp.tnl.config import TNLConfig
from lasp.tnl.model import TNL

__all__ = [
    "MODEL_TYPE",
    "WeightLayout",
    "config_from_released",
    "from_released",
    "hf_files",
    "hf_layout",
    "to_released",
]

# "model_type" in config.json, which tells transformers (and `hf_layout`) whose folder it is.
MODEL_TYPE = "lasp_tnl"
_RELEASED_TYPE = "transnormer"

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"

# Lets transformers find the classes with trust_remote_code=True, without an import of lasp.
_MODELING_FILE = "modeling_lasp_tnl.py"
_MODELING_TEXT = """# The model is in the package lasp, which must be installed.
from lasp.tnl.hf import TNLForCausalLM, TNLPretrainedConfig

__all__ = ["TNLForCausalLM", "TNLPretrainedConfig"]
"""


@dataclass(frozen=True)
class WeightLayout:
    """Where a TNL's weights are in a folder's files.

    Attributes:
        config: of the model.
        names: name in `TNL(config).state_dict()` -> name in the files.
        shapes: by the names in the files.
        copies: further names that the files may have -> the tensor that they repeat.
        by_kind: the files have the rows of qkvu_proj ordered q, k, v, u instead of by head.
    """

    config: TNLConfig
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    copies: Mapping[str, str] = field(default_factory=dict)
    by_kind: bool = False

    def problem(self, tensors: Mapping[str, Any]) -> str | None:
        """All that is missing, unexpected or of the wrong shape; None if the files fit.

        Args:
            tensors: whatever has a `shape`, by the names in the files.
        """
        shapes = dict(self.shapes) | {copy: self.shapes[name] for copy, name in self.copies.items()}
        wrong = [
            f"{name} {tuple(tensors[name].shape)}, expected {shape}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ]
        found = {
            "missing": sorted(self.shapes.keys() - tensors.keys()),
            "unexpected": sorted(tensors.keys() - shapes.keys()),
            "wrong shape": wrong,
        }
        return (
            "; ".join(f"{what}: {_listed(names)}" for what, names in found.items() if names) or None
        )

    def to_ours(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the files as the parameter `name` of a TNL has it; dtypes are kept, except
        that LRPE rates become float32."""
        if name.endswith("lrpe.theta"):
            return tensor.float()
        if self.by_kind and name.endswith("qkvu_proj.weight"):
            return _swap_blocks(tensor, 4, self.config.num_heads)
        return tensor

    def to_theirs(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_ours`."""
        if self.by_kind and name.endswith("qkvu_proj.weight"):
            return _swap_blocks(tensor, self.config.num_heads, 4)
        return tensor


def hf_files(config: TNLConfig, dtype: str) -> dict[str, str]:
    """The files of a Hugging Face folder that describe the model, by name.

    Args:
        dtype: of the weights, "float32" for example.
    """
    module = _MODELING_FILE.removesuffix(".py")
    values = {
        "architectures": ["TNLForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.TNLPretrainedConfig",
            "AutoModelForCausalLM": f"{module}.TNLForCausalLM",
        },
        "dtype": dtype,
        "model_type": MODEL_TYPE,
        "tnl": dataclasses.asdict(config),
    }
    return {"config.json": json.dumps(values, indent=2) + "\n", _MODELING_FILE: _MODELING_TEXT}


def hf_layout(values: Mapping[str, Any]) -> WeightLayout | None:
    """The layout of a folder with these values in its config.json, its own or a released one; None
    for a model of another type.

    Raises:
        ValueError: a TNL that is not supported, or fields that make no model.
    """
    if values.get("model_type") == MODEL_TYPE:
        fields = values.get("tnl")
        known = {each.name for each in dataclasses.fields(TNLConfig)}
        if not isinstance(fields, dict) or fields.keys() - known:
            unknown = sorted(fields.keys() - known) if isinstance(fields, dict) else fields
            raise ValueError(
                f'"tnl" must be an object of the fields of TNLConfig, {", ".join(sorted(known))}, '
                f"but has {unknown}."
            )
        config = TNLConfig(**fields)
        shapes = _parameter_shapes(config)
        names = {name: f"model.{name}" for name in shapes}
        return WeightLayout(config, names, {names[name]: shape for name, shape in shapes.items()})
    if values.get("model_type") == _RELEASED_TYPE:
        return _released_layout(config_from_released(values))
    return None


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
    layout = _released_layout(config)
    problem = layout.problem(state_dict)
    if problem is not None:
        raise ValueError(
            f"not a released TransNormerLLM of {config}: {problem}. Build the config with "
            "config_from_released(json of the checkpoint's config.json)."
        )
    for copy, name in layout.copies.items():
        if copy in state_dict and not torch.equal(state_dict[copy], state_dict[name]):
            raise ValueError(f"{copy} differs from {name}: this model has one tied matrix.")
    return {ours: layout.to_ours(ours, state_dict[theirs]) for ours, theirs in layout.names.items()}


def to_released(
    state_dict: Mapping[str, torch.Tensor], config: TNLConfig
) -> dict[str, torch.Tensor]:
    """The inverse of `from_released`: `TNL(config).state_dict()` under the released names.

    `lm_head.weight` is the embedding's tensor itself. Drop it for file formats that refuse shared
    memory (safetensors): the published class ties it again.

    Raises:
        ValueError: keys missing or unexpected.
    """
    layout = _released_layout(config)
    names = layout.names
    if names.keys() != state_dict.keys():
        missing, extra = names.keys() - state_dict.keys(), state_dict.keys() - names.keys()
        raise ValueError(
            f"not the state dict of a TNL of {config}: missing {sorted(missing)}, "
            f"unexpected {sorted(extra)}."
        )
    converted = {theirs: layout.to_theirs(ours, state_dict[ours]) for ours, theirs in names.items()}
    converted[_HEAD] = converted[_EMBEDDING]
    return converted


def _swap_blocks(weight: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Rows ordered (outer, inner, D) -> rows ordered (inner, outer, D)."""
    return weight.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def _listed(names: list[str], limit: int = 20) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _parameter_shapes(config: TNLConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in TNL(config).state_dict().items()}


def _released_layout(config: TNLConfig) -> WeightLayout:
    if variants := config.variants():
        raise ValueError(
            f"the config has {variants}, which no released model has: such a model is exported in "
            "lasp's own layout only (launch/convert.py export)."
        )
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
    shapes = _parameter_shapes(config)
    names = {
        name: name.replace("embedding.", "model.embed_tokens.")
        .replace("blocks.", "model.layers.")
        .replace("channel_mixer.w", "channel_mixer.l")
        for name in shapes
    }
    return WeightLayout(
        config,
        names,
        {names[name]: shape for name, shape in shapes.items()},
        copies={_HEAD: _EMBEDDING},
        by_kind=True,
    )
