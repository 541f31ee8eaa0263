"""From a checkpoint to a model that is ready to be evaluated, on one rank or many."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch import nn

from launch.build import LossModel, ModelFamily, build_model, get_family
from launch.checkpoint.store import Checkpoint
from launch.config import Config
from launch.distributed import DistContext
from launch.exit_codes import CheckpointError
from launch.optimizer import load_model_tensors
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
            shape = get_family(name).config_class(**state["model"])
            spec = state["tokenizer"]
            tokenizer = None if spec is None else tokenizer_from_spec(spec)
            settings = tomllib.loads(state.get("config", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'} is not of a model that this code knows "
                f"({type(error).__name__}: {error})."
            ) from None
        return cls(checkpoint, name, shape, tokenizer, settings)

    @property
    def family(self) -> ModelFamily:
        return get_family(self.family_name)

    def training(self, name: str, default: Any) -> Any:
        """A setting training.* of the run."""
        return self.settings.get("training", {}).get(name, default)


@dataclass(frozen=True)
class Evaluated:
    """A model on this rank, with the weights of a checkpoint, in evaluation mode."""

    saved: SavedRun
    ctx: DistContext
    loss_model: LossModel

    @property
    def model(self) -> nn.Module:
        return self.loss_model.model

    @property
    def pad_id(self) -> int | None:
        """The token that is ignored as a label."""
        return None if self.saved.tokenizer is None else self.saved.tokenizer.pad_id


def load(saved: SavedRun, config: Config, ctx: DistContext) -> Evaluated:
    """Build the model on every rank and read its weights; in full, or the rank's shard of them with
    tensor parallelism. Every rank calls it.

    Raises:
        CheckpointError: weights that cannot be read, or of another shape; on all ranks.
    """
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, family=saved.family_name)
    )
    loss_model = build_model(config, ctx, saved.shape)

    def read() -> None:
        try:
            load_model_tensors(loss_model.model, saved.checkpoint.open("model"))
        except CheckpointError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{saved.checkpoint.path} cannot be read: {error}.") from None

    ctx.all_or_raise(read)
    loss_model.eval()
    return Evaluated(saved, ctx, loss_model)
