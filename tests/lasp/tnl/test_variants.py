"""The variants of the paper's ablations against their equations, and what works with each."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.convert import from_released, to_released
from lasp.tnl.decoding import Decoder
from lasp.tnl.generation import prefill, stream
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.tnl import check_divides
from tests.lasp.tnl.equations import rope

CONFIG = TNLConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)
EVERYWHERE = (0, 1, 2)
VARIANTS = {
    "released": {},
    "lrpe_everywhere": dict(lrpe_layers=EVERYWHERE),
    "lrpe_only": dict(lrpe_layers=EVERYWHERE, decay="none"),
    "decay_only": dict(lrpe_layers=()),
    "absolute": dict(lrpe_layers=(), decay="none", position_embeddings=100),
    "per_head": dict(decay="per_head"),
    "no_gate": dict(output_gate=False),
    "rms": dict(norm="rms"),
    "layer": dict(norm="layer"),
    "no_activation": dict(activation="none"),
    "1+elu": dict(activation="1+elu"),
    "glu_silu": dict(glu_activation="silu"),
    "denominator": dict(activation="1+elu", denominator=True, output_gate=False, norm="layer"),
    "softmax": dict(layer_types="S", norm="rms", glu_activation="silu"),
}
CHANGED = {name: fields for name, fields in VARIANTS.items() if name != "released"}


def config_of(variant):
    return dataclasses.replace(CONFIG, **VARIANTS[variant])


def make(variant, dtype=torch.float64):
    """A model whose norms have left their start, if they have weights."""
    torch.manual_seed(0)
    model = TNL(config_of(variant))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return model.to(dtype)


def tokens_of(batch, length):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def normed(x, config, weights, name):
    if config.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    if config.norm == "srms":
        return x
    return x * weights[f"{name}.weight"] + (weights.get(f"{name}.bias", 0))


def activated(x, name):
    if name == "1+elu":
        return torch.where(x > 0, x + 1, x.exp())
    return x * torch.sigmoid(x) if name == "silu" else x


def heads(x, weight, parts):
    """x W^T as `parts` tensors [H, T, D]."""
    return (x @ weight.T).view(len(x), 4, parts, 8).permute(2, 1, 0, 3).unbind(0)


def linear_attention(x, config, weights, layer):
    parts = 4 if config.output_gate else 3
    q, k, v, *gate = heads(x, weights["qkvu_proj.weight"], parts)
    q, k = activated(q, config.activation), activated(k, config.activation)
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    if layer in config.lrpe_layers:
        # q_i . k_j = sum_d q_d k_d cos(theta_d (i - j))
        turns = (weights["lrpe.theta"].double()[:, :, None] * distance[:, :, None]).cos()
        scores = torch.einsum("hid,hjd,hijd->hij", q, k, turns)
    else:
        scores = q @ k.mT
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / 4) for h in range(4)], dtype=torch.float32)
    factor = {"fixed": 1 - layer / 2 + 1e-5, "per_head": 1.0, "none": 0.0}[config.decay]
    rates = (slopes * factor).double()
    scores = scores * torch.exp(-rates[:, None, None] * distance) * (distance >= 0)
    o = scores @ v
    if config.denominator:
        o = o / (scores.sum(-1, keepdim=True) + config.norm_eps)
        o = o.transpose(0, 1).flatten(1)
    else:
        o = normed(o.transpose(0, 1).flatten(1), config, weights, "norm")
    for u in gate:
        o = u.transpose(0, 1).flatten(1) * o
    return o @ weights["out_proj.weight"].T


def softmax_attention(x, config, weights):
    (q,) = heads(x, weights["q_proj.weight"], 1)
    k, v = heads(x, weights["kv_proj.weight"], 2)
    q, k = (
        rope(each.transpose(0, 1), torch.arange(len(x)), config.rope_base).transpose(0, 1)
        for each in (q, k)
    )
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ weights["out_proj.weight"].T


def equations(model, row):
    """Logits of one sequence, float64 [T, V], all pairs of tokens at once."""
    config, weights = model.config, dict(model.named_parameters())
    h = weights["embedding.weight"][row]
    if config.position_embeddings:
        h = h + weights["position_embedding.weight"][: len(row)]
    h = h * config.dim**0.5
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}."
        of = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
        mixer = {
            name.removeprefix("token_mixer."): w for name, w in of.items() if "token_mixer" in name
        }
        x = normed(h, config, of, "token_norm")
        if config.is_softmax(layer):
            h = h + softmax_attention(x, config, mixer)
        else:
            h = h + linear_attention(x, config, mixer, layer)
        x = normed(h, config, of, "channel_norm")
        w1, w2, w3 = (of[f"channel_mixer.w{i}.weight"].T for i in (1, 2, 3))
        h = h + (activated(x @ w1, config.glu_activation) * (x @ w2)) @ w3
    return normed(h, config, weights, "final_norm") @ weights["embedding.weight"].T


def loss_and_grads(logits, model, tokens):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_the_equations(variant):
    model, tokens = make(variant), tokens_of(2, 70)
    expected = torch.stack([equations(model, row) for row in tokens])
    logits = model(tokens)
    assert error(logits, expected) < 1e-7
    found, wanted = (loss_and_grads(each, model, tokens)[1] for each in (logits, expected))
    for (name, _), grad, truth in zip(model.named_parameters(), found, wanted, strict=True):
        # The gradient of LRPE rates is stored in float32.
        assert error(grad, truth) < (1e-5 if name.endswith("theta") else 1e-6), name


@torch.no_grad()
def test_every_variant_is_another_function():
    tokens = tokens_of(1, 70)
    torch.manual_seed(0)
    logits = {}
    for variant in VARIANTS:
        model = TNL(config_of(variant)).double()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                # Equal weights wherever shapes are equal.
                torch.manual_seed(module.weight.shape[0])
                torch.nn.init.normal_(module.weight, std=0.2)
        logits[variant] = model(tokens)
    for variant in CHANGED:
        if variant != "rms":
            assert error(logits[variant], logits["released"]) > 1e-3, variant
    # Its weights start at one.
    assert error(logits["rms"], logits["released"]) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decoding_gives_the_logits_of_one_pass(variant):
    model, tokens = make(variant), tokens_of(2, 60)
    expected = model(tokens)
    decoder, logits = Decoder(model, 2, context=60), []
    for rows, states in prefill(model, list(tokens[:, :40]), chunk=16):
        decoder.load(states, rows)
    for t in range(39, 60):
        decoder.tokens.copy_(tokens[:, t])
        decoder.step()
        logits.append(decoder.logits)
    assert error(torch.stack(logits, 1), expected[:, 39:]) < 1e-7


@pytest.mark.parametrize("variant", ["absolute", "denominator"])
def test_prompts_of_any_lengths_continue_as_alone(variant):
    model = make(variant)
    prompts = [tokens_of(1, length)[0] for length in (9, 1, 3, 20)]
    together = torch.stack(list(stream(model, prompts, 10)), 1)
    for prompt, new in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt[None], 10)[0, len(prompt) :], new)


def over_ranks(group, variant, layout):
    shard = SequenceShard.split(70, group, layout=layout)
    model, tokens = make(variant), tokens_of(2, 71)
    inputs, labels = shard.take(tokens[:, :-1]), shard.take(tokens[:, 1:])
    logits = model(inputs, shard)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for grad in grads:
        dist.all_reduce(grad, group=group)
    return shard.positions(), logits.detach(), grads


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("variant", ["absolute", "denominator", "lrpe_only", "layer"])
def test_ranks_compute_what_one_device_does(pool, variant, layout):
    model, tokens = make(variant), tokens_of(2, 71)
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for here, found, grads in pool.run(over_ranks, variant, layout, size=3):
        assert error(found, logits[:, here]) < 1e-7
        for (name, _), grad, truth in zip(model.named_parameters(), grads, wanted, strict=True):
            assert error(grad, truth) < (1e-5 if name.endswith("theta") else 1e-6), name


@pytest.mark.parametrize("variant", ["absolute", "denominator", "no_gate"])
def test_recomputed_blocks_have_the_same_gradients(variant):
    tokens, grads = tokens_of(2, 40), []
    for mode in ("none", "full", "selective"):
        model = make(variant)
        checkpoint_blocks(model.blocks, mode)
        grads.append(loss_and_grads(model(tokens), model, tokens)[1])
    assert all(
        torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_counted_and_weights_materialise_from_the_meta_device(variant):
    config = config_of(variant)
    with torch.device("meta"):
        model = TNL(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    model.to_empty(device="cpu")
    expected = TNL(config)
    for each in (model, expected):
        torch.manual_seed(0)
        each.init_weights()
    assert torch.equal(model(tokens_of(1, 9)), expected(tokens_of(1, 9)))


@pytest.mark.parametrize("variant", ["absolute", "denominator", "layer"])
@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_bfloat16_error_is_that_of_bfloat16(variant, mode):
    model, tokens = make(variant, torch.float32), tokens_of(2, 80)
    expected = make(variant)(tokens)
    if mode == "pure":
        logits = model.bfloat16()(tokens)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03


def test_what_position_embeddings_cannot_read_is_refused():
    model = make("absolute")
    with pytest.raises(ValueError, match="a sequence has 101 tokens and position_embeddings is 10"):
        model(tokens_of(1, 101))
    with pytest.raises(ValueError, match="pass documents as rows"):
        model(tokens_of(1, 9), cu_seqlens=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match="padding_mask is given"):
        model(tokens_of(1, 9), padding_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match=r"max_new_tokens 60 are too long: .* 110 tokens"):
        model.generate(tokens_of(1, 50), 60)


@pytest.mark.parametrize("variant", ["absolute", "rms", "layer"])
def test_tensor_parallelism_refuses_what_it_cannot_shard(variant):
    check_divides(config_of(variant), 1)
    with pytest.raises(ValueError, match='only models with norm "srms" and without position'):
        check_divides(config_of(variant), 2)


ARCHITECTURES = ["absolute", "no_gate", "rms", "1+elu", "glu_silu", "denominator"]


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_the_released_layout_of_weights_is_refused(variant):
    config = config_of(variant)
    for convert in (from_released, to_released):
        with pytest.raises(ValueError, match=r"the config has \{"):
            convert(TNL(config).state_dict(), config)


@pytest.mark.parametrize("name", ["norm", "glu_activation", "decay", "activation"])
def test_an_unknown_variant_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=rf"{name} is 'x': it must be \".*\" or \".*\"\."):
        dataclasses.replace(CONFIG, **{name: "x"})


def test_a_denominator_needs_positive_weights():
    with pytest.raises(ValueError, match='activation is "silu": only that of "1\\+elu"'):
        dataclasses.replace(CONFIG, denominator=True)
