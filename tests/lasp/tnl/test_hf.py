"""TNL as a transformers model: what it loads, generates and refuses."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.convert import hf_files

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("lasp.tnl.hf")

LINEAR = TNLConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)
CONFIGS = {
    "linear": LINEAR,
    "learned": dataclasses.replace(LINEAR, decay="learned"),
    "hybrid": dataclasses.replace(LINEAR, layer_types="LSL", num_key_value_heads=2),
    "variant": dataclasses.replace(LINEAR, norm="layer", output_gate=False, decay="none"),
}
POSITIONS = dataclasses.replace(LINEAR, position_embeddings=32, lrpe_layers=())
ROOT = Path(__file__).parents[3]
WITHOUT_PADDING = [CONFIGS["linear"], CONFIGS["learned"]]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = TNL(config)
    for name, weight in model.named_parameters():
        if "decay_proj" in name:
            torch.nn.init.normal_(weight)
    return model.to(dtype).eval()


def write_folder(folder, model):
    """A folder as launch/convert.py writes it."""
    folder.mkdir()
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    for name, text in hf_files(model.config, dtype).items():
        (folder / name).write_text(text)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def wrapped(config):
    """The transformers model and the TNL inside it, in float64."""
    model = hf.TNLForCausalLM(hf.TNLPretrainedConfig(tnl=dataclasses.asdict(config)))
    model.model.load_state_dict(model_of(config).state_dict())
    model = model.double().eval()
    return model, model.model


def prompt_of(batch, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(50, (batch, length), generator=generator)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_loads_with_the_same_logits(config, dtype, tmp_path):
    model = model_of(config, dtype)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        write_folder(tmp_path / "folder", model), output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = prompt_of(2, 70)
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens))
    dtypes = {name: value.dtype for name, value in loaded.model.state_dict().items()}
    assert dtypes == {name: value.dtype for name, value in model.state_dict().items()}
    assert dtypes["blocks.0.token_mixer.lrpe.theta"] == torch.float32


def test_loading_in_bfloat16_is_casting_the_model(tmp_path):
    model = model_of(LINEAR)
    loaded = load(write_folder(tmp_path / "folder", model), dtype=torch.bfloat16)
    tokens = prompt_of(2, 20)
    assert torch.equal(loaded(tokens).logits, model.bfloat16()(tokens))


@every_config
def test_saving_writes_the_folder_again(config, tmp_path):
    folder = write_folder(tmp_path / "folder", model_of(config))
    load(folder).save_pretrained(tmp_path / "saved")
    saved, first = (load_file(each / "model.safetensors") for each in (tmp_path / "saved", folder))
    assert saved.keys() == first.keys()
    assert all(torch.equal(saved[name], first[name]) for name in first)
    assert load(tmp_path / "saved").model.config == config


@every_config
def test_a_new_model_starts_as_a_tnl(config):
    values = hf.TNLPretrainedConfig(tnl=dataclasses.asdict(config))
    model = transformers.AutoModelForCausalLM.from_config(values).model
    fresh = TNL(config)
    for block, expected in zip(model.blocks, fresh.blocks, strict=True):
        mixer, wanted = block.token_mixer, expected.token_mixer
        for name, value in [*wanted.named_buffers(), *wanted.named_parameters()]:
            if "decay" in name or "theta" in name:
                assert torch.equal(
                    dict(mixer.state_dict(), **dict(mixer.named_buffers()))[name], value
                )
    assert model.embedding.weight.std().item() == pytest.approx(config.init_std, rel=0.1)


@every_config
@torch.no_grad()
def test_greedy_generation_is_that_of_the_model(config):
    model, inner = wrapped(config)
    tokens = prompt_of(2, 9)
    expected = inner.generate(tokens, 12)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        out = model.generate(tokens, max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(out, expected), options


@every_config
def test_each_row_stops_at_its_end_of_text(config):
    model, inner = wrapped(config)
    tokens = prompt_of(3, 9)
    end = inner.generate(tokens, 20)[0, 14].item()
    expected = inner.generate(tokens, 20, eos_token_id=end)
    out = model.generate(
        tokens, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    assert torch.equal(out, expected)
    assert (expected[0, 15:] == end).all()


@every_config
def test_beam_search_and_samples_follow_the_right_states(config):
    model, _ = wrapped(config)
    tokens = prompt_of(2, 9)
    kinds = {
        "beams": dict(num_beams=4, num_return_sequences=2, do_sample=False),
        "samples": dict(do_sample=True, num_return_sequences=3, top_k=20),
    }
    for kind, options in kinds.items():
        outs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            outs.append(model.generate(tokens, max_new_tokens=12, use_cache=use_cache, **options))
        assert torch.equal(*outs), kind
    assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("config", WITHOUT_PADDING, ids=["linear", "learned"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}], ids=["at once", "in chunks"])
def test_left_padding_changes_nothing(config, options):
    model, _ = wrapped(config)
    tokens = prompt_of(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :7] = 0
    options |= dict(
        max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    together = model.generate(tokens, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, 7)):
        alone = model.generate(tokens[row : row + 1, start:], **options)
        assert torch.equal(together.sequences[row, start:], alone.sequences[0])
        logits, expected = (torch.stack(each.logits) for each in (together, alone))
        torch.testing.assert_close(logits[:, row], expected[:, 0])


def test_position_embeddings_take_a_mask_without_padding():
    model, tnl = wrapped(POSITIONS)
    tokens = prompt_of(2, 9)
    found = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    assert torch.equal(found, tnl(tokens))


def test_right_padding_changes_no_logits_before_it():
    model, inner = wrapped(LINEAR)
    tokens = prompt_of(1, 12)
    mask = (torch.arange(12) < 8)[None]
    padded = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded[:, :8], inner(tokens[:, :8]))


@every_config
def test_a_cache_continues_where_it_stopped(config):
    model, inner = wrapped(config)
    tokens = prompt_of(2, 9)
    first = model.generate(tokens, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache, so_far = first.cache, first.sequences
    assert cache.get_seq_length() == so_far.shape[1] - 1
    out = model.generate(so_far, cache=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, inner.generate(tokens, 11))


def test_the_cache_does_not_grow():
    model, _ = wrapped(LINEAR)
    sizes = []
    for length in (3, 100):
        state = model(prompt_of(1, length), use_cache=True).cache.state
        sizes.append([layer.shape for layer in state.layers])
    assert sizes[0] == sizes[1]


@every_config
def test_labels_give_the_loss_of_the_next_tokens(config):
    model, inner = wrapped(config)
    tokens = prompt_of(2, 30)
    labels = tokens.clone()
    labels[0, :10] = -100
    out = model.train()(tokens, labels=labels)
    assert out.cache is None
    logits = inner(tokens).float()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    summed = model(tokens, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(summed, expected * (labels[:, 1:] >= 0).sum() / 10)


def test_logits_of_the_last_tokens_only():
    model, inner = wrapped(LINEAR)
    tokens = prompt_of(2, 9)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, inner(tokens)[:, -2:])


def test_more_tokens_may_be_added():
    model, _ = wrapped(LINEAR)
    model.resize_token_embeddings(60, mean_resizing=False)
    assert (model.config.vocab_size, model.config.tnl["vocab_size"]) == (60, 60)
    assert model(prompt_of(1, 4)).logits.shape[-1] == 60


def generate(model, **options):
    return model.generate(prompt_of(2, 5), max_new_tokens=2, **options)


BAD = {
    "padding in a hybrid": (
        "hybrid",
        lambda model: model(prompt_of(2, 5), attention_mask=torch.eye(2, 5)),
        "softmax layers do not support padding",
    ),
    "padding with position embeddings": (
        "positions",
        lambda model: model(prompt_of(2, 5), attention_mask=torch.eye(2, 5)),
        "position embeddings do not support padding",
    ),
    "another cache": (
        "linear",
        lambda model: generate(model, cache=transformers.DynamicCache()),
        "cache is a DynamicCache",
    ),
    "a cache by name": (
        "linear",
        lambda model: generate(model, cache_implementation="static"),
        "cache_implementation is 'static'",
    ),
    "outputs of layers": (
        "linear",
        lambda model: model(prompt_of(2, 5), output_hidden_states=True),
        "output_hidden_states: a TNL takes",
    ),
    "embeddings": (
        "linear",
        lambda model: generate(model, inputs_embeds=torch.zeros(2, 3, 32)),
        "inputs_embeds: a TNL takes input_ids",
    ),
    "the past under an old name": (
        "linear",
        lambda model: model(prompt_of(2, 5), past_key_values=hf.TNLCache(LINEAR)),
        "its past is `cache`",
    ),
    "taking tokens back": (
        "linear",
        lambda model: model(prompt_of(2, 5), use_cache=True).cache.crop(-1),
        "cannot forget its last tokens",
    ),
}


@pytest.mark.parametrize(("kind", "call", "message"), BAD.values(), ids=BAD)
def test_what_a_tnl_cannot_do_is_said(kind, call, message):
    configs = CONFIGS | {"positions": POSITIONS}
    model, _ = wrapped(configs[kind])
    with pytest.raises(ValueError, match=message):
        call(model)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lasp.tnl.hf")
    with pytest.raises(ImportError, match=r"pip install 'lasp\[hf\]'"):
        importlib.import_module("lasp.tnl.hf")


def test_the_folder_itself_names_the_class(tmp_path, monkeypatch):
    dynamic = transformers.dynamic_module_utils
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    folder = write_folder(tmp_path / "folder", model_of(LINEAR))
    for name in json.loads((folder / "config.json").read_text())["auto_map"].values():
        found = dynamic.get_class_from_dynamic_module(name, str(folder))
        assert found is getattr(hf, name.split(".")[1])


WITHOUT_IMPORT = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
out = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=8, do_sample=False)
torch.save(out, sys.argv[2])
"""


@pytest.mark.slow
def test_trusting_the_folder_takes_no_import_of_lasp(tmp_path):
    model = model_of(LINEAR)
    folder, out = write_folder(tmp_path / "folder", model), tmp_path / "out.pt"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, str(folder), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(out), model.generate(torch.tensor([[3, 1, 4]]), 8))
