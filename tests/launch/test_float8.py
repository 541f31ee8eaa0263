"""Runs in FP8: they learn, resume, share checkpoints with other runs, and say what does not fit."""

import importlib.metadata
import importlib.util
import os
import signal

import pytest
import torch
from torch.distributed.tensor import DTensor

from launch import generate, train
from launch.checkpoint.save_resume import finish_save, resume_run, start_save
from launch.checkpoint.store import verify
from launch.config import load_config
from launch.exit_codes import REQUEUE, ConfigError
from launch.optimizer import update_scales
from launch.toml_config import to_toml
from launch.trainer import train_step, validate
from tests.distributed import Pool
from tests.float8_over_gloo import bytes_over_gloo
from tests.launch.runs import STEPS, at_step, flags, losses, run_here
from tests.launch.test_parallelism import CP2, FSDP, NEVER, TP2, make_run, state_of

pytestmark = pytest.mark.usefixtures("one_process")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="FP8 needs torchao: pip install -e '.[fp8]'",
)

FLOAT8 = "--quantize.linear.float8."
EMULATE = [FLOAT8 + "emulate"]
TENSORWISE = [*EMULATE, FLOAT8 + "recipe_name", "tensorwise"]
ROWWISE = [*EMULATE, FLOAT8 + "recipe_name", "rowwise"]
GATHERED = [*TENSORWISE, FLOAT8 + "enable_fsdp_float8_all_gather"]
PRECOMPUTED = [*GATHERED, FLOAT8 + "precompute_float8_dynamic_scale_for_fsdp"]
FULL = ["--activation_checkpoint.mode", "full"]
# Multiples of 16, on two ranks too.
SIZES = dict(model__glu_dim=64, training__seq_len=128)
SIZE_FLAGS = [f"--{name.replace('__', '.')}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module")
def pair():
    """Two processes that form a job of their own."""
    pool = Pool((2,))
    yield pool
    pool.stop()


def weights(folder, step=STEPS):
    return verify(folder / "checkpoint" / f"step-{step:08d}").tensors("model")


