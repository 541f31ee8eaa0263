"""Weights out to Hugging Face folders and in from them: exact, checked, a tensor at a time."""

import dataclasses
import json
import os
import pickle
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.convert import to_released
from launch import convert, generate
from launch.checkpoint.shards import StoredTensor
from launch.checkpoint.store import CheckpointStore, open_checkpoint
from launch.exit_codes import CheckpointError, ConfigError
from launch.tokenizer import ByteTokenizer, train_bpe
from tests.launch.runs import at_step, run_here, save_tensors

LINEAR = TNLConfig(vocab_size=320, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)
CONFIGS = {
    "linear": LINEAR,
    "learned": dataclasses.replace(LINEAR, decay="learned"),
    "hybrid": dataclasses.replace(LINEAR, layer_types="LSL", num_key_value_heads=2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

TEXTS = [
    "def main():\n    return 1\n",
    "caf\u00e9 \u00fcber \u4e2d\u6587 \U0001f600 a\u0301",
    "\ufeff\r\n\t \x00\x01\x7f\u00a0\u2028 two  spaces   three",
    "<|end_of_document|> and <|padding|> as text",
    "",
]


def bpe():
    return train_bpe([text * 3 for text in TEXTS] + ["line 1 of 2: a main return"], 300)


TOKENIZERS = {"byte": ByteTokenizer, "bpe": bpe}


def weights_of(config, seed=0):
    torch.manual_seed(seed)
    model = TNL(config)
    for name, weight in model.named_parameters():
        if "decay_proj" in name:
            torch.nn.init.normal_(weight)
    return model.state_dict()


def checkpoint_of(folder, config=LINEAR, tokenizer="byte", weights=None):
    """A checkpoint as training saves it; its folder."""
    state = {
        "family": "tnl",
        "model": dataclasses.asdict(config),
        "tokenizer": None if tokenizer is None else TOKENIZERS[tokenizer]().spec(),
    }
    tensors = {"model": weights_of(config) if weights is None else weights, "optimizer": {}}
    save_tensors(CheckpointStore(folder), 4, tensors, state)
    return folder


def run(*arguments):
    """The exit code of a command line."""
    return convert.main([str(argument) for argument in arguments])


def export(checkpoint, output, *options):
    assert run("export", "--checkpoint", checkpoint, "--output", output, *options) == 0
    return output


def bring_in(folder, output):
    assert run("import", "--input", folder, "--output", output) == 0
    return output


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def transformers():
    found = pytest.importorskip("transformers")
    pytest.importorskip("lasp.tnl.hf")
    return found


@every_config
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_transformers_continues_as_the_launcher_does(
    config, tokenizer, tmp_path, capsys, transformers
):
    checkpoint = checkpoint_of(tmp_path / "checkpoint", config, tokenizer)
    folder = export(checkpoint, tmp_path / "hf", "--max-shard-size", "30KB")
    capsys.readouterr()
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "def main", "--temperature", "0"]
    assert generate.main([*arguments, "--max_new_tokens", "40"]) == 0
    expected = capsys.readouterr().out.removesuffix("\n")

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    coder = transformers.AutoTokenizer.from_pretrained(folder)
    out = model.generate(**coder("def main", return_tensors="pt"), max_new_tokens=40)
    assert coder.decode(out[0], skip_special_tokens=True) == expected
    assert len(expected) > 20

    ours, *_ = generate.load_model(checkpoint, torch.device("cpu"))
    assert torch.equal(model(out).logits, ours(out))


def test_a_padded_batch_continues_as_single_prompts_do(tmp_path, transformers):
    folder = export(checkpoint_of(tmp_path / "checkpoint"), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    coder = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["a", "def main(self):", "return"]

    def continued(texts):
        batch = coder(texts, return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=20)
        return coder.batch_decode(out, skip_special_tokens=True)

    assert continued(prompts) == [continued([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_are_exact(kind, tmp_path, transformers):
    own = TOKENIZERS[kind]()
    folder = export(checkpoint_of(tmp_path / "checkpoint", LINEAR, kind), tmp_path / "hf")
    coder = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = own.encode(text).tolist()
        assert coder(text)["input_ids"] == ids
        assert coder.decode(ids, skip_special_tokens=True) == own.decode(ids) == text
    assert (coder.eos_token_id, coder.bos_token_id, coder.pad_token_id) == (
        own.eod_id,
        own.eod_id,
        own.pad_id,
    )
    # Any tokens, as a model may produce them: invalid UTF-8, special and unknown ones.
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(LINEAR.vocab_size, (12,), generator=generator).tolist()
        assert coder.decode(ids, skip_special_tokens=True) == own.decode(ids)


@every_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_export_import_export_gives_equal_bytes(config, dtype, size, tmp_path):
    weights = weights_of(config)
    weights["blocks.1.channel_mixer.w1.weight"][0, :3] = torch.tensor([torch.nan, -0.0, 1e-40])
    checkpoint = checkpoint_of(tmp_path / "checkpoint", config, "bpe", weights)
    options = ("--dtype", dtype, "--max-shard-size", size)
    first = export(checkpoint, tmp_path / "first", *options)
    back = bring_in(first, tmp_path / "back")
    assert contents(export(back, tmp_path / "second", *options)) == contents(first)
    assert len(list(first.glob("*.safetensors"))) == 1 or size == "20KB"

    found = open_checkpoint(back)
    stored = found.tensors("model")
    for name, weight in TNL(config).to(getattr(torch, dtype)).state_dict().items():
        wanted = weights[name].to(weight.dtype).float().view(torch.int32)
        assert torch.equal(stored[name].view(torch.int32), wanted), name
    original = open_checkpoint(checkpoint).state()
    assert all(found.state()[key] == original[key] for key in ("family", "model", "tokenizer"))


def test_a_checkpoint_without_a_tokenizer_goes_through(tmp_path):
    checkpoint = checkpoint_of(tmp_path / "checkpoint", tokenizer=None)
    first = export(checkpoint, tmp_path / "first")
    assert not (first / "tokenizer.json").exists()
    back = bring_in(first, tmp_path / "back")
    assert contents(export(back, tmp_path / "second")) == contents(first)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_transformers_saves_comes_back(kind, tmp_path, transformers):
    checkpoint = checkpoint_of(tmp_path / "checkpoint", tokenizer=kind)
    folder = export(checkpoint, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    found = open_checkpoint(bring_in(tmp_path / "saved", tmp_path / "back"))
    original = open_checkpoint(checkpoint)
    assert all(found.state()[key] == original.state()[key] for key in ("model", "tokenizer"))
    stored = found.tensors("model")
    assert all(torch.equal(stored[name], each) for name, each in original.tensors("model").items())


@pytest.mark.usefixtures("one_process")
def test_training_starts_from_imported_weights(tmp_path, data, monkeypatch):
    assert run_here(tmp_path / "first", data) == 0
    trained = tmp_path / "first" / "checkpoint"
    back = bring_in(export(trained, tmp_path / "hf"), tmp_path / "back")
    seen = []
    at_step(
        monkeypatch,
        0,
        lambda state: seen.append(
            (
                {name: each.clone() for name, each in state.model.state_dict().items()},
                len(state.optimizer.state),
                state.consumed,
            )
        ),
    )
    resume = {"checkpoint.resume": back / "step-00000000", "model.config": back / "model.json"}
    shape = {f"model__{name}": value for name, value in (("num_heads", 2), ("num_layers", 2))}
    more = [text for name, value in resume.items() for text in (f"--{name}", str(value))]
    assert run_here(tmp_path / "second", data, *more, **shape) == 0
    ((weights, moments, consumed),) = seen
    expected = open_checkpoint(trained).tensors("model")
    assert all(torch.equal(weights[name], each) for name, each in expected.items())
    assert (moments, consumed) == (0, 0)
    # An ordinary checkpoint of its own, which the next run resumes with moments.
    assert open_checkpoint(tmp_path / "second" / "checkpoint").open("optimizer")


RELEASED = {
    "model_type": "transnormer",
    "architectures": ["TransnormerForCausalLM"],
    "decoder_embed_dim": 32,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "hidden_dim": 32,
    "glu_dim": 48,
    "vocab_size": 320,
    "linear_act_fun": "swish",
    "linear_use_lrpe_list": [1, 0, 0],
    "no_scale_embedding": False,
    "init_std": 0.2,
    "pad_token_id": 0,
}


def write_released(folder, dtype=torch.bfloat16, kind="safetensors", files=1):
    """A folder in the released layout; its tensors."""
    folder.mkdir()
    tensors = to_released(weights_of(LINEAR), LINEAR)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if kind == "safetensors":
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(RELEASED))
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    weight_map = {}
    for number in range(files):
        end = "" if files == 1 else f"-{number + 1:05}-of-{files:05}"
        part = {name: tensors[name] for name in list(tensors)[number::files]}
        path = folder / f"{stem}{end}{suffix}"
        if kind == "safetensors":
            save_file(part, path)
        else:
            torch.save(part, path)
        weight_map |= dict.fromkeys(part, path.name)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("files", [1, 3])
def test_released_weights_come_in_to_the_bit(dtype, kind, files, tmp_path):
    tensors = write_released(tmp_path / "released", dtype, kind, files)
    found = open_checkpoint(bring_in(tmp_path / "released", tmp_path / "out"))
    config = dataclasses.replace(LINEAR, pad_token_id=0)
    assert found.state()["model"] == json.loads(json.dumps(dataclasses.asdict(config)))
    back = to_released(found.tensors("model"), config)
    for name, tensor in tensors.items():
        assert torch.equal(back[name].to(dtype).view(torch.uint8), tensor.view(torch.uint8)), name


# How a good folder is damaged, and what the error says.


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(name):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return damage


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
        "config.json: ",
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
    "a file truncated": (truncate(SHARD), f"{SHARD} is no safetensors file, or truncated"),
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
    "layers in words": (
        edit_json("config.json", lambda values: values.update(decoder_layers="three")),
        "config.json: ",
    ),
    "truncated": (truncate("pytorch_model.bin"), "pytorch_model.bin cannot be read as the weights"),
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


def test_export_refuses_what_it_cannot_do(tmp_path, capsys):
    checkpoint = checkpoint_of(tmp_path / "checkpoint")
    other = checkpoint_of(tmp_path / "other", weights=weights_of(CONFIGS["learned"]))
    damaged = checkpoint_of(tmp_path / "damaged")
    truncate("model.safetensors")(damaged / "step-00000004")
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    cases = [
        ([checkpoint, checkpoint], ConfigError, f"{checkpoint} exists already"),
        ([checkpoint, tmp_path / "file" / "x"], ConfigError, "cannot be written"),
        ([tmp_path / "none", out], CheckpointError, "holds no valid checkpoint"),
        ([damaged, out], CheckpointError, "truncated"),
        ([other, out], CheckpointError, "is of another model: unknown blocks.0"),
        ([checkpoint, out, "--max-shard-size", "5"], ConfigError, "max_shard_size is '5'"),
        ([checkpoint, out, "--max-shard-size", "0GB"], ConfigError, "max_shard_size is '0GB'"),
    ]
    before = sorted(tmp_path.iterdir())
    for (source, output, *options), kind, message in cases:
        code = run("export", "--checkpoint", source, "--output", output, *options)
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == (kind.exit_code, 1), error
        assert message in error
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_fails(tmp_path, good_folder, monkeypatch, failure):
    checkpoint = checkpoint_of(tmp_path / "checkpoint")
    written = []

    def fail(*arguments, **options):
        written.append(arguments)
        if len(written) == 2:
            raise failure
        save_file(*arguments, **options)

    monkeypatch.setattr(convert, "save_file", fail)
    wanted = ConfigError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        convert.export_checkpoint(checkpoint, tmp_path / "out", max_shard_size="50KB")
    written.clear()
    with pytest.raises(wanted):
        convert.import_folder(good_folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_no_more_than_a_file_of_weights_is_in_memory(tmp_path, monkeypatch):
    """All tensors that are read are counted while they live."""
    live, most = 0, []
    read = StoredTensor.__getitem__

    def forget(size):
        nonlocal live
        live -= size

    def count(tensor):
        nonlocal live
        live += tensor.nbytes
        most.append(live)
        weakref.finalize(tensor, forget, tensor.nbytes)
        return tensor

    checkpoint = checkpoint_of(tmp_path / "checkpoint")
    weights = weights_of(LINEAR)
    total, largest = (op(each.nbytes for each in weights.values()) for op in (sum, max))
    limit = 60_000
    assert total > 2.5 * limit
    monkeypatch.setattr(StoredTensor, "__getitem__", lambda self, box: count(read(self, box)))
    export(checkpoint, tmp_path / "hf", "--max-shard-size", "60KB")
    assert len(most) == len(weights) and max(most) <= limit + largest

    del most[:]
    monkeypatch.setattr(convert, "_FILE_BYTES", limit)
    bring_in(tmp_path / "hf", tmp_path / "back")
    assert len(most) == len(weights) and max(most) <= limit + largest
