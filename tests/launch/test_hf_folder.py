"""Damaged Hugging Face folders, and those of other models, are refused in one sentence."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.exit_codes import CheckpointError
from tests.launch.weights import checkpoint_of, export, run, truncate, write_released

# How a good folder is damaged, and what the error says.


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def edit_json(name, change):
    def damage(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def edit_tensors(name, change):
    def damage(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


WEIGHT = "model.blocks.1.channel_mixer.w1.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"

DAMAGES = {
    "no config": (remove("config.json"), "config.json is missing"),
    "config not JSON": (write("config.json", "{"), "config.json is not JSON"),
    "config in Latin-1": (
        lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xe9"}'),
        "config.json is not JSON",
    ),
    "config a list": (write("config.json", "[]"), "config.json is not a JSON object"),
    "another family": (
        edit_json("config.json", lambda values: values.update(model_type="llama")),
        "model_type 'llama': known are",
    ),
    "an unknown field": (
        edit_json("config.json", lambda values: values["tnl"].update(experts=8)),
        "has ['experts']",
    ),
    "no fields": (
        edit_json("config.json", lambda values: values.update(tnl=None)),
        'config.json: "tnl" must be an object',
    ),
    "a field that makes no model": (
        edit_json("config.json", lambda values: values["tnl"].update(num_heads=5)),
        "config.json: dim 32 does not divide into 5 heads",
    ),
    "a field of another type": (
        edit_json("config.json", lambda values: values["tnl"].update(norm_eps="small")),
        "config.json has a field of another type",
    ),
    "another shape": (
        edit_json("config.json", lambda values: values["tnl"].update(glu_dim=50)),
        "wrong shape: model.blocks.0.channel_mixer.w1.weight (48, 32), expected (50, 32)",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*") if path.suffix != ".py"],
        "has no weights: none of model.safetensors",
    ),
    "a file missing": (remove(SHARD), f"{SHARD} is missing, but"),
    "a file truncated": (
        lambda folder: truncate(folder / SHARD),
        f"{SHARD} is no safetensors file, or truncated",
    ),
    "a file empty": (write(SHARD, ""), f"{SHARD} is no safetensors file, or truncated"),
    "a file of text": (write(SHARD, "version https://git-lfs" * 9), f"{SHARD} is no safetensors"),
    "index not JSON": (write(INDEX, "nothing"), f"{INDEX} is not JSON"),
    "index without files": (write(INDEX, "{}"), 'has no "weight_map"'),
    "index out of the folder": (
        edit_json(INDEX, lambda values: values["weight_map"].update({WEIGHT: "../x.safetensors"})),
        f"puts {WEIGHT} into '../x.safetensors'",
    ),
    "index names another tensor": (
        edit_json(INDEX, lambda values: values["weight_map"].update(extra=SHARD)),
        f"{SHARD} lacks extra",
    ),
    "a tensor missing": (
        lambda folder: (
            edit_tensors(SHARD, lambda tensors: tensors.pop(WEIGHT))(folder),
            edit_json(INDEX, lambda values: values["weight_map"].pop(WEIGHT))(folder),
        ),
        f"missing: {WEIGHT}",
    ),
    "a tensor too many": (
        edit_tensors(SHARD, lambda tensors: tensors.update(bias=torch.zeros(3))),
        "unexpected: bias",
    ),
    "a tensor twice": (
        edit_tensors(SHARD, lambda t: t.update({"model.embedding.weight": torch.zeros(320, 32)})),
        "has model.embedding.weight, which another file has too",
    ),
    "integers": (
        edit_tensors(SHARD, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int32)})),
        f"{WEIGHT} is torch.int32",
    ),
    "FP8": (
        edit_tensors(SHARD, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)})),
        "dtype 'F8_E4M3'",
    ),
    "tokenizer not JSON": (write("tokenizer.json", "?"), "tokenizer.json is not JSON"),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), "tokenizer.json cannot be used"),
    "a larger tokenizer": (
        edit_json(
            "tokenizer.json",
            lambda values: values["added_tokens"].extend(
                {**values["added_tokens"][0], "id": 258 + n, "content": f"<{n}>"} for n in range(99)
            ),
        ),
        "tokens, the model in",
    ),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    checkpoint = checkpoint_of(folder / "checkpoint", tokenizer="bpe")
    return export(checkpoint, folder / "hf", "--max-shard-size", "100KB")


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(
    good_folder, tmp_path, damage, message, capsys
):
    folder = tmp_path / "folder"
    shutil.copytree(good_folder, folder)
    damage(folder)
    code = run("import", "--input", folder, "--output", tmp_path / "out" / "deep")
    error = capsys.readouterr().err
    assert code == CheckpointError.exit_code
    assert error.startswith("error: ") and message in error and str(folder) in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [folder]


RELEASED_DAMAGES = {
    "biases": (edit_json("config.json", lambda values: values.update(bias=True)), "'bias': True"),
    "a field of another type": (
        edit_json("config.json", lambda values: values.update(linear_use_lrpe_list=3)),
        "config.json has a field of another type",
    ),
    "truncated": (
        lambda folder: truncate(folder / "pytorch_model.bin"),
        "pytorch_model.bin cannot be read as the weights",
    ),
    "empty": (write("pytorch_model.bin", ""), "pytorch_model.bin cannot be read as the weights"),
    "a list": (
        lambda folder: torch.save([torch.zeros(1)], folder / "pytorch_model.bin"),
        "something else than dense tensors by name",
    ),
    "another head": (
        lambda folder: torch.save(
            dict(
                torch.load(folder / "pytorch_model.bin"), **{"lm_head.weight": torch.ones(320, 32)}
            ),
            folder / "pytorch_model.bin",
        ),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize(("damage", "message"), RELEASED_DAMAGES.values(), ids=RELEASED_DAMAGES)
def test_a_damaged_released_folder_is_refused(tmp_path, damage, message, capsys):
    write_released(tmp_path / "folder", kind="bin")
    damage(tmp_path / "folder")
    code = run("import", "--input", tmp_path / "folder", "--output", tmp_path / "out")
    error = capsys.readouterr().err
    assert code == CheckpointError.exit_code
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_a_pickle_runs_no_code(tmp_path, save, capsys):
    write_released(tmp_path / "folder", kind="bin")
    save({"a": RunsCode(tmp_path / "ran")}, tmp_path / "folder" / "pytorch_model.bin")
    assert run("import", "--input", tmp_path / "folder", "--output", tmp_path / "out") == 70
    assert "pytorch_model.bin cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
