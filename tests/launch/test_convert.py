"""Weights out to Hugging Face folders and in from them: exact, checked, a tensor at a time."""

import dataclasses
import json
import os
import weakref

import pytest
import torch
from safetensors.torch import save_file

from lasp.tnl import TNL
from lasp.tnl.convert import to_released
from launch import convert, generate
from launch.checkpoint.shards import StoredTensor
from launch.checkpoint.store import open_checkpoint
from launch.exit_codes import CheckpointError, ConfigError
from tests.launch.runs import at_step, run_here
from tests.launch.weights import (
    CONFIGS,
    LINEAR,
    TEXTS,
    TOKENIZERS,
    bring_in,
    checkpoint_of,
    contents,
    export,
    run,
    truncate,
    weights_of,
    write_released,
)

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


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
    arguments = ["--prompt", "def main", "--temperature", "0", "--max_new_tokens", "40"]
    assert generate.main(["--checkpoint", str(checkpoint), *arguments]) == 0
    expected = capsys.readouterr().out.removesuffix("\n")
    imported = bring_in(folder, tmp_path / "imported")
    capsys.readouterr()
    assert generate.main(["--checkpoint", str(imported), *arguments]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == expected

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
@pytest.mark.parametrize(("dtype", "size"), [("float32", "20KB"), ("bfloat16", "5GB")])
def test_export_import_export_gives_equal_bytes(config, dtype, size, tmp_path):
    weights = weights_of(config)
    weights["blocks.1.channel_mixer.w1.weight"][0, :3] = torch.tensor([torch.nan, -0.0, 1e-40])
    checkpoint = checkpoint_of(tmp_path / "checkpoint", config, "bpe", weights)
    options = ("--dtype", dtype, "--max-shard-size", size)
    first = export(checkpoint, tmp_path / "first", *options)
    back = bring_in(first, tmp_path / "back")
    assert contents(export(back, tmp_path / "second", *options)) == contents(first)
    files = list(first.glob("*.safetensors"))
    assert (len(files) == 1) == (size == "5GB")
    assert {path.stat().st_mode for path in files} == {(first / "config.json").stat().st_mode}

    found = open_checkpoint(back)
    stored = found.tensors("model")
    for name, weight in TNL(config).to(getattr(torch, dtype)).state_dict().items():
        wanted = weights[name].to(weight.dtype).float().view(torch.int32)
        assert torch.equal(stored[name].view(torch.int32), wanted), name
    original = open_checkpoint(checkpoint).state()
    assert all(found.state()[key] == original[key] for key in ("family", "model", "tokenizer"))


def test_a_checkpoint_without_a_tokenizer_goes_through(tmp_path, transformers):
    checkpoint = checkpoint_of(tmp_path / "checkpoint", tokenizer=None)
    first = export(checkpoint, tmp_path / "first")
    assert not (first / "tokenizer.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(first)
    assert model.generate(torch.tensor([[1]]), max_new_tokens=3, do_sample=False).shape == (1, 4)
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
    assert found.state()["model"] == original.state()["model"]
    specs = [each.state()["tokenizer"] for each in (found, original)]
    for spec in specs:
        # What would add tokens to a text does not travel.
        spec.get("tokenizer", {})["post_processor"] = None
    assert specs[0] == specs[1]
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


@pytest.mark.parametrize(
    ("dtype", "kind", "files"),
    [
        (torch.bfloat16, "safetensors", 1),
        (torch.float32, "safetensors", 3),
        (torch.float16, "bin", 1),
        (torch.bfloat16, "bin", 3),
    ],
)
def test_released_weights_come_in_to_the_bit(dtype, kind, files, tmp_path):
    tensors = write_released(tmp_path / "released", dtype, kind, files)
    found = open_checkpoint(bring_in(tmp_path / "released", tmp_path / "out"))
    config = dataclasses.replace(LINEAR, pad_token_id=0)
    assert found.state()["model"] == json.loads(json.dumps(dataclasses.asdict(config)))
    back = to_released(found.tensors("model"), config)
    for name, tensor in tensors.items():
        assert torch.equal(back[name].to(dtype).view(torch.uint8), tensor.view(torch.uint8)), name


def test_export_refuses_what_it_cannot_do(tmp_path, capsys):
    checkpoint = checkpoint_of(tmp_path / "checkpoint")
    other = checkpoint_of(tmp_path / "other", weights=weights_of(CONFIGS["learned"]))
    damaged = checkpoint_of(tmp_path / "damaged")
    truncate(damaged / "step-00000004" / "model.safetensors")
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
def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch, failure):
    checkpoint = checkpoint_of(tmp_path / "checkpoint")
    folder = export(checkpoint, tmp_path / "hf")
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
        convert.import_folder(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "hf"]


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
