"""Released checkpoints: names, layouts, and the same logits as an independent forward."""

import dataclasses

import pytest
import torch

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.convert import config_from_released, from_released, to_released

CONFIG = TNLConfig(vocab_size=40, dim=24, num_layers=3, num_heads=3, glu_dim=36)


def released_weights(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d, g = config.dim, config.glu_dim

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {"model.embed_tokens.weight": draw(config.vocab_size, d)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for i in range(config.num_layers):
        mixers = f"model.layers.{i}."
        weights[mixers + "token_mixer.qkvu_proj.weight"] = draw(4 * d, d)
        weights[mixers + "token_mixer.out_proj.weight"] = draw(d, d)
        if i in config.lrpe_layers:
            theta = draw(config.num_heads, 1, config.head_dim).float()
            weights[mixers + "token_mixer.lrpe.theta"] = theta
        weights[mixers + "channel_mixer.l1.weight"] = draw(g, d)
        weights[mixers + "channel_mixer.l2.weight"] = draw(g, d)
        weights[mixers + "channel_mixer.l3.weight"] = draw(d, g)
    return weights


def norm(x):
    return x / (x.pow(2).mean() + 1e-6) ** 0.5


def released_forward(tokens, weights, config):
    """The released model for one sequence, token by token, from the specification alone."""
    embedding, heads = weights["model.embed_tokens.weight"], config.num_heads
    # ALiBi slopes 2^(-8 i / n) of 3 heads: those of n = 2, then every second of those of n = 4.
    slopes = [2 ** (-8 * 1 / 2), 2 ** (-8 * 2 / 2), 2 ** (-8 * 1 / 4)]
    states = [0.0] * config.num_layers
    logits = []
    for position, token in enumerate(tokens.tolist()):
        h = embedding[token] * config.dim**0.5
        for i in range(config.num_layers):
            get = lambda name, i=i: weights[f"model.layers.{i}.{name}"]  # noqa: E731
            q, k, v, u = (get("token_mixer.qkvu_proj.weight") @ norm(h)).split(config.dim)
            q, k, v = (x.reshape(heads, -1) for x in (q, k, v))
            q, k = q * torch.sigmoid(q), k * torch.sigmoid(k)
            if i in config.lrpe_layers:
                angle = get("token_mixer.lrpe.theta")[:, 0].double() * position
                q, k = (torch.cat([x * angle.cos(), x * angle.sin()], 1) for x in (q, k))
            factor = 1 - i / (config.num_layers - 1) + 1e-5
            rate = torch.tensor(slopes, dtype=torch.float32) * factor
            update = k[:, :, None] * v[:, None, :]
            states[i] = (-rate.double()).exp()[:, None, None] * states[i] + update
            o = (q[:, :, None] * states[i]).sum(1).reshape(-1)
            h = h + get("token_mixer.out_proj.weight") @ (u * norm(o))
            x = norm(h)
            x = (get("channel_mixer.l1.weight") @ x) * (get("channel_mixer.l2.weight") @ x)
            h = h + get("channel_mixer.l3.weight") @ x
        logits.append(weights["lm_head.weight"] @ norm(h))
    return torch.stack(logits)


@pytest.mark.parametrize("lrpe_layers", [(0,), (), (0, 2)])
def test_logits_equal_those_of_the_released_model(lrpe_layers):
    config = TNLConfig(**{**vars(CONFIG), "lrpe_layers": lrpe_layers})
    weights = released_weights(config)
    model = TNL(config).double()
    model.load_state_dict(from_released(weights, config))
    tokens = torch.randint(40, (2, 70), generator=torch.Generator().manual_seed(1))
    logits = model(tokens)
    expected = torch.stack([released_forward(row, weights, config) for row in tokens])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


def test_round_trip_is_exact():
    weights = released_weights(CONFIG)
    back = to_released(from_released(weights, CONFIG), CONFIG)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    model = TNL(CONFIG)
    again = from_released(to_released(model.state_dict(), CONFIG), CONFIG)
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_head_may_be_left_out_but_not_differ():
    weights = released_weights(CONFIG)
    del weights["lm_head.weight"]
    assert from_released(weights, CONFIG).keys() == TNL(CONFIG).state_dict().keys()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match="one tied matrix"):
        from_released(weights, CONFIG)


def test_bfloat16_rates_become_float32():
    weights = {name: tensor.bfloat16() for name, tensor in released_weights(CONFIG).items()}
    converted = from_released(weights, CONFIG)
    assert converted["blocks.0.token_mixer.lrpe.theta"].dtype == torch.float32
    assert converted["embedding.weight"].dtype == torch.bfloat16


def test_all_bad_keys_are_named_at_once():
    weights = released_weights(CONFIG)
    del weights["model.layers.1.token_mixer.out_proj.weight"]
    weights["model.layers.7.channel_mixer.l1.weight"] = torch.zeros(1)
    weights["model.layers.2.channel_mixer.l3.weight"] = torch.zeros(36, 24)
    with pytest.raises(ValueError) as error:
        from_released(weights, CONFIG)
    for part in (
        "missing: model.layers.1.token_mixer.out_proj.weight",
        "unexpected: model.layers.7.channel_mixer.l1.weight",
        "model.layers.2.channel_mixer.l3.weight (36, 24), expected (24, 36)",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="blocks.0.extra"):
        to_released({**TNL(CONFIG).state_dict(), "blocks.0.extra": torch.zeros(1)}, CONFIG)


def test_a_learned_decay_does_not_convert():
    config = dataclasses.replace(CONFIG, decay="learned")
    for convert in (from_released, to_released):
        with pytest.raises(ValueError, match=r"decay is 'learned', but that of .* is fixed"):
            convert(TNL(config).state_dict(), config)


def test_config_of_the_released_1b():
    values = {
        "decoder_embed_dim": 2048,
        "decoder_layers": 16,
        "decoder_attention_heads": 16,
        "hidden_dim": 2048,
        "glu_dim": 5632,
        "vocab_size": 64000,
        "linear_act_fun": "swish",
        "linear_use_lrpe_list": [1] + 15 * [0],
        "norm_type": "simplermsnorm",
        "no_scale_embedding": False,
        "bias": False,
        "init_std": 0.02,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    assert config_from_released(values) == TNLConfig.preset("1b", pad_token_id=0)
    plain = config_from_released({**values, "glu_dim": -1, "linear_use_lrpe_list": []})
    assert (plain.glu_dim, plain.lrpe_layers) == (2048, ())


@pytest.mark.parametrize(
    "variant",
    [
        {"bias": True},
        {"hidden_dim": 512},
        {"gate_dim": 16},
        {"linear_act_fun": "1+elu"},
        {"norm_type": "layernorm"},
        {"tie_word_embeddings": False},
    ],
)
def test_unsupported_variants_are_refused_by_name(variant):
    (name,) = variant
    with pytest.raises(ValueError, match=name):
        config_from_released(variant)
