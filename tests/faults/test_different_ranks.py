"""Ranks that are started with different settings or data: all end with 73 and what differs."""

import json
import shutil

import numpy as np
import pytest

from launch.config import Config
from launch.exit_codes import ConfigError
from launch.rendezvous import PATHS, difference, settings
from tests.faults.jobs import START, Job
from tests.launch.runs import flags

# What rank 1 is started with in place of the others' settings.
SETTINGS = {
    "model.dim": 64,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.glu_dim": 64,
    "model.vocab_size": 384,
    "model.layer_types": "LS",
    "model.decay": "learned",
    "model.preset": "385m",
    "data.source": "random",
    "training.seq_len": 102,
    "training.global_batch_size": 8,
    "training.local_batch_size": 2,
    "training.steps": 7,
    "training.max_norm": 2.0,
    "training.seed": 1,
    "training.segment_len": 50,
    "training.loss_chunk_size": 64,
    "training.max_nonfinite_steps": 5,
    "training.mixed_precision_reduce": "bfloat16",
    "parallelism.context_parallel_degree": 2,
    "parallelism.context_parallel_method": "all_gather",
    "parallelism.data_parallel_method": "fsdp",
    "parallelism.tensor_parallel_degree": 2,
    "optimizer.lr": 0.02,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.2,
    "lr_scheduler.warmup_steps": 3,
    "lr_scheduler.decay_type": "linear",
    "lr_scheduler.min_lr_factor": 0.2,
    "checkpoint.interval": 2,
    "checkpoint.folder": "elsewhere",
    "checkpoint.keep_latest_k": 1,
    "checkpoint.async_mode": "async",
    "checkpoint.resume": "never",
    "activation_checkpoint.mode": "full",
    "validation.freq": 4,
    "validation.steps": 1,
    "metrics.log_freq": 2,
    "sample.prompt": "x",
    "comm.train_timeout_seconds": 99,
    "comm.init_timeout_seconds": 299,
}


def arguments(folder, data, **changes):
    wanted = dict(
        job__dump_folder=folder,
        data__source="folder",
        data__folder=data,
        training__steps=6,
        comm__train_timeout_seconds=100,
        comm__init_timeout_seconds=300,
    )
    return flags(**(wanted | changes))


def run(tmp_path, of_rank):
    """Outputs of two ranks that must end with 73."""
    job = Job(tmp_path / "logs", of_rank)
    try:
        codes = job.wait(START)
    finally:
        job.end()
    assert codes == [ConfigError.exit_code] * 2, job.outputs()
    assert "Traceback" not in job.outputs() and job.outputs().count("error: ") == 1, job.outputs()
    return job.outputs()


def changed(name):
    """The settings of a config with a value of the table."""
    config = Config()
    section, key = name.split(".")
    setattr(getattr(config, section), key, SETTINGS[name])
    return settings(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_is_named_with_its_values(name):
    text = difference([settings(Config()), changed(name), settings(Config())])
    assert text.startswith(f"{name} is ") and " on ranks 0 and 2, " in text, text
    assert text.endswith(f"{json.dumps(SETTINGS[name])} on rank 1"), text


def test_paths_may_differ_and_nothing_else():
    config = Config()
    every = settings(config)
    assert not every.keys() & set(PATHS) and len(every) > 60
    config.job.dump_folder, config.data.folder = "there", "elsewhere"
    config.job.config_file, config.model.config = "a.toml", "b.json"
    assert difference([every, settings(config)]) is None


def test_only_some_of_many_differences_are_listed():
    text = difference([dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1)])
    assert text.startswith("a is 0 on rank 0, 1 on rank 1; b is ") and text.endswith("; and 2 more")
    assert difference([{"a": 0}, {}]) == "a is 0 on rank 0, absent on rank 1"
    assert difference([{"a": float("nan")}] * 5) is None
    of_ranks = [{"a": rank == 9} for rank in range(10)]
    assert difference(of_ranks) == "a is false on ranks 0 to 8, true on rank 9"


QUICK = ["optimizer.lr", "parallelism.context_parallel_degree"]


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.faults) for n in SETTINGS if n not in QUICK)],
)
def test_ranks_with_other_settings_all_end(data, tmp_path, name):
    of_rank = [arguments(tmp_path / "out", data, **each) for each in ({}, {name: SETTINGS[name]})]
    output = run(tmp_path, of_rank)
    # A value that cannot run is refused before it is compared.
    assert name in output or name.split(".")[1] in output, output
    assert not (tmp_path / "out").exists()


def test_a_rank_that_cannot_run_ends_all(data, tmp_path):
    good = arguments(tmp_path / "out", data)
    output = run(tmp_path, [good, [*good, "--training.no_such_flag", "1"]])
    assert "no_such_flag" in output, output


def change_token(folder):
    tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r+")
    tokens[len(tokens) // 2] ^= 1
    tokens.flush()


def append(name):
    def change(folder):
        with (folder / name).open("a") as file:
            file.write(" ")

    return change


def drop_digests(folder):
    """Data as of an earlier version: with digests, a rank would find by itself what has changed."""
    meta = json.loads((folder / "meta.json").read_text())
    kept = {key: value for key, value in meta.items() if key not in ("files", "digest")}
    (folder / "meta.json").write_text(json.dumps(kept | {"format": 1}))


DATA = {
    "a token": (change_token, "train.bin of the data is"),
    "a description": (append("meta.json"), "meta.json of the data is"),
    "no description": (lambda folder: (folder / "meta.json").unlink(), "model.vocab_size"),
    "validation": (
        lambda folder: shutil.copy(folder / "train.bin", folder / "val.bin"),
        "val.bin",
    ),
    "no files": (lambda folder: (folder / "train.idx").unlink(), "train.idx is missing"),
}


@pytest.mark.parametrize(
    "what",
    ["a token", *(pytest.param(n, marks=pytest.mark.faults) for n in DATA if n != "a token")],
)
def test_ranks_with_other_data_all_end(data, tmp_path, what):
    change, message = DATA[what]
    folders = tmp_path / "first", tmp_path / "other"
    for folder in folders:
        shutil.copytree(data, folder)
        drop_digests(folder)
    change(folders[1])
    output = run(tmp_path, [arguments(tmp_path / "out", folder) for folder in folders])
    assert message in output, output


def test_the_same_data_elsewhere_is_the_same(data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    of_rank = [arguments(tmp_path / "out", each, training__steps=1) for each in (data, other)]
    job = Job(tmp_path / "logs", of_rank)
    try:
        assert job.wait(START) == [0, 0], job.outputs()
    finally:
        job.end()
