"""Flags override the file, the file overrides defaults, and every mistake is named."""

import dataclasses
from pathlib import Path

import pytest

from launch.build import model_config
from launch.config import Config, load_config
from launch.exit_codes import ConfigError
from launch.toml_config import to_toml

CONFIGS = sorted(Path(__file__).parents[2].glob("launch/configs/*.toml"))


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return ["--job.config_file", str(path)]

    return write


def test_command_line_beats_file_beats_default(toml):
    file = toml("[training]\nseq_len = 64\nsteps = 7\n[optimizer]\nlr = 1\n")
    config = load_config([*file, "--training.seq_len", "128"])
    assert config.training.seq_len == 128
    assert config.training.steps == 7
    # An int is accepted for a float.
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.training.max_norm == Config().training.max_norm


@pytest.mark.parametrize(
    ("flags", "section", "key", "value"),
    [
        (["--training.seq_len", "9"], "training", "seq_len", 9),
        (["--training.seq-len", "9"], "training", "seq_len", 9),
        (["--training.seq-len=9"], "training", "seq_len", 9),
        (["--sp-size", "4"], "parallelism", "context_parallel_degree", 4),
        (["--cp-size", "4"], "parallelism", "context_parallel_degree", 4),
        (["--sp_size", "4"], "parallelism", "context_parallel_degree", 4),
        (["--validation.no-enable"], "validation", "enable", False),
        (["--job.dry_run"], "job", "dry_run", True),
        (["--compile.enable", "False"], "compile", "enable", False),
        (["--lr_scheduler.decay_ratio", "0.5"], "lr_scheduler", "decay_ratio", 0.5),
    ],
)
def test_spellings(flags, section, key, value):
    assert getattr(getattr(load_config(flags), section), key) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[training]\nseqlen = 3", r"unknown key training.seqlen; did you mean training.seq_len\?"),
        ("[trainig]\nsteps = 3", r"unknown section \[trainig\]; did you mean \[training\]\?"),
        ("[zzz]", r"unknown section \[zzz\]; known: \[job\]"),
        ("training = 3", r"write \[training\]"),
        ("[training]\nsteps = '3'", "training.steps is '3', must be a whole number"),
        ("[training]\nsteps = true", "training.steps is True, must be a whole number"),
        ("[training]\nsteps = 3.5", "must be a whole number"),
        ("[validation]\nenable = 1", "must be true or false"),
        ("[optimizer]\nlr = 'big'", "must be a number"),
        ("[checkpoint]\nasync_mode = 'x'", "must be one of 'disabled', 'async'"),
        ("[activation_checkpoint]\noffload = true", "activation_checkpoint.offload was removed"),
        ("[training\n", "is not TOML"),
    ],
)
def test_mistakes_in_the_file(toml, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(toml(text))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--job.config_file", "missing.toml"], "missing.toml: No such file"),
        (["--training.seq_len", "0"], "training.seq_len is 0: it must be at least 1"),
        (["--optimizer.lr", "nan"], "optimizer.lr is nan"),
        (["--optimizer.lr", "inf"], "optimizer.lr is inf"),
        (["--optimizer.beta2", "1"], "optimizer.beta2 is 1"),
        (["--training.global_batch_size", "0"], "global_batch_size is 0"),
        (["--lr_scheduler.decay_ratio", "2"], "decay_ratio is 2"),
        (
            ["--lr_scheduler.decay_ratio", "0.5", "--lr_scheduler.decay_type", "inverse_sqrt"],
            "decay_ratio is 0.5: leave it out for decay_type inverse_sqrt",
        ),
        (["--data.source", "folder"], "--data.folder"),
        (["--parallelism.tensor_parallel_degree", "0"], "tensor_parallel_degree is 0"),
        (["--job.dry_run_gpus", "-1"], "job.dry_run_gpus is -1"),
        (["--activation_checkpoint.offload"], "offload was removed: .* use .*mode full"),
        (["--activation-checkpoint.offload=True"], "offload was removed"),
        (["--model.family", "rnn"], "model.family is 'rnn': it must be one of tnl"),
        (
            ["--parallelism.context_parallel_layout", "zigzag", "--training.seq_len", "9"],
            "training.seq_len is 9: it must be even",
        ),
    ],
)
def test_wrong_values_on_the_command_line(flags, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        model_config(load_config(flags), None)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 73


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.seqlen", "3"], ["--training.seqlen", "--training.seq-len"]),
        (["--micro-batchsize=3"], ["--micro-batchsize", "--micro-batch-size"]),
        (["stray", "3"], ["stray"]),
        (["--training.steps", "ten"], ["--training.steps", "ten"]),
        (["--lr_scheduler.decay_ratio", "x"], ["decay-ratio", "x"]),
        (["--optimizer.name", "sgd"], ["--optimizer.name", "sgd"]),
    ],
)
def test_a_command_line_that_cannot_be_parsed(flags, words):
    with pytest.raises(ConfigError) as caught:
        load_config(flags)
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.exit_code == 73


def test_resolved_configs_of_earlier_versions_are_read(toml):
    file = toml("[activation_checkpoint]\nmode = 'full'\noffload = false\n")
    assert load_config(file).activation_checkpoint.mode == "full"


def test_resolved_config_reads_back(toml):
    prompt = 'a "b"\n\\ \U0001f600 \u2028 \x7f \x00'
    config = load_config(["--training.steps", "5", "--sp-size", "2", "--sample.prompt", prompt])
    again = load_config(toml(to_toml(config)))
    again.job.config_file = None
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    config = load_config(["--job.config_file", str(path)])
    # Runs of different configs must not meet in one folder.
    assert config.job.dump_folder == f"outputs/{path.stem}"


def test_the_quickstart_is_shipped():
    assert "quickstart.toml" in [path.name for path in CONFIGS]
