"""Published folders convert to Megatron checkpoints and back without a change."""

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.parallel.megatron.published import (
    LING_2_0,
    LING_2_6,
    MINIMAX,
    random_weights,
    write_folder,
)

pytest.importorskip("megatron.core")
from examples import megatron_weights  # noqa: E402
from parallel.megatron import hf_weights  # noqa: E402

KINDS = {"ling 2.0": LING_2_0, "ling 2.6": LING_2_6, "minimax": MINIMAX}


def read_folder(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_a_round_trip_gives_the_same_bytes(tmp_path, values):
    weights = random_weights(values, torch.bfloat16)
    source = write_folder(tmp_path / "source", values, weights, files=3)
    # Small files, so that there are several on both sides.
    hf_weights.import_folder(source, tmp_path / "megatron", file_bytes=50_000)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 2
    hf_weights.export_checkpoint(tmp_path / "megatron", tmp_path / "back", file_bytes=50_000)
    back = read_folder(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert {n: bits(x) for n, x in back.items()} == {n: bits(x) for n, x in weights.items()}
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "back" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a dict)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_no_more_than_a_file_is_in_memory(tmp_path, monkeypatch):
    storages, alive = [], []
    read = hf_weights.HFFolder.read

    def counted(self, entry):
        tensor = read(self, entry)
        storages.append(weakref.ref(tensor.untyped_storage()))
        here = [storage() for storage in storages]
        alive.append(sum(each.nbytes() for each in here if each is not None))
        return tensor

    monkeypatch.setattr(hf_weights.HFFolder, "read", counted)
    weights = random_weights(LING_2_0)
    source = write_folder(tmp_path / "source", LING_2_0, weights)
    hf_weights.import_folder(source, tmp_path / "megatron", file_bytes=30_000)
    # The largest tensor, a linear layer's projection with its gate, is larger than that.
    assert max(alive) < 80_000 < sum(x.nbytes for x in weights.values()) / 5


def test_another_dtype_keeps_the_bias_of_the_router(tmp_path):
    weights = random_weights(LING_2_0)
    source = write_folder(tmp_path / "source", LING_2_0, weights)
    hf_weights.import_folder(source, tmp_path / "megatron")
    hf_weights.export_checkpoint(tmp_path / "megatron", tmp_path / "back", dtype=torch.float16)
    back = read_folder(tmp_path / "back")
    for name, x in weights.items():
        dtype = torch.float32 if name.endswith("expert_bias") else torch.float16
        assert torch.equal(back[name], x.to(dtype)) and back[name].dtype == dtype
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float16"


def test_buffers_that_follow_from_the_config_are_left_out(tmp_path):
    weights = random_weights(MINIMAX)
    extra = {"model.layers.0.self_attn.slope_rate": torch.ones(4, 1, 1)}
    source = write_folder(tmp_path / "source", MINIMAX, weights | extra)
    hf_weights.import_folder(source, tmp_path / "megatron")
    hf_weights.export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert read_folder(tmp_path / "back").keys() == weights.keys()


def config(**changes):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def tensors(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


EMBEDDING, GATE = "model.word_embeddings.weight", "model.layers.0.mlp.gate_proj.weight"
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 10**6), "is not JSON"),
    "another model": (config(model_type="llama"), "model_type is 'llama'"),
    "Ling 3": (config(kda_lower_bound=-5), "Kimi Delta Attention"),
    "scaled rotary": (config(rope_scaling={"type": "yarn"}), "rope_scaling is"),
    "scaled rotary, by its new name": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "rope_parameters is",
    ),
    "no size": (config(hidden_size=None), "hidden_size is None: it must be a whole number"),
    "other router": (config(topk_group=1), "twice as many experts as groups"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "truncated": (truncate, "no safetensors file, or truncated"),
    "missing": (tensors(lambda w: w.pop(EMBEDDING)), f"missing: {EMBEDDING}"),
    "unexpected": (tensors(lambda w: w.update(x=w[GATE].clone())), "unexpected: x"),
    "shape": (tensors(lambda w: w.update({GATE: w[GATE][:-1]})), "wrong shape: model.layers.0"),
    "two dtypes": (tensors(lambda w: w.update({GATE: w[GATE].half()})), "dtypes that differ"),
    "integers": (tensors(lambda w: w.update({EMBEDDING: w[EMBEDDING].int()})), "no floats"),
    "quantised": (
        tensors(lambda w: w.update({f"{GATE}_scale_inv": torch.ones(1)})),
        "quantised weights",
    ),
}


@pytest.mark.parametrize("damage, message", BAD.values(), ids=BAD)
def test_bad_folders_are_refused_in_a_sentence(tmp_path, damage, message):
    source = write_folder(tmp_path / "source", LING_2_0, random_weights(LING_2_0))
    damage(source)
    output = tmp_path / "megatron"
    with pytest.raises(SystemExit) as stopped:
        megatron_weights.main(["import", f"--input={source}", f"--output={output}"])
    assert message in stopped.value.code and "\n" not in stopped.value.code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_exports_that_cannot_be_right_are_refused(tmp_path, capsys):
    source = write_folder(tmp_path / "source", LING_2_0, random_weights(LING_2_0))
    checkpoint, output = tmp_path / "megatron", tmp_path / "back"
    megatron_weights.main(["import", f"--input={source}", f"--output={checkpoint}"])
    assert f"written: {checkpoint}" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(LING_2_0 | dict(num_hidden_layers=10)))
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "config.json").write_text(json.dumps(LING_2_0 | dict(num_experts=16)))
    arguments = [f"--checkpoint={checkpoint}", f"--output={output}"]
    for extra, message in [
        ([f"--like={other}"], "of another model"),
        ([f"--like={wide}"], "is (8, 48), but (16, 48) by config.json"),
        (["--max-shard-size=much"], "'much' is not a whole number of KB, MB or GB"),
        ([f"--checkpoint={source}", f"--like={source}"], "no Megatron checkpoint"),
        ([f"--output={source}"], "exists already"),
        ([f"--like={tmp_path}"], "has no config.json"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            megatron_weights.main(["export", *arguments, *extra])
        assert message in f"{stopped.value.code}{capsys.readouterr().err}"
    assert not output.exists()
