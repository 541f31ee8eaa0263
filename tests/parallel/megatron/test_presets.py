"""Megatron models of published shapes compute what the published code does.

For MiniMax that is the class of transformers. Ling's code is in no installable library, so there
it is ling_reference.py, written from its definitions.
"""

import math
import re

import pytest
import torch

from tests.parallel.megatron import ling_reference
from tests.parallel.megatron.published import (
    LING_2_0,
    LING_2_6,
    random_weights,
    write_folder,
)

pytest.importorskip("megatron.core")
from parallel.megatron import hf_layout, hf_weights, presets  # noqa: E402
from tests.parallel.megatron.test_hf_weights import read_folder  # noqa: E402

slow = pytest.mark.slow
TOKENS = torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(5))


def error(seen, expected):
    return ((seen.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=[LING_2_0, LING_2_6], ids=["2.0", "2.6"])
def ling(request, tmp_path_factory):
    """(config, float64 weights, folder, checkpoint)."""
    folder = tmp_path_factory.mktemp("ling")
    weights = random_weights(request.param)
    source = write_folder(folder / "published", request.param, weights)
    hf_weights.import_folder(source, folder / "megatron")
    weights = {name: x.double() for name, x in weights.items()}
    return request.param, weights, source, folder / "megatron"


def test_ling_has_the_logits_and_the_attention_of_the_definition(megatron, ling):
    """Attention layers at the beginning, in the middle and at the end, each by itself."""
    cfg, weights, source, checkpoint = ling
    logits, attention = megatron.run("preset_cases.outputs", (1, 1), source, checkpoint, TOKENS)[0]
    expected = ling_reference.logits(weights, cfg, TOKENS)
    assert len(logits) == len(expected) == 1 + cfg.get("num_nextn_predict_layers", 0)
    errors = [error(*pair) for pair in zip(logits, expected, strict=True)]
    assert max(errors) < 4e-6, errors
    assert sorted(attention) == list(range(cfg["num_hidden_layers"]))
    for layer, (hidden, output) in attention.items():
        hidden = hidden.transpose(0, 1).double()
        by_definition = ling_reference.attention(weights, cfg, layer, hidden)
        assert error(output.transpose(0, 1), by_definition) < 2e-6, layer


# Tensor, context, pipeline and expert parallel sizes.
@pytest.mark.parametrize(
    "sizes", [(2, 1), (2, 1, 2), (1, 1, 1, 2), pytest.param((2, 1, 1, 2), marks=slow)]
)
def test_a_checkpoint_loads_at_other_parallel_sizes_and_exports_unchanged(
    megatron, ling, sizes, tmp_path
):
    cfg, weights, source, checkpoint = ling
    if sizes == (2, 1) and cfg is LING_2_0:
        sizes = (2, 1, 2)
    megatron.run("preset_cases.reshard", sizes, source, checkpoint, tmp_path / "saved")
    hf_weights.export_checkpoint(tmp_path / "saved", tmp_path / "back", like=source)
    back = read_folder(tmp_path / "back")
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        assert torch.equal(back[name].double(), x), name


@pytest.fixture(scope="module")
def minimax(tmp_path_factory):
    """(model of transformers in float64, its folder, checkpoint)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.MiniMaxConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        # Its attention is computed block by block; the last one is shorter.
        block_size=8,
        linear_attn_alpha_factor=1.5,
        full_attn_alpha_factor=1.25,
        mlp_alpha_factor=1.75,
        full_attn_beta_factor=0.75,
        initializer_range=0.2,
    )
    model = transformers.MiniMaxForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("minimax")
    model.save_pretrained(folder / "published")
    hf_weights.import_folder(folder / "published", folder / "megatron")
    # The others take no float64.
    model.set_experts_implementation("eager")
    return model.double(), folder / "published", folder / "megatron"


def test_minimax_has_the_logits_and_the_attention_of_transformers(megatron, minimax):
    model, source, checkpoint = minimax
    logits, attention = megatron.run("preset_cases.outputs", (1, 1), source, checkpoint, TOKENS)[0]
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert error(logits[0], expected) < 4e-6
        positions = model.model.rotary_emb(expected, torch.arange(TOKENS.shape[1])[None])
        for layer, (hidden, output) in attention.items():
            hidden = hidden.transpose(0, 1).double()
            by_class = model.model.layers[layer].self_attn(hidden, positions, None)[0]
            assert error(output.transpose(0, 1), by_class) < 2e-6, layer


def test_transformers_reads_an_exported_minimax(minimax, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, _, checkpoint = minimax
    hf_weights.export_checkpoint(checkpoint, tmp_path / "back")
    back = transformers.MiniMaxForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    weights = model.state_dict()
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        torch.testing.assert_close(back[name].double(), x, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "build, parameters",
    [
        (presets.ling_mini_linear_2_0, 16.5e9),
        (presets.ling_2_6_flash, 107e9),
        (presets.ling_2_5_1t, 1.03e12),
        (presets.minimax_01, 456e9),
    ],
    ids=["mini", "flash", "1t", "minimax"],
)
def test_presets_have_the_published_sizes(build, parameters):
    preset = build(megatron=dict(tensor_model_parallel_size=2))
    shapes = [shape for entry in preset.model.entries() for _, shape in entry.parts]
    assert sum(math.prod(shape) for shape in shapes) == pytest.approx(parameters, rel=0.03)
    assert preset.config.tensor_model_parallel_size == 2
    hf = preset.model.hf
    assert preset.pattern.count("S") * hf.get("layer_group_size", 8) == hf["num_hidden_layers"]


def test_rotary_positions_may_be_named_as_unscaled():
    names = dict(rope_scaling={"rope_type": "default"}, rope_parameters={"rope_theta": 5e5})
    preset = presets.from_hf_config({**LING_2_6, **names})
    assert preset.model.hf["rope_theta"] == 5e5


def test_a_preset_may_have_fewer_layers_than_dense_ones():
    assert presets.ling_2_5_1t(num_hidden_layers=2).config.moe_layer_freq == [0, 0]


def test_chunks_of_a_virtual_pipeline_have_their_own_ends(megatron):
    chunks = megatron.run("preset_cases.ends_of_virtual_chunks", (1, 1), LING_2_0)[0]
    assert chunks == [(True, False), (False, True)]


def test_transformer_engine_norms_latents_in_projections():
    for latents, norm in (("q", "q_layernorm"), ("kv", "kv_layernorm")):
        alone = f"decoder.layers.3.self_attention.{norm}.weight"
        fused = f"decoder.layers.3.self_attention.linear_{latents}_up_proj.layer_norm_weight"
        assert hf_layout.other_name(alone) == fused and hf_layout.other_name(fused) == alone


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(num_layers=4), "'num_layers' is no field"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0: it must be a whole number"),
        (dict(num_key_value_heads=3), "num_key_value_heads (3) must divide it"),
        (dict(num_nextn_predict_layers=1), "without MLA"),
    ],
    ids=["name", "size", "heads", "mtp"],
)
def test_overrides_that_make_no_model_are_refused(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        presets.ling_mini_linear_2_0(**overrides)
