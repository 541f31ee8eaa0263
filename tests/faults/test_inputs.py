"""Wrong inputs by table: each ends with one sentence and the documented exit code."""

import json
import os
import re
import socket

import numpy as np
import pytest

from launch import convert, evaluate, generate, prepare_data, train
from launch.build import model_config
from launch.checkpoint.store import CheckpointStore, verify
from launch.config import load_config
from launch.data import DataFolder
from launch.exit_codes import DataError
from launch.indexed_dataset import IndexedTokens
from launch.prepare_data import prepare
from tests.faults.cases import cases
from tests.launch.runs import arguments_here, at_step, run_here, save_tensors

pytestmark = pytest.mark.usefixtures("one_process")

DEEP = "[" * 100_000
DEEP_OBJECT = '{"text": ' * 5000 + "1" + "}" * 5000
# Parsed by Python, and too deep for what writes it again.
NESTED = "[" * 500 + "]" * 500
QUICK = ("--validation.no-enable", "--sample.no-enable")


def one_sentence(main, argv, capsys, code):
    """Run `main`; it must end with `code` and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error, error
    assert "invalid command line" in error or error.count("\n") == 1, error
    return error


def place(folder, name, content):
    """A file of a table: bytes, text, or what is no regular file."""
    path = folder / name
    if content == "fifo":
        os.mkfifo(path)
    elif content == "socket":
        # The path of a socket is short.
        here = os.getcwd()
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)
        os.chdir(here)
    elif content == "device":
        path.symlink_to("/dev/zero")
    elif content == "folder":
        path.mkdir()
    elif content == "nowhere":
        path.symlink_to(folder / "nothing")
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text_id(value):
    return re.sub(r"\W+", " ", repr(value))[:40]


ODD = ("fifo", "socket", "device", "nowhere", None)

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


# Checkpoints that are complete and hashed, and of nobody.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        assert run_here(folder, data, *QUICK, training__steps=1) == 0
    return verify(folder / "checkpoint" / "step-00000001")


def foreign(folder, checkpoint, change):
    """A copy whose state.json is what `change` makes of it."""
    state = checkpoint.state()
    tensors = {group: checkpoint.tensors(group) for group in ("model", "optimizer")}
    changed = change(state)
    return save_tensors(CheckpointStore(folder), 1, tensors, state if changed is None else changed)


def put(*keys_and_value):
    """Set a nested value; `...` removes it."""
    *keys, last, value = keys_and_value

    def change(state):
        for key in keys:
            state = state[key]
        if value is ...:
            del state[last]
        else:
            state[last] = value

    return change


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


# Of a model that is not that of the weights, or of none.
NO_MODEL = {
    "empty": lambda state: {},
    "list": lambda state: [1],
    "nested": put("more", nested(500)),
    "no model": put("model", ...),
    "model null": put("model", None),
    "model list": put("model", [1]),
    "model empty": put("model", {}),
    "model unknown field": put("model", "width", 1),
    "dim text": put("model", "dim", "32"),
    "dim null": put("model", "dim", None),
    "dim float": put("model", "dim", 32.0),
    "dim odd": put("model", "dim", 33),
    "dim other": put("model", "dim", 64),
    "dim huge": put("model", "dim", 1 << 100),
    "layers other": put("model", "num_layers", 3),
    "layers many": put("model", "num_layers", 10**9),
    "glu huge": put("model", "glu_dim", (1 << 31) - 1),
    "vocabulary": put("model", "vocab_size", 64),
    "lrpe text": put("model", "lrpe_layers", "0"),
    "lrpe outside": put("model", "lrpe_layers", [99]),
    "eps text": put("model", "norm_eps", "small"),
    "activation": put("model", "activation", 5),
    "family": put("family", "other"),
    "family list": put("family", ["tnl"]),
    "family null": put("family", None),
    "tokenizer text": put("tokenizer", "byte"),
    "tokenizer kind": put("tokenizer", {"kind": "other"}),
    "tokenizer bpe": put("tokenizer", {"kind": "bpe", "tokenizer": {}}),
    "tokenizer file": put("tokenizer", {"kind": "file", "tokenizer": [], "eod_token": 1}),
}
NO_RUN = {
    "no step": put("step", ...),
    "step text": put("step", "1"),
    "step negative": put("step", -1),
    "step null": put("step", None),
    "consumed null": put("consumed_samples", None),
    "consumed huge": put("consumed_samples", 1 << 70),
    "identity null": put("sample_identity", None),
    "identity short": put("sample_identity", [0]),
    "random null": put("random", None),
    "random empty": put("random", []),
    "random text": put("random", ["x"]),
    "random short": put("random", [{"python": [3, [1, 2], None], "torch": "00"}]),
    "random no hex": put("random", 0, "torch", "zz"),
    "config number": put("config", 1),
    "config text": put("config", "[["),
    "data list": put("data", []),
    "data number": put("data", "train", 1),
    "data numbers": put("data", "train", [1]),
}


# What is missing is not compared, nor are fields of later versions; 32.0 is 32.
SAME_RUN = ("no model", "model empty", "model unknown field", "dim float")
NOT_RESUMED = {name: change for name, change in NO_MODEL.items() if name not in SAME_RUN} | NO_RUN


@pytest.mark.parametrize("name", cases(NOT_RESUMED))
def test_foreign_checkpoints_are_not_resumed(tmp_path, data, checkpoint, capsys, name):
    path = foreign(tmp_path / "c", checkpoint, NOT_RESUMED[name])
    changes = dict(training__steps=2, checkpoint__resume=path)
    argv = arguments_here(tmp_path / "out", data, *QUICK, **changes)
    one_sentence(train.main, argv, capsys, 70)


@pytest.mark.parametrize("name", cases(NO_MODEL))
@pytest.mark.parametrize("program", ["generate", "evaluate", "convert"])
def test_foreign_checkpoints_are_not_used(tmp_path, data, checkpoint, capsys, program, name):
    path = foreign(tmp_path / "c", checkpoint, NO_MODEL[name])
    one_sentence(*command(program, path, tmp_path, data), capsys, 70)


def command(program, path, folder, data):
    return {
        "generate": (generate.main, ["--checkpoint", path, "--max_new_tokens", 1]),
        "evaluate": (evaluate.main, ["--checkpoint", path, "--data", data, "--max-samples", 1]),
        "convert": (
            convert.main,
            ["export", "--checkpoint", path, "--output", folder / "out"],
        ),
    }[program]


PATHS = [
    "/nowhere", "/dev/null", "/dev/zero", "a\0b", "x" * 5000, "/etc/hostname", "/proc/self",
]  # fmt: skip


@pytest.mark.parametrize("path", cases(PATHS, 3), ids=text_id)
@pytest.mark.parametrize("program", ["generate", "evaluate", "convert"])
def test_paths_that_are_no_checkpoint(tmp_path, data, capsys, program, path):
    main, argv = command(program, path, tmp_path, data)
    capsys.readouterr()
    assert main([str(each) for each in argv]) in (70, 73)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "content", cases(["fifo", "device", "folder", DEEP, "[]", "{}", ""]), ids=text_id
)
@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
@pytest.mark.parametrize("program", ["generate", "evaluate", "convert"])
def test_damaged_files_of_a_checkpoint(tmp_path, data, checkpoint, capsys, program, file, content):
    path = foreign(tmp_path / "c", checkpoint, lambda state: None)
    (path / file).unlink()
    place(path, file, content)
    one_sentence(*command(program, path, tmp_path, data), capsys, 70)


# launch/generate.py

PROMPTS = [
    *((f"odd{n}.txt", kind) for n, kind in enumerate(ODD)),
    ("a.jsonl", "folder"), ("a.json", "[]"), ("a.JSON", '{"prompt": "a"}'), ("a.jsonl", ""),
    ("a.jsonl", "[]"), ("a.jsonl", '{"text": "a"}'), ("a.JSONL", '{"prompt": 1}'),
    ("a.ndjson", '{"prompt": null}'), ("a.jsonlines", "plain"), ("a.jsonl", DEEP),
    ("a.jsonl", DEEP_OBJECT), ("a.jsonl", '{"prompt": "\\ud800"}'), ("a.txt", b"\xff"),
]  # fmt: skip
GENERATE_FLAGS = [
    "max_new_tokens=-1", "max_new_tokens=x", "temperature=-1", "temperature=nan", "top_k=-1",
    "top_p=0", "top_p=2", "top_p=nan", "seed=-1", "seed=9223372036854775808", "device=tpu",
    "device=cuda", "dtype=int8", "batch_size=0", "prefill_chunk=-1", "tensor_parallel_degree=0",
    "tensor_parallel_degree=2", "prompts=a\0b", "no_such=1",
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), cases(PROMPTS), ids=text_id)
def test_bad_prompts(tmp_path, checkpoint, capsys, name, content):
    path = place(tmp_path, name, content)
    argv = ["--checkpoint", checkpoint.path, "--prompts", path]
    one_sentence(generate.main, argv, capsys, 73)


@pytest.mark.parametrize("flag", cases(GENERATE_FLAGS), ids=text_id)
def test_bad_flags_of_generate(checkpoint, capsys, flag):
    one_sentence(generate.main, ["--checkpoint", checkpoint.path, f"--{flag}"], capsys, 73)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "A.JSONL", "a.ndjson"])
def test_prompts_have_no_byte_order_mark(tmp_path, checkpoint, capsys, name):
    text = "line" if name == "a.txt" else '{"prompt": "line"}\r\n'
    path = place(tmp_path, name, "\ufeff" + text)
    argv = ["--checkpoint", str(checkpoint.path), "--prompts", str(path), "--max_new_tokens", "1"]
    assert generate.main(argv) == 0
    assert capsys.readouterr().out.startswith("line")


# launch/evaluate.py

EVALUATE_FLAGS = [
    "seq-len=0", "seq-len=1000000000", "segment-len=-1", "batch-size=0", "max-samples=-1",
    "split=test", "dtype=int8", "data=/nowhere", "data=/dev/null", "data=a\0b", "task=other",
    "context-parallel-degree=3", "tensor-parallel-degree=3", "output=a\0b", "output=x.txt",
    "recall.pairs=0", "recall.seed=-1", "no-such=1",
]  # fmt: skip


@pytest.mark.parametrize("flag", cases(EVALUATE_FLAGS), ids=text_id)
def test_bad_flags_of_evaluate(data, checkpoint, capsys, flag):
    argv = ["--checkpoint", checkpoint.path, "--data", data, f"--{flag}"]
    one_sentence(evaluate.main, argv, capsys, 73)


# launch/convert.py


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    convert.export_checkpoint(checkpoint.path, folder)
    return folder


def field(name, value):
    return lambda text: json.dumps({**json.loads(text), name: value})


def size(name, value):
    """A field of the model's config, which is nested."""

    def change(text):
        config = json.loads(text)
        config["tnl"][name] = value
        return json.dumps(config)

    return change


