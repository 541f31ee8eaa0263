"""The learning rate by step, which weights decay, and optimizer state after a round trip."""

import pytest
import torch
from torch import nn

from lasp.tnl import TNL, TNLConfig
from launch.config import load_config
from launch.exit_codes import CheckpointError
from launch.optimizer import (
    build_optimizer,
    learning_rate,
    load_model_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
)

SHAPE = dict(vocab_size=32, dim=16, num_layers=2, num_heads=2, glu_dim=24)


def config(*flags):
    return load_config(["--optimizer.lr", "1", "--training.steps", "100", *flags])


def rates(*flags):
    settings = config("--lr_scheduler.warmup_steps", "10", *flags)
    return [learning_rate(step, settings) for step in range(100)]


def test_warm_up_then_cosine_to_the_last_step():
    series = rates()
    assert series[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert series[10] == 1
    assert series[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(series[10:], series[11:], strict=False))
    middle = (series[10] + series[-1]) / 2
    assert series[54] > middle > series[55]


def test_decay_ratio_is_the_part_at_the_end():
    series = rates("--lr_scheduler.decay_ratio", "0.2", "--lr_scheduler.decay_type", "linear")
    assert series[10:81] == [1.0] * 71
    assert series[81] < 1
    assert series[-1] == pytest.approx(0.1)
    steps = [a - b for a, b in zip(series[80:], series[81:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize("decay", ["cosine", "linear", "sqrt"])
def test_every_decay_ends_at_the_minimum(decay):
    series = rates("--lr_scheduler.decay_type", decay, "--lr_scheduler.min_lr_factor", "0")
    assert series[10] == 1 and series[-1] == pytest.approx(0)
    assert min(series) >= 0


def test_no_decay_and_no_warm_up():
    series = rates("--lr_scheduler.decay_ratio", "0")
    assert series[10:] == [1.0] * 90
    settings = config("--lr_scheduler.warmup_steps", "0", "--training.steps", "1")
    assert learning_rate(0, settings) == 1


def model_and_optimizer(seed, steps):
    torch.manual_seed(seed)
    model = TNL(TNLConfig.preset("tiny", **SHAPE))
    optimizer = build_optimizer(model, config())
    for _ in range(steps):
        model(torch.randint(32, (1, 9))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_matrices_decay_and_nothing_else():
    model, optimizer = model_and_optimizer(0, 0)
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] > 0 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("theta" in names[id(p)] for p in others["params"]) and others["params"]
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in matrices}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_a_restored_optimizer_takes_the_same_step():
    model, optimizer = model_and_optimizer(0, 3)
    other, fresh = model_and_optimizer(1, 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    assert len(moments) == 3 * len(list(model.parameters()))
    load_model_tensors(other, weights)
    load_optimizer_tensors(other, fresh, moments)
    tokens = torch.arange(9)[None]
    for each, stepper in ((model, optimizer), (other, fresh)):
        each(tokens).square().sum().backward()
        stepper.step()
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda name, tensors: tensors.pop(name), "missing embedding.weight"),
        (lambda name, tensors: tensors.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda name, tensors: tensors.update({name: torch.zeros(3, 3)}), r"is .* \(3, 3\)"),
        (lambda name, tensors: tensors.update({name: tensors[name].half()}), "float16"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_copied(change, sentence):
    model, _ = model_and_optimizer(0, 0)
    other, _ = model_and_optimizer(1, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = dict(other.state_dict())
    change("embedding.weight", tensors)
    with pytest.raises(CheckpointError, match=sentence):
        load_model_tensors(model, tensors)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_missing_moments_are_refused():
    model, optimizer = model_and_optimizer(0, 1)
    moments = optimizer_tensors(model, optimizer)
    moments.pop("exp_avg/embedding.weight")
    with pytest.raises(CheckpointError, match="no exp_avg/embedding.weight"):
        load_optimizer_tensors(model, optimizer, moments)
