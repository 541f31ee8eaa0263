"""Runs with a learned decay start as others do, resume, generate, and say what does not fit."""

import os
import signal

import pytest
import torch

from lasp.tnl import TNL
from launch import generate, train
from launch.build import model_config
from launch.checkpoint.store import verify
from launch.config import load_config
from launch.exit_codes import REQUEUE
from launch.optimizer import build_optimizer
from tests.launch.runs import STEPS, at_step, flags, losses, run_here

pytestmark = pytest.mark.usefixtures("one_process")

LEARNED = dict(model__decay="learned")
WEIGHT, BIAS = (f"blocks.1.token_mixer.decay_proj.{each}" for each in ("weight", "bias"))


def tensors(folder, group="model"):
    return verify(folder / "checkpoint" / f"step-{STEPS:08d}").tensors(group)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """Folders of the same run with fixed decays and with learned ones."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_here(folder / "fixed", data) == 0
    assert run_here(folder / "learned", data, **LEARNED) == 0
    return folder


def test_it_starts_as_a_fixed_decay_and_then_learns(undisturbed):
    fixed, learned = (losses(undisturbed / kind) for kind in ("fixed", "learned"))
    assert learned[1] == pytest.approx(fixed[1], rel=1e-6)
    assert learned[STEPS] != fixed[STEPS]
    assert learned[STEPS] == pytest.approx(fixed[STEPS], rel=0.05)
    found = tensors(undisturbed / "learned")
    assert found.keys() - tensors(undisturbed / "fixed").keys() == {
        f"blocks.{layer}.token_mixer.decay_proj.{kind}"
        for layer in range(2)
        for kind in ("weight", "bias")
    }
    assert (found[WEIGHT] != 0).all() and (found[BIAS] != 0).all()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_stopped_run_goes_on_with_the_same_bits(undisturbed, tmp_path, data, monkeypatch, mode):
    wanted = LEARNED | dict(activation_checkpoint__mode=mode)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        assert run_here(tmp_path, data, **wanted) == REQUEUE
    assert run_here(tmp_path, data, **wanted) == 0
    assert losses(tmp_path) == losses(undisturbed / "learned")
    for group in ("model", "optimizer"):
        found, expected = tensors(tmp_path, group), tensors(undisturbed / "learned", group)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_accumulation_gives_the_same_losses(undisturbed, tmp_path, data):
    assert run_here(tmp_path, data, **LEARNED, training__local_batch_size=4) == 0
    expected = losses(undisturbed / "learned")
    assert list(losses(tmp_path).values()) == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize(("first", "then"), [("fixed", "learned"), ("learned", "fixed")])
def test_a_checkpoint_of_the_other_decay_is_refused_by_name(
    undisturbed, tmp_path, data, capsys, first, then
):
    wanted = dict(
        model__decay=then,
        training__steps=STEPS + 1,
        checkpoint__resume=undisturbed / first / "checkpoint" / f"step-{STEPS:08d}",
    )
    assert run_here(tmp_path, data, **wanted) == 70
    assert f"model.decay was '{first}' and is '{then}'" in capsys.readouterr().err
    # No flag makes weights of the other.
    assert run_here(tmp_path, data, "--checkpoint.allow_changes", **wanted) == 70
    word = "missing" if then == "learned" else "unknown"
    sentence = capsys.readouterr().err
    assert "the checkpoint is of another model" in sentence and f"{word} {WEIGHT}" in sentence


def test_text_is_generated_from_a_checkpoint_alone(undisturbed, capsys):
    argv = ["--checkpoint", str(undisturbed / "learned" / "checkpoint"), "--max_new_tokens", "5"]
    assert generate.main([*argv, "--prompt", "line"]) == 0
    assert capsys.readouterr().out.startswith("line")


def test_a_dry_run_names_it_and_its_shards(capsys):
    line = flags(data__source="random", **LEARNED, model__num_heads=4, model__vocab_size=64)
    tensor_parallel = ["--parallelism.tensor_parallel_degree", "2"]
    assert train.main([*line, *tensor_parallel, "--job.dry_run", "--job.dry_run_gpus", "2"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "glu_dim 48, decay learned)" in output
    assert "2 x blocks.*.token_mixer.decay_proj.weight 4 x 32 -> 2 x 32" in output
    assert "2 x blocks.*.token_mixer.decay_proj.bias 4 -> 2" in output


def test_weight_decay_is_on_the_matrix_and_not_on_the_bias():
    config = load_config(flags(**LEARNED))
    model = TNL(model_config(config, None))
    decayed, others = (group["params"] for group in build_optimizer(model, config).param_groups)
    parameters = dict(model.named_parameters())
    assert any(each is parameters[WEIGHT] for each in decayed)
    assert any(each is parameters[BIAS] for each in others)


def test_a_wrong_name_is_refused(tmp_path, data, capsys):
    path = tmp_path / "model.json"
    path.write_text('{"decay": "learnt"}')
    assert run_here(tmp_path / "out", data, model__config=path) == 73
    assert (
        'decay is \'learnt\': it must be "fixed", "learned", "per_head" or "none"'
        in capsys.readouterr().err
    )