HF_CONFIG = {
    **{f"{n}": (lambda text, kind=kind: kind) for n, kind in enumerate((*ODD, "folder"))},
    "empty": lambda text: "",
    "list": lambda text: "[]",
    "deep": lambda text: DEEP,
    "nested": field("more", nested(500)),
    "digits": field("more", 10**60),
    "type": field("model_type", "llama"),
    "type list": field("model_type", ["x"]),
    "no sizes": field("tnl", None),
    "dim text": size("dim", "32"),
    "dim null": size("dim", None),
    "dim huge": size("dim", 10**30),
    "layers many": size("num_layers", 10**9),
    "layers other": size("num_layers", 5),
    "heads zero": size("num_heads", 0),
    "vocabulary": size("vocab_size", -1),
    "lrpe text": size("lrpe_layers", "0"),
    "eps text": size("norm_eps", "small"),
}


@pytest.mark.parametrize("name", cases(HF_CONFIG))
def test_damaged_configs_of_foreign_folders(tmp_path, exported, capsys, name):
    text = (exported / "config.json").read_text()
    import_without(tmp_path, exported, capsys, "config.json", HF_CONFIG[name](text))


@pytest.mark.parametrize("content", cases([*ODD, "folder", "", "text"]), ids=text_id)
def test_damaged_weights_of_foreign_folders(tmp_path, exported, capsys, content):
    import_without(tmp_path, exported, capsys, "model.safetensors", content)


