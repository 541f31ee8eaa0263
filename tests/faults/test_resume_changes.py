"""What may change between a checkpoint and the run that resumes it: a rule for every setting."""

import dataclasses
import json

import pytest

from launch.checkpoint.compare import kind_of
from launch.checkpoint.store import CheckpointStore, verify
from launch.config import Config
from launch.prepare_data import prepare
from launch.toml_config import flat
from tests.faults.cases import cases
from tests.launch.runs import as_one_process, make_data, run_here, save_tensors

pytestmark = pytest.mark.usefixtures("one_process")

# Nothing but the comparison: no validation, no sample.
QUICK = ("--validation.no-enable", "--sample.no-enable")
MODEL = {
    "vocab_size": 640,
    "dim": 64,
    "num_layers": 1,
    "num_heads": 4,
    "glu_dim": 64,
    "activation": "none",
    "lrpe_layers": [0, 1],
    "scale_embedding": False,
    "norm_eps": 1e-5,
    "pad_token_id": 3,
    "layer_types": "LS",
    "num_key_value_heads": 1,
    "rope_base": 500.0,
    "decay": "learned",
    "norm": "rms",
    "output_gate": False,
    "glu_activation": "silu",
    "position_embeddings": 1000,
    "dropout": 0.1,
}
REFUSED = {
    "training.seed": 1,
    "training.seq_len": 100,
    "training.varlen": None,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.eps": 1e-6,
}
NOTED = {
    "training.global_batch_size": 2,
    "training.max_norm": 0.5,
    "training.mixed_precision_param": "bfloat16",
    "training.mixed_precision_reduce": "bfloat16",
    "optimizer.lr": 0.005,
    "optimizer.weight_decay": 0.0,
    "lr_scheduler.warmup_steps": 1,
    "lr_scheduler.decay_type": "linear",
    "lr_scheduler.min_lr_factor": 0.2,
}
FREE = {
    "training.local_batch_size": 2,
    "training.segment_len": 50,
    "training.loss_chunk_size": 64,
    "training.max_nonfinite_steps": 5,
    "data.verify": None,
    "parallelism.context_parallel_method": "doubling",
    "parallelism.data_parallel_method": "fsdp",
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 1,
    "checkpoint.async_mode": "async",
    "activation_checkpoint.mode": "full",
    "metrics.log_freq": 2,
    "validation.freq": 7,
    "sample.top_k": 3,
    "comm.train_timeout_seconds": 50,
}


@pytest.fixture(scope="module")
def first(tmp_path_factory, data):
    """A checkpoint of one step."""
    folder = tmp_path_factory.mktemp("first")
    with as_one_process():
        assert run_here(folder, data, *QUICK, training__steps=1) == 0
    return folder / "checkpoint" / "step-00000001"


def resumed(tmp_path, data, checkpoint, *more, **changes):
    wanted = dict(training__steps=2, checkpoint__resume=checkpoint) | changes
    return run_here(tmp_path, data, *QUICK, *more, **wanted)


def test_every_setting_has_a_rule():
    assert {kind_of(name) for name in flat(dataclasses.asdict(Config()))} == {
        "fixed",
        "compared",
        "noted",
        "free",
    }


@pytest.mark.parametrize(("field", "value"), cases(MODEL.items(), 5))
def test_another_model_is_refused_by_field(tmp_path, data, first, capsys, field, value):
    (tmp_path / "model.json").write_text(json.dumps({field: value}))
    named = field in ("dim", "num_layers", "num_heads", "glu_dim")
    change = {f"model__{field}": value} if named else {"model__config": tmp_path / "model.json"}
    assert resumed(tmp_path / "out", data, first, **change) == 70
    error = capsys.readouterr().err
    assert f"model.{field} was " in error and f" and is {value!r}" in error
    assert "--checkpoint.allow_changes" in error and error.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), cases(REFUSED.items(), 5))
