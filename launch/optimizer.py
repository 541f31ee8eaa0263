"""The optimizer, its learning rate as a function of the step, and its state in a checkpoint."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from launch.checkpoint.shards import StoredTensor, load_shards, shard_of
from launch.config import Config
from launch.exit_codes import CheckpointError
from parallel.float8 import scales_in_one_reduction

_STATES = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices of linear layers and embeddings only.

    (Of a learned decay: on the matrix, which pulls decays towards one per head, and not on the
    bias, which moves that one.)

    Args:
        model: as data parallelism has sharded it.
    """
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
    optimizer.register_step_post_hook(lambda *_: update_scales(model, config))
    return optimizer


def update_scales(model: nn.Module, config: Config) -> None:
    """Compute the scales of weights that are gathered in FP8, if that is done once per step. Called
    after each step and after loading weights, on all ranks."""
    if config.float8.precompute_float8_dynamic_scale_for_fsdp:
        scales_in_one_reduction(model)


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of the step that follows `step` finished ones.

    Linear warm-up over warmup_steps, then the peak, then decay over the last decay_ratio of all
    steps (None: over all steps after the warm-up), down to min_lr_factor times the peak. The decay
    inverse_sqrt is peak * sqrt(warmup_steps / step), and no lower than that.
    """
    schedule, steps = config.lr_scheduler, config.training.steps
    peak = config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay_type == "inverse_sqrt":
        factor = math.sqrt(max(schedule.warmup_steps, 1) / (step + 1))
        return peak * max(factor, schedule.min_lr_factor)
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


def clipped_step(
    optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float, *, skip: Tensor
) -> None:
    """A step with the gradients divided by norm / max_norm, if that is above 1 and max_norm above
    0; it changes neither weights nor moments if `skip` is True. The host does not wait for either.

    Args:
        norm: of the gradients over all ranks, a scalar on their device.
        skip: a scalar on their device, the same on all ranks.
    """
    # A fused AdamW takes both as attributes, from torch.amp.GradScaler as a rule, and reads them
    # in its one pass over gradients and weights.
    excess = ((norm + 1e-6) / max_norm).clamp(min=1).float() if max_norm > 0 else None
    optimizer.grad_scale, optimizer.found_inf = excess, skip.float()
    optimizer.step()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<state>/<parameter name>": tensor} of an optimizer that has taken a step."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for state, value in optimizer.state[parameter].items():
            tensors[f"{state}/{name}"] = value
    return tensors


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor] | Mapping[str, StoredTensor],
) -> None:
    """Restore `optimizer_tensors`. Raises CheckpointError if a parameter has none, or a file is
    damaged."""
    for name, parameter in model.named_parameters():
        for state in _STATES:
            key = f"{state}/{name}"
            shape = () if state == "step" else parameter.shape
            if key not in tensors or tensors[key].shape != shape:
                raise CheckpointError(f"the checkpoint's optimizer has no {key} of that shape.")
    pairs = []
    for name, parameter in model.named_parameters():
        states = {}
        for state in _STATES:
            stored = tensors[f"{state}/{name}"]
            if state == "step":
                states[state] = stored[()].to(parameter.device, copy=True)
                continue
            # Sharded like the weight, regardless of which rank saved it. (empty_like would keep
            # the wrapper of a weight that is gathered in FP8.)
            states[state] = torch.zeros_like(parameter, dtype=stored.dtype)
            pairs.append((shard_of(states[state], is_rank0=True), stored))
        optimizer.state[parameter] = states
    load_shards(pairs)


@torch.no_grad()
def load_model_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor] | Mapping[str, StoredTensor]
) -> None:
    """Copy weights into the model, all or none; of each, the shard that this rank holds.

    Raises:
        CheckpointError: names, shapes or dtypes that are not this model's; the message lists them.
    """
    own = model.state_dict()
    check_model_tensors(own, tensors)
    load_shards([(shard_of(value, is_rank0=True), tensors[name]) for name, value in own.items()])


def check_model_tensors(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | Mapping[str, StoredTensor]
) -> None:
    """Raise CheckpointError, which lists what differs, if `tensors` are not those of a model whose
    state dict is `own`."""
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
