"""The optimizer, its learning rate as a function of the step, and what a checkpoint keeps of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from launch.errors import CheckpointError
from launch.pieces import piece_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from launch.config import Config
    from launch.pieces import StoredTensor

    Stored = Mapping[str, Tensor] | Mapping[str, StoredTensor]

__all__ = [
    "build_optimizer",
    "learning_rate",
    "load_model_tensors",
    "load_optimizer_tensors",
    "optimizer_tensors",
]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; weight decay on the matrices of linear layers and embeddings, on nothing else."""
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    wanted = config.optimizer
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": wanted.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=wanted.lr,
        betas=(wanted.beta1, wanted.beta2),
        eps=wanted.eps,
        fused=True,
    )


def learning_rate(step: int, config: Config) -> float:
    """The rate of the step that follows `step` finished ones.

    Linear warm-up over warmup_steps, the peak, then the decay over the last decay_ratio of all
    steps (None: over all steps after the warm-up) down to min_lr_factor of the peak at the last.
    """
    schedule, steps = config.lr_scheduler, config.training.steps
    peak = config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    decay_steps = steps - schedule.warmup_steps
    if schedule.decay_ratio is not None:
        decay_steps = min(decay_steps, round(steps * schedule.decay_ratio))
    begin = steps - decay_steps
    if decay_steps <= 1 or step < begin:
        return peak
    progress = min((step - begin) / (decay_steps - 1), 1.0)
    shape = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[schedule.decay_type]
    return peak * (schedule.min_lr_factor + (1 - schedule.min_lr_factor) * shape)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<moment>/<parameter name>": tensor} of a stepped optimizer."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}/{name}"] = value
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Stored
) -> None:
    """Put `optimizer_tensors` back. Raises CheckpointError where a parameter has none."""
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            key = f"{moment}/{name}"
            wanted = () if moment == "step" else parameter.shape
            if key not in tensors or tensors[key].shape != wanted:
                raise CheckpointError(f"the checkpoint's optimizer has no {key} of that shape.")
    for name, parameter in model.named_parameters():
        state = {}
        for moment in _MOMENTS:
            stored = tensors[f"{moment}/{name}"]
            if moment == "step":
                state[moment] = stored[()].to(parameter.device, copy=True)
                continue
            # Cut as the weight is, whoever wrote it.
            state[moment] = torch.empty_like(parameter, dtype=stored.dtype)
            _fill(state[moment], stored)
        optimizer.state[parameter] = state


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: Stored) -> None:
    """Copy weights in, all or none: of each the part that this rank holds.

    Raises:
        CheckpointError: names, shapes or dtypes that are not this model's, each named.
    """
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {value.dtype} {tuple(value.shape)}, the model has {own[name].dtype} "
        f"{tuple(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and (value.shape != own[name].shape or value.dtype != own[name].dtype)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise CheckpointError(
            f"the checkpoint is of another model: {shown}. Use its config, or another "
            "job.dump_folder."
        )
    for name, value in own.items():
        _fill(value, tensors[name])


@torch.no_grad()
def _fill(tensor: Tensor, stored: Tensor | StoredTensor) -> None:
    piece = piece_of(tensor, is_first=True)
    piece.local.copy_(stored[piece.region])
