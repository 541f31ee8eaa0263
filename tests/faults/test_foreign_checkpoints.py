"""Checkpoints and folders of nobody, and wrong flags of the programs that read them, by table."""

import json
import os

import pytest

from launch import convert, evaluate, generate, train
from launch.checkpoint.store import CheckpointStore, verify
from tests.faults.cases import (
    DEEP,
    DEEP_OBJECT,
    ODD,
    QUICK,
    cases,
    one_sentence,
    place,
    text_id,
)
from tests.launch.runs import arguments_here, as_one_process, run_here, save_tensors

pytestmark = pytest.mark.usefixtures("one_process")

# Checkpoints that are complete and hashed, and of nobody.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("first")
    with as_one_process():
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
    start = "line" if name == "a.txt" else '{"prompt": "line", "text": "line'
    assert capsys.readouterr().out.startswith(start)


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
