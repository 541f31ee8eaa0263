"""From a checkpoint to a model that is ready to be evaluated, on one rank or many."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from launch.build import LossModel, build_model
from launch.checkpoint.saved_run import SavedRun
from launch.config import Config
from launch.distributed import DistContext


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
    ctx.all_or_raise(saved.weights)
    loss_model = build_model(config, ctx, saved.shape)
    ctx.all_or_raise(lambda: saved.load_weights(loss_model.model))
    loss_model.eval()
    return Evaluated(saved, ctx, loss_model)