def run(folder, data, *more, **changes):
    return run_here(folder, data, *more, **(SIZES | changes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """Folders of the same run without FP8 and with it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, more in (("float32", []), ("tensorwise", TENSORWISE), ("rowwise", ROWWISE)):
        assert run(folder / name, data, *more) == 0
    return folder


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_runs_learn_as_others_do(undisturbed, recipe):
    plain, series = losses(undisturbed / "float32"), losses(undisturbed / recipe)
    assert series[STEPS] < 0.9 * series[1]
    assert series != plain
    assert list(series.values()) == pytest.approx(list(plain.values()), rel=5e-3)


@needs_torchao
def test_a_stopped_fp8_run_goes_on_with_the_same_bits(undisturbed, tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path, data, *TENSORWISE) == REQUEUE
    assert run(tmp_path, data, *TENSORWISE) == 0
    assert losses(tmp_path) == losses(undisturbed / "tensorwise")
    found, expected = weights(tmp_path), weights(undisturbed / "tensorwise")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_torchao
@pytest.mark.parametrize("first, then", [(TENSORWISE, []), ([], TENSORWISE)])
def test_runs_go_on_with_and_without_fp8(undisturbed, tmp_path, data, monkeypatch, first, then):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path, data, *first) == REQUEUE
    assert run(tmp_path, data, *then) == 0
    series, whole = losses(tmp_path), losses(undisturbed / ("tensorwise" if first else "float32"))
    assert [series[step] for step in range(1, 4)] == [whole[step] for step in range(1, 4)]
    assert series[STEPS] != whole[STEPS]
    assert series[STEPS] == pytest.approx(whole[STEPS], rel=5e-3)


@needs_torchao
def test_checkpoints_of_fp8_runs_hold_what_others_hold(undisturbed, capsys):
    plain, found = weights(undisturbed / "float32"), weights(undisturbed / "tensorwise")
    assert {n: (w.shape, w.dtype) for n, w in found.items()} == {
        n: (w.shape, w.dtype) for n, w in plain.items()
    }
    argv = ["--checkpoint", str(undisturbed / "tensorwise" / "checkpoint"), "--max_new_tokens", "5"]
    assert generate.main([*argv, "--prompt", "line"]) == 0
    assert capsys.readouterr().out.startswith("line")


def plain_state(state):
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state_of(state).items()
    }


def train_and_resume(group, folder, *more):
    """Losses of five steps, those of the last three after a restart, validation, the state saved
    and the reductions of scalars per step."""
    with pytest.MonkeyPatch.context() as patch:
        bytes_over_gloo(patch)
        state = make_run(folder, *SIZE_FLAGS, *more)
        series = [train_step(state).loss for _ in range(2)]
        start_save(state, background=False)
        assert finish_save(state)
        saved = plain_state(state)
        series += [train_step(state).loss for _ in range(3)]
        held_out = validate(state)
        state = make_run(folder, *SIZE_FLAGS, *more)
        assert resume_run(state)[0] is not None
        update_scales(state.model, state.config)
        resumed = plain_state(state)
        assert all(torch.equal(resumed[name], saved[name]) for name in saved)
        again = [train_step(state).loss for _ in range(3)]
    return series, again, held_out, saved


def go_on_alone(folder, *more):
    """The state that one process resumes from, and its next losses."""
    state = make_run(folder, *SIZE_FLAGS, *more)
    assert resume_run(state)[0] is not None
    found = plain_state(state)
    return found, [train_step(state).loss for _ in range(3)]


@needs_torchao
def test_weights_are_gathered_in_fp8(pair, tmp_path):
    layouts = {
        "float32 gathered": [*FSDP, *TENSORWISE],
        "gathered": [*FSDP, *GATHERED],
        "one reduction": [*FSDP, *PRECOMPUTED],
        "kept": [*FSDP, *NEVER, *PRECOMPUTED, *FULL],
    }
    outcomes = {
        name: pair.run(train_and_resume, tmp_path / name, *more, size=2)[0]
        for name, more in layouts.items()
    }
    expected, *_ = outcomes["float32 gathered"]
    for name, (series, again, held_out, saved) in outcomes.items():
        # The weights are cast with the same scales before and after the gather.
        assert series == expected, name
        assert again == series[2:], name
        assert held_out == outcomes["gathered"][2], name
        assert all(value.dtype == torch.float32 for value in saved.values()), name
    # A process alone goes on from them, in FP8 and without.
    for more in (TENSORWISE, []):
        found, series = go_on_alone(tmp_path / "one reduction", *more)
        saved = outcomes["one reduction"][3]
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert series == pytest.approx(expected[2:], rel=2e-3)


def scale_reductions(group, folder, *more):
    """All-reduces of the second step; `train_step` has one by this operator, of the norm."""
    with pytest.MonkeyPatch.context() as patch:
        bytes_over_gloo(patch)
        state = make_run(folder, *SIZE_FLAGS, *more)
        train_step(state)
        with torch.profiler.profile() as seen:
            train_step(state)
    names = [event.name for event in seen.events()]
    return sum(name == "_c10d_functional::all_reduce" for name in names)


@needs_torchao
def test_scales_of_all_weights_take_one_reduction_per_step(pair, tmp_path):
    many = pair.run(scale_reductions, tmp_path, *FSDP, *GATHERED, size=2)
    one = pair.run(scale_reductions, tmp_path, *FSDP, *PRECOMPUTED, size=2)
    # Ten layers, gathered for the forward and the backward of each of four micro-batches.
    assert one == [2, 2], "the gradients' norm and the scales"
    assert many == [1 + 2 * 10 * 4] * 2


@needs_torchao
@pytest.mark.parametrize(
    "more",
    [
        CP2,
        pytest.param(TP2, marks=pytest.mark.slow),
        [*TP2, "--parallelism.tensor_parallel_shard_sequence", *FULL],
    ],
    ids=str,
)
def test_fp8_over_two_ranks_trains_as_on_one(pair, tmp_path, more):
    alone, *_ = train_and_resume(None, tmp_path / "alone", *TENSORWISE)
    for series, again, *_ in pair.run(
        train_and_resume, tmp_path / "two", *TENSORWISE, *more, size=2
    ):
        assert series == pytest.approx(alone, rel=1e-3)
        assert again == series[2:]


@pytest.mark.slow
@needs_torchao
def test_fp8_with_fsdp_and_tensor_parallelism(pool, tmp_path):
    alone, *_ = train_and_resume(None, tmp_path / "alone", *TENSORWISE)
    for more in ([*FSDP, *TP2, *PRECOMPUTED], [*FSDP, *CP2, *PRECOMPUTED]):
        for series, again, *_ in pool.run(train_and_resume, tmp_path / more[2], *more, size=4):
            assert series == pytest.approx(alone, rel=1e-3)
            assert again == series[2:]


@pytest.mark.parametrize(
    "more, changes, sentence",
    [
        (TENSORWISE, {"training__seq_len": 100}, "a rank has 100 tokens (local_batch_size 1 x"),
        (TENSORWISE, {"model__glu_dim": 72}, "blocks.0.channel_mixer.w1 has 72 x 32 values"),
        (TENSORWISE[1:], {}, "FP8 products need a GPU, the device is cpu"),
        (
            [FLOAT8 + "filter_fqns", "w1"],
            {},
            "not switched on: give quantize.linear.float8.recipe_name",
        ),
        (
            [*ROWWISE, FLOAT8 + "enable_fsdp_float8_all_gather"],
            {},
            "only with recipe_name tensorwise",
        ),
        ([*TENSORWISE, FLOAT8 + "filter_fqns", "blocks"], {}, "no linear layer is left for FP8"),
    ],
)
@needs_torchao
def test_what_does_not_fit_is_refused(tmp_path, data, capsys, more, changes, sentence):
    assert run(tmp_path, data, *more, **changes) == ConfigError.exit_code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


def test_without_torchao_a_run_says_what_to_install(tmp_path, data, capsys, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert run(tmp_path, data, *TENSORWISE) == ConfigError.exit_code
    assert "torchao, which is not installed: pip install -e '.[fp8]'" in capsys.readouterr().err


def test_a_dry_run_needs_no_torchao_and_names_wrong_sizes(capsys, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    line = [*flags(data__source="random", **SIZES), *TENSORWISE[1:], "--job.dry_run"]
    assert train.main(line) == 0
    assert "linear layers FP8 tensorwise" in capsys.readouterr().out
    assert train.main([*line, "--model.glu_dim", "40"]) == ConfigError.exit_code
    assert "40 x 32 values on a rank: FP8 needs multiples of 16" in capsys.readouterr().err


def test_the_resolved_config_reads_back(tmp_path):
    config = load_config([*PRECOMPUTED, FLOAT8 + "filter_fqns", "out_proj", "blocks.0."])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert '[quantize.linear.float8]\nrecipe_name = "tensorwise"' in path.read_text()
    again = load_config(["--job.config_file", str(path)])
    assert again.quantize == config.quantize
    assert again.float8.filter_fqns == ("out_proj", "blocks.0.")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[quantize]\nlinear = 3", r"quantize.linear is a section: write \[quantize.linear\]"),
        ("[quantize.linear.float9]", r"unknown key quantize.linear.float9; did you mean .*float8"),
        ("[quantize.linear.float8]\nrecipe = 'x'", r"did you mean .*float8.recipe_name\?"),
        ("[quantize.linear.float8]\nrecipe_name = 'x'", "must be one of 'tensorwise', 'rowwise'"),
        ("[quantize.linear.float8]\nfilter_fqns = [1]", "must be a list of strings"),
    ],
)
def test_mistakes_in_the_section_are_named(tmp_path, text, sentence):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        load_config(["--job.config_file", str(path)])