@pytest.mark.parametrize(
    "content", cases(["fifo", "device", "folder", "", "[]", "{}", DEEP]), ids=text_id
)
def test_damaged_tokenizers_of_foreign_folders(tmp_path, exported, capsys, content):
    import_without(tmp_path, exported, capsys, "tokenizer.json", content)


def import_without(tmp_path, exported, capsys, name, content):
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in exported.iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
    place(folder, name, content)
    argv = ["import", "--input", folder, "--output", tmp_path / "out"]
    one_sentence(convert.main, argv, capsys, 70)
    assert sorted(os.listdir(tmp_path)) == ["hf"]


CONVERT = [
    ["import", "--input", "/nowhere", "--output", "out"],
    ["import", "--input", "/dev/null", "--output", "out"],
    ["import", "--input", "a\0b", "--output", "out"],
    ["import", "--input", "x" * 5000, "--output", "out"],
    ["import", "--output", "out"],
    ["other"],
    [],
    ["export", "--checkpoint", "/nowhere", "--output", "a\0b"],
    ["export", "--checkpoint", "/nowhere", "--output", "/dev/null"],
    ["export", "--checkpoint", "/nowhere", "--output", "out", "--max-shard-size", "5TB"],
    ["export", "--checkpoint", "/nowhere", "--output", "out", "--dtype", "int8"],
]


