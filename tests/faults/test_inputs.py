"""Wrong texts, configs and data by table: each ends with one sentence and the documented code."""

import json
import os
import re

import numpy as np
import pytest

from launch import prepare_data, train
from launch.build import model_config
from launch.config import load_config
from launch.indexed_dataset import IndexedTokens
from launch.prepare_data import prepare
from tests.faults.cases import (
    DEEP,
    DEEP_OBJECT,
    NESTED,
    ODD,
    QUICK,
    cases,
    one_sentence,
    place,
    text_id,
)
from tests.launch.runs import arguments_here, at_step, run_here

pytestmark = pytest.mark.usefixtures("one_process")

# prepare_data

ROWS = {
    "deep": DEEP,
    "deep object": DEEP_OBJECT,
    "nested": '{"text": "a", "more": ' + NESTED + "}",
    "no object": "1",
    "null": "null",
    "string": '"text"',
    "no field": '{"body": "a"}',
    "field null": '{"text": null}',
    "field number": '{"text": 1}',
    "field list": '{"text": ["a"]}',
    "half a pair": '{"text": "\\ud800"}',
    "cut off": '{"text": "a',
    "two per line": '{"text": "a"} {"text": "b"}',
    "digits": '{"text": "a", "n": ' + "1" * 5000 + "}",
}
LISTS = {
    "empty items": "[{}]",
    "strings": '["a", "b"]',
    "field null": '[{"text": null}]',
    "nested": "[" + NESTED + "]",
    "cut off": '[{"text": "a"},',
    "latin": b'[{"text": "caf\xe9"}]',
    "pretty object": '{\n  "text": "a"\n}',
    "two lists": "[1]\n[2]",
    "text": "plain text",
}
LINES = (".jsonl", ".JSONL", ".jsonlines", ".ndjson", ".json")
KINDS = (".txt", ".jsonl", ".gz")
INPUTS = (
    [(f"{name}{suffix}", content) for suffix in LINES for name, content in ROWS.items()]
    + [(f"{name}.json", content) for name, content in LISTS.items()]
    + [(f"odd{n}{suffix}", kind) for n, kind in enumerate(ODD) for suffix in KINDS]
    + [
        ("damaged.gz", b"\x1f\x8b\x08garbage"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3"),
        ("no.gz", "text"),
        ("archive.tar", "text"),
        ("ARCHIVE.TAR", "text"),
        ("empty.txt", ""),
        ("empty.jsonl", "\n\n"),
        ("empty.json", "[]"),
        ("mark.txt", "\ufeff"),
        ("latin.txt", b"caf\xe9"),
        ("no.parquet", "text"),
        ("odd.parquet", "fifo"),
    ]
)  # fmt: skip


@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize(("name", "content"), cases(INPUTS), ids=text_id)
def test_bad_texts(tmp_path, capsys, name, content, inside):
    folder = tmp_path / "texts"
    folder.mkdir()
    place(folder, name, content)
    path = folder if inside else folder / name
    argv = ["--input", path, "--output", tmp_path / "out"]
    one_sentence(prepare_data.main, argv, capsys, 73)
    assert os.listdir(tmp_path) == ["texts"]


TOKENIZERS = [
    ("t.json", "[]"),
    ("t.json", "{}"),
    ("t.json", DEEP),
    ("t.json", NESTED),
    ("t.json", b"\xff\xfe"),
    ("t.json", "fifo"),
    ("t.json", "device"),
    ("t.json", "folder"),
    ("t.json", None),
    ("meta.json", "{}"),
    ("meta.json", DEEP),
    ("meta.json", '{"tokenizer": {"kind": "other"}}'),
    ("meta.json", '{"format": 3, "tokenizer": {"kind": "byte"}}'),
    ("meta.json", '{"format": 2, "tokenizer": {"kind": "byte"}}'),
]
PREPARE_FLAGS = [
    ("--val_fraction", "0"),
    ("--val_fraction", "1"),
    ("--val_fraction", "nan"),
    ("--val_fraction", "-1"),
    ("--val_fraction", "many"),
    ("--workers", "0"),
    ("--workers", "-3"),
    ("--workers", "two"),
    ("--eod_token", "</s>"),
    ("--pad_token", "<pad>"),
    ("--tokenizer", "bpe", "--vocab_size", "10"),
    ("--tokenizer", "a\0b"),
    ("--tokenizer", "x" * 5000),
    ("--output", "a\0b"),
    ("--output", "x" * 5000),
    ("--output", "/dev/null/out"),
    ("--output", "/proc/out"),
    ("--input", "a\0b"),
    ("--input", "x" * 5000),
    ("--input", "\udcff"),
    ("--no-such-flag",),
    ("--text_field",),
]


@pytest.mark.parametrize(("name", "content"), cases(TOKENIZERS))
def test_bad_tokenizers(tmp_path, capsys, name, content):
    (tmp_path / "a.txt").write_text("text " * 50)
    (tmp_path / "folder").mkdir()
    place(tmp_path / "folder", name, content)
    where = tmp_path / "folder" / (name if name == "t.json" else "")
    argv = ["--input", tmp_path / "a.txt", "--output", tmp_path / "out", "--tokenizer", where]
    one_sentence(prepare_data.main, argv, capsys, 73)


@pytest.mark.parametrize("more", cases([(each,) for each in PREPARE_FLAGS]), ids=text_id)
def test_bad_flags_of_prepare_data(tmp_path, capsys, more):
    (tmp_path / "a.txt").write_text("text " * 50)
    argv = ["--input", tmp_path / "a.txt", "--output", tmp_path / "out", *more]
    one_sentence(prepare_data.main, argv, capsys, 73)


@pytest.mark.parametrize("suffix", LINES)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_all_names_of_json_lines_are_read(tmp_path, suffix, mark):
    lines = [json.dumps({"text": f"text {n}", "score": float("nan")}) for n in range(4)]
    path = place(tmp_path, f"a{suffix}", mark + "\n".join(lines))
    assert texts_of(prepare(tmp_path / "out", [path], val_fraction=0.5)) == 4 * ["text"]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_a_json_list_is_read_item_by_item(tmp_path, mark):
    items = [{"text": f"text {n}"} for n in range(4)]
    path = place(tmp_path, "a.json", mark + json.dumps(items, indent=2))
    assert texts_of(prepare(tmp_path / "out", [path], val_fraction=0.5)) == 4 * ["text"]


def texts_of(folder):
    """The first word of each document."""
    found = []
    for split in ("train", "val"):
        tokens = IndexedTokens(folder.folder / split).tokens
        documents = np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
        found += [folder.tokenizer.decode(each.tolist()).split()[0] for each in documents]
    return found


# launch/train.py

TOML = [
    *ODD,
    "folder",
    "training",
    "[training",
    "[training]\nsteps = ",
    "[training]\nsteps = 'x'",
    "[training]\nsteps = 1.5",
    "[training]\nsteps = true",
    "[training]\nsteps = [1]",
    "[training]\nsteps = 99999999999999999999999999",
    "[training]\nsteps = 1\nsteps = 2",
    "[training]\nstep = 1",
    "[trainer]\nsteps = 1",
    "training = 1",
    '[job]\ndump_folder = "a\\u0000b"',
    '[data]\nsource = "folder"\nfolder = "a\\u0000b"',
    '[model]\nconfig = "a\\u0000b"',
    '[checkpoint]\nresume = "a\\u0000b"',
    "[data]\nfolders = [['a', 0.5], ['a', 0.5]]",
    "[data]\nfolders = [['a']]",
    "[optimizer]\nlr = nan",
    "[optimizer]\nlr = inf",
    "[optimizer]\nlr = -1.0",
    "a = " + "[" * 5000,
    b"\xff\xfe[\0t\0",
    b"[training]\nsteps = 1 # \xe9",
]


@pytest.mark.parametrize("content", cases(TOML), ids=text_id)
def test_bad_config_files(tmp_path, capsys, monkeypatch, content):
    # If one were taken, its output would go here.
    monkeypatch.chdir(tmp_path)
    path = place(tmp_path, "run.toml", content)
    one_sentence(train.main, ["--job.config_file", path], capsys, 73)


FLAGS = [
    "training.steps=0", "training.steps=-1", "training.steps=x", "training.seq_len=0",
    "training.seq_len=1000000000", "training.local_batch_size=0", "training.local_batch_size=3",
    "training.global_batch_size=0", "training.global_batch_size=-2", "training.seed=-1",
    "training.seed=9223372036854775808", "training.max_norm=-1", "training.max_norm=nan",
    "training.loss_chunk_size=0", "training.segment_len=-1", "training.segment_gradient=no",
    "training.max_nonfinite_steps=0", "training.mixed_precision_param=float8",
    "optimizer.lr=nan", "optimizer.lr=-1", "optimizer.lr=inf", "optimizer.beta1=1",
    "optimizer.beta2=-0.1", "optimizer.eps=-1", "optimizer.weight_decay=nan", "optimizer.name=sgd",
    "lr_scheduler.warmup_steps=-1", "lr_scheduler.decay_ratio=2", "lr_scheduler.min_lr_factor=nan",
    "lr_scheduler.decay_type=none", "model.family=other", "model.preset=other", "model.dim=0",
    "model.dim=-8", "model.dim=33", "model.dim=1e3", "model.num_heads=5", "model.num_layers=0",
    "model.num_layers=1000000000", "model.glu_dim=0", "model.vocab_size=10", "model.layer_types=X",
    "model.layer_types=LLL", "model.num_key_value_heads=3", "model.decay=other",
    "model.config=/nowhere", "model.config=/dev/null", "model.config=/dev/zero",
    "data.source=other", "data.folder=/nowhere", "data.folder=/dev/null", "data.folders=a",
    "checkpoint.interval=0", "checkpoint.keep_latest_k=-1", "checkpoint.async_mode=other",
    "parallelism.context_parallel_degree=3", "parallelism.tensor_parallel_degree=2",
    "parallelism.context_parallel_method=other", "comm.backend=nccl", "comm.backend=mpi",
    "comm.train_timeout_seconds=0", "metrics.log_freq=0", "validation.freq=0",
    "validation.steps=0", "sample.temperature=nan", "sample.top_k=-1",
    "job.dump_folder=/dev/null/x", "job.dump_folder=/proc/x", "job.dry_run_gpus=-1",
    "job.config_file=/nowhere", "no.such=1",
]  # fmt: skip


@pytest.mark.parametrize("flag", cases(FLAGS))
def test_bad_flags_of_training(tmp_path, data, capsys, flag):
    argv = arguments_here(tmp_path / "out", data, *QUICK, f"--{flag}")
    one_sentence(train.main, argv, capsys, 73)


MODELS = [
    *ODD, "folder", "", "[]", "1", "null", DEEP, NESTED, '{"dim": ' + NESTED + "}",
    '{"dim": NaN}', '{"norm_eps": Infinity}', '{"norm_eps": 1e999}', '{"norm_eps": -1}',
    '{"dim": "64"}', '{"dim": 64.0}', '{"dim": null}', '{"dim": true}', '{"width": 1}',
    '{"activation": "relu"}', '{"lrpe_layers": [9]}', '{"lrpe_layers": ["0"]}',
    '{"lrpe_layers": 0}', '{"num_layers": 1' + "0" * 30 + "}", '{"num_layers": ' + "1" * 5000 + "}",
    '{"pad_token_id": -1}', '{"init_std": 0}', b"\xff",
]  # fmt: skip


@pytest.mark.parametrize("content", cases(MODELS), ids=text_id)
def test_bad_model_files(tmp_path, data, capsys, content):
    path = place(tmp_path, "model.json", content)
    argv = ["--data.source", "folder", "--data.folder", data, "--model.config", path]
    argv += ["--job.dump_folder", tmp_path / "out", *QUICK]
    one_sentence(train.main, argv, capsys, 73)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    model = place(tmp_path, "model.json", '\ufeff{"norm_eps": 1e-5}')
    text = f'\ufeff[model]\nconfig = "{model}"\n[training]\nseq_len = 202\n'
    path = place(tmp_path, "run.toml", text.replace("\n", "\r\n"))
    config = load_config(["--job.config_file", str(path)])
    assert config.training.seq_len == 202
    assert model_config(config, None).norm_eps == 1e-5


META = [
    ("meta.json", content)
    for content in (
        "", "{", "[]", "1", "{}", "null", DEEP, NESTED, "fifo", "device", "nowhere", "folder",
        '{"tokenizer": null}', '{"tokenizer": {"kind": "bpe"}}', '{"tokenizer": {"kind": "file"}}',
        '{"tokenizer": {"kind": "bpe", "tokenizer": ' + NESTED + "}}",
        '{"tokenizer": {"kind": "byte"}, "train": 1}',
        '{"tokenizer": {"kind": "byte"}, "train": {"bytes": "x", "tokens": 1}}',
        '{"tokenizer": {"kind": "byte"}, "format": 7}',
        '{"tokenizer": {"kind": "byte"}, "format": "1"}',
        '{"tokenizer": {"kind": "byte"}, "format": 2}',
        '{"tokenizer": {"kind": "byte"}, "digest": "0"}',
        b"\xff\xfe",
    )
]  # fmt: skip
TOKENS = [(name, kind) for name in ("train.idx", "train.bin") for kind in (*ODD, "folder", "")]


@pytest.mark.parametrize(("name", "content"), cases(META + TOKENS), ids=text_id)
def test_damaged_data_folders(tmp_path, data, capsys, name, content):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
    place(folder, name, content)
    argv = arguments_here(tmp_path / "out", folder, *QUICK)
    one_sentence(train.main, argv, capsys, 73)


def test_a_file_truncated_during_training_ends_the_run_with_its_name(
    tmp_path, data, capsys, monkeypatch
):
    """A mapped file would end the process with SIGBUS."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    at_step(monkeypatch, 3, lambda state: os.truncate(folder / "train.bin", 4096))
    assert run_here(tmp_path / "out", folder, *QUICK) == 73
    assert re.search(r"error: .*train.bin ends at byte 4096", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml"])
def test_a_fifo_among_the_output_is_refused(tmp_path, data, capsys, name):
    place(tmp_path, name, "fifo")
    one_sentence(train.main, arguments_here(tmp_path, data, *QUICK), capsys, 73)