def test_a_fixed_setting_is_refused_by_name_and_allowed_by_one_flag(
    tmp_path, data, first, capsys, name, value
):
    change = {name.replace(".", "__"): value}
    assert resumed(tmp_path, data, first, **change) == 70
    error = capsys.readouterr().err
    assert f"{name} was " in error and f"and is {value or True!r}" in error
    assert resumed(tmp_path, data, first, "--checkpoint.allow_changes", **change) == 0
    assert f"warning: checkpoint.allow_changes: {name} was" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), cases(NOTED.items(), 5))
def test_a_setting_that_is_changed_on_purpose_is_printed(
    tmp_path, data, first, capsys, name, value
):
    assert resumed(tmp_path, data, first, **{name.replace(".", "__"): value}) == 0
    output = capsys.readouterr().out
    assert f"changed:     {name} was " in output and f"and is {value!r}" in output


def test_settings_that_change_no_loss_are_free(tmp_path, data, first, capsys):
    changes = {name.replace(".", "__"): value for name, value in FREE.items()}
    assert resumed(tmp_path, data, first, **changes) == 0
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if line.startswith("changed:")] == [
        "changed:     training.steps was 1 and is 2"
    ]
    assert "warning" not in output


@pytest.fixture(scope="module")
def others(tmp_path_factory, data):
    """Data that is not that of the checkpoint, and some that is."""
    folder = tmp_path_factory.mktemp("others")
    other = make_data(folder / "other")
    tokens = (other / "train.bin").read_bytes()
    assert tokens == (data / "train.bin").read_bytes()
    (folder / "text").mkdir()
    for number in range(40):
        words = [f"line {line} of document {number}: {line + number}" for line in range(40)]
        (folder / "text" / f"{number}.txt").write_text("\n".join(words))
    prepare(folder / "words", [folder / "text"], val_fraction=0.2)
    prepare(folder / "bpe", [folder / "text"], tokenizer="bpe", vocab_size=300, val_fraction=0.2)
    plain = folder / "plain"
    plain.mkdir()
    for name in ("train.bin", "train.idx", "val.bin", "val.idx"):
        (plain / name).write_bytes((other / name).read_bytes())
    meta = json.loads((other / "meta.json").read_text())
    (plain / "meta.json").write_text(json.dumps({"tokenizer": meta["tokenizer"]}))
    return folder


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("words", "data: the content of data.folder was"),
        ("bpe", "tokenizer was {'vocab_size': 258"),
    ],
)
def test_other_data_is_refused(tmp_path, first, others, capsys, folder, sentence):
    data = others / folder
    vocabulary = dict(model__vocab_size=320)
    assert resumed(tmp_path, data, first, **vocabulary) == 70
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["other/tokens", "plain"])
def test_a_copy_of_the_data_resumes_with_and_without_digests(tmp_path, first, others, folder):
    """`other` has the same text, and `plain` no digests."""
    assert resumed(tmp_path, others / folder, first) == 0


def test_random_tokens_in_place_of_text_are_refused(tmp_path, data, first, capsys):
    assert (
        resumed(tmp_path, data, first, "--data.source", "random", "--model.vocab_size", "320") == 70
    )
    assert "tokenizer was {" in capsys.readouterr().err


def test_what_an_older_checkpoint_does_not_hold_is_not_compared(tmp_path, data, first, capsys):
    found = verify(first)
    state = found.state()
    for name in ("data", "global_batch_size", "config", "family"):
        del state[name]
    del state["model"]["norm_eps"]
    tensors = {group: found.tensors(group) for group in ("model", "optimizer")}
    path = save_tensors(CheckpointStore(tmp_path / "old"), 1, tensors, state)
    (tmp_path / "model.json").write_text(json.dumps({"norm_eps": 1e-5}))
    changes = dict(model__config=tmp_path / "model.json", optimizer__beta1=0.8)
    assert resumed(tmp_path / "out", data, path, **changes) == 0
    assert resumed(tmp_path / "seed", data, path, training__seed=3) == 70
    assert "training.seed was 0 and is 3" in capsys.readouterr().err