@pytest.mark.parametrize("argv", cases([(each,) for each in CONVERT], 4), ids=text_id)
def test_bad_flags_of_convert(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert convert.main(argv) in (70, 73)
    assert capsys.readouterr().err.startswith("error: ")


# Damage of prepared data.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three documents, in blocks of 256 bytes."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.data_digests.BLOCK", 256)
        for number in range(4):
            place(folder, f"{number}.txt", "some text of a document, " * 20)
        texts = [folder / f"{number}.txt" for number in range(4)]
        return prepare(folder / "data", texts, val_fraction=0.3).folder


def flips(content):
    for position in range(len(content)):
        for bit in range(8):
            yield (
                content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
            )


def copy_of(small, folder):
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.faults
def test_every_bit_of_meta_json_is_found_or_without_effect(small, tmp_path):
    folder = copy_of(small, tmp_path / "data")
    intact, found = DataFolder(folder).meta, 0
    content = (folder / "meta.json").read_bytes()
    for changed in flips(content):
        (folder / "meta.json").write_bytes(changed)
        try:
            assert DataFolder(folder).meta == intact
        except DataError:
            found += 1
    # Of 8 bits of each byte: spaces and upper-case hexadecimal digits may say the same.
    assert found >= 0.99 * 8 * len(content)


@pytest.mark.faults
def test_every_bit_of_an_index_is_found(small, tmp_path):
    folder = copy_of(small, tmp_path / "data")
    for changed in flips((folder / "train.idx").read_bytes()):
        (folder / "train.idx").write_bytes(changed)
        with pytest.raises(DataError, match=r"train.idx"):
            DataFolder(folder).source("train", 64, 258)


def damages(content, count):
    generator = np.random.default_rng(0)
    for number in range(count):
        data = bytearray(content)
        first = int(generator.integers(0, len(data) - 8))
        length = int(generator.integers(1, 64))
        if number % 4 == 0:
            data[first] ^= 1 << int(generator.integers(0, 8))
        elif number % 4 == 1:
            data[first : first + length] = bytes(len(data[first : first + length]))
        elif number % 4 == 2:
            data[first : first + 2], data[first + 2 : first + 4] = b"\x41\0", b"\x42\0"
        else:
            data = data[:first]
        if bytes(data) != content:
            yield bytes(data)


@pytest.mark.faults
@pytest.mark.parametrize("large", [False, True], ids=["at start", "when read"])
def test_random_damages_of_tokens_are_found(small, tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr("launch.data.SCAN_AT_OPEN", 0)
    folder, tried = copy_of(small, tmp_path / "data"), 0
    for changed in damages((folder / "train.bin").read_bytes(), 240):
        (folder / "train.bin").write_bytes(changed)
        tried += 1
        with pytest.raises(DataError, match=r"train.bin"):
            source = DataFolder(folder).source("train", 64, 258)
            assert large
            # Every token is one of a step, but for those after the last sample.
            for index in range(source.num_samples):
                source.sample(index, 0, 64)
            source._file.check_all()
    assert tried >= 200


def test_a_changed_block_is_found_where_it_is_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.data.SCAN_AT_OPEN", 0)
    folder = copy_of(small, tmp_path / "data")
    content = bytearray((folder / "train.bin").read_bytes())
    content[600] ^= 1
    (folder / "train.bin").write_bytes(content)
    source = DataFolder(folder).source("train", 64, 258)
    assert source.sample(0, 0, 64).shape == (65,)
    with pytest.raises(DataError, match="train.bin has changed between bytes 512 and 768"):
        source.sample(4, 0, 64)
    with pytest.raises(DataError, match="train.bin has changed between bytes 512 and 768"):
        DataFolder(folder).source("train", 64, 258, verify=True)


def test_another_number_of_bytes_in_meta_json_is_found(small, tmp_path):
    """It would give other bits per byte."""
    folder = copy_of(small, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    meta["val"]["bytes"] += 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="does not match its digest"):
        DataFolder(folder)


def test_the_leftover_of_a_killed_preparation_is_removed(tmp_path):
    place(tmp_path, "a.txt", "text " * 50)
    # No process has such a number.
    for name in (".out-4194305", f".out-{os.getppid()}", ".other-4194305", ".out-x"):
        (tmp_path / name).mkdir()
    prepare(tmp_path / "out", [tmp_path / "a.txt"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.txt", "out", f".out-{os.getppid()}", ".other-4194305", ".out-x"}
