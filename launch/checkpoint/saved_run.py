"""What a checkpoint says about the run that saved it: its model, tokenizer and settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from launch.build import ModelFamily, check_field_types, get_family
from launch.checkpoint.shards import StoredTensor
from launch.checkpoint.store import Checkpoint
from launch.exit_codes import CheckpointError
from launch.optimizer import check_model_tensors, load_model_tensors
from launch.tokenizer import Tokenizer, tokenizer_from_spec


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says about itself.

    Attributes:
        family: of the model.
        shape: the model's config.
        tokenizer: None if the run had none (random tokens, or data without a meta.json).
        settings: the run's config, section by section, as far as it was saved.
    """

    checkpoint: Checkpoint
    family_name: str
    shape: Any
    tokenizer: Tokenizer | None
    settings: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> SavedRun:
        """Raises CheckpointError if state.json is not that of a model this code can build."""
        try:
            state = checkpoint.state()
            # Older checkpoints do not name their family.
            name = state.get("family", "tnl")
            config_class = get_family(name).config_class
            check_field_types(state["model"], config_class, "model")
            shape = config_class(**state["model"])
            spec = state["tokenizer"]
            tokenizer = None if spec is None else tokenizer_from_spec(spec)
            if tokenizer is not None and tokenizer.vocab_size > shape.vocab_size:
                raise ValueError(
                    f"its tokenizer has {tokenizer.vocab_size} tokens, its model {shape.vocab_size}"
                )
            settings = tomllib.loads(state.get("config", ""))
        except CheckpointError:
            raise
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'} is not of a model that this code knows "
                f"({type(error).__name__}: {error})."
            ) from None
        return cls(checkpoint, name, shape, tokenizer, settings)

    @property
    def family(self) -> ModelFamily:
        return get_family(self.family_name)

    def training(self, name: str, default: Any) -> Any:
        """A setting training.* of the run, if it is of the type of `default`."""
        section = self.settings.get("training", {})
        value = section.get(name, default) if isinstance(section, dict) else default
        return value if type(value) is type(default) else default

    def weights(self) -> Mapping[str, StoredTensor]:
        """The stored weights, which are known to be those of `shape`; none is read yet.

        Raises:
            CheckpointError: they cannot be read, or are those of another shape.
        """
        try:
            stored = self.checkpoint.open("model")
            # Costs no memory, however large the shape is.
            with torch.device("meta"):
                model = self.family.build(self.shape)
            check_model_tensors(model.state_dict(), stored)
        except CheckpointError:
            raise
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.checkpoint.path} cannot be read: {error}.") from None
        return stored

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into a model of `shape`; of each, the shard that this rank holds.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            load_model_tensors(model, self.checkpoint.open("model"))
        except CheckpointError:
            raise
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.checkpoint.path} cannot be read: {error}.") from None


# Sizes that overflow are RuntimeErrors of torch; the metadata of a foreign file may hold anything.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
)
