"""The softmax layers of a hybrid: mixer, cache, config."""

import pytest
import torch
import torch.nn.functional as F

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig, TNLState
from lasp.tnl.convert import to_released
from lasp.tnl.layers import GatedLinearAttention, SoftmaxAttention
from tests.lasp.tnl.equations import rope

CONFIG = TNLConfig(
    vocab_size=50,
    dim=32,
    num_layers=4,
    num_heads=4,
    glu_dim=48,
    init_std=0.2,
    layer_types="LS",
    num_key_value_heads=2,
)


def make(config=CONFIG, dtype=torch.float64):
    torch.manual_seed(0)
    return TNL(config).to(dtype)


def test_mixer_is_attention_token_by_token():
    """Each query against each earlier key of its group."""
    mixer = make().blocks[1].token_mixer
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    y, _ = mixer(x, SequenceShard.whole(5))
    q = rope((x @ mixer.q_proj.weight.T).view(1, 5, 4, 8), torch.arange(5), 10000.0)
    k, v = (x @ mixer.kv_proj.weight.T).view(1, 5, 2, 2, 8).unbind(3)
    k = rope(k, torch.arange(5), 10000.0)
    rows = []
    for t in range(5):
        heads = []
        for h in range(4):
            scores = [q[0, t, h] @ k[0, s, h // 2] / 8**0.5 for s in range(t + 1)]
            heads.append(torch.stack(scores).softmax(0) @ v[0, : t + 1, h // 2])
        rows.append(torch.cat(heads))
    torch.testing.assert_close(y[0], torch.stack(rows) @ mixer.out_proj.weight.T)


def zigzag(group):
    """(this rank's positions, the mixer's output, its gradient, the keys and values it returns)."""
    shard = SequenceShard.split(22, group, layout="zigzag")
    x = torch.randn(2, 22, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = shard.take(x).requires_grad_()
    y, past = make().blocks[1].token_mixer(x, shard, shard.start, return_state=True)
    y.square().sum().backward()
    return shard.positions(), y.detach(), x.grad, past


def test_zigzag_shards(pool):
    """Positions and keys come from two chunks of the sequence."""
    x = torch.randn(2, 22, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    y, past = make().blocks[1].token_mixer(x, SequenceShard.whole(22), return_state=True)
    y.square().sum().backward()
    for here, y_here, grad, past_here in pool.run(zigzag, size=3):
        torch.testing.assert_close(y_here, y[:, here])
        torch.testing.assert_close(grad, x.grad[:, here])
        torch.testing.assert_close(past_here, past[:, :, : here.max() + 1])


@pytest.mark.parametrize(
    ("kinds", "expected"), [("L", "LLLL"), ("LS", "LSLS"), ("SLLS", "SLLS"), ("S", "SSSS")]
)
def test_layer_types_repeat(kinds, expected):
    config = TNLConfig.preset("tiny", layer_types=kinds, num_key_value_heads=2)
    model = TNL(config)
    mixers = {"L": GatedLinearAttention, "S": SoftmaxAttention}
    assert [type(block.token_mixer) for block in model.blocks] == [
        mixers[kind] for kind in expected
    ]
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    assert any(name.endswith("theta") for name in model.state_dict()) == (expected[0] == "L")


def test_flops_of_softmax_layers_by_hand():
    config = TNLConfig(vocab_size=10, dim=4, num_layers=2, num_heads=2, glu_dim=6, layer_types="SL")
    matrices = 10 * 4 + (4 + 5) * 16 + 2 * 3 * 4 * 6
    linear = 2 * (2 * 2 * 2 + 2 * 2 * 2)
    # Five tokens attend to 15 keys in all: a score and a value each, two heads of D = 2.
    softmax = 15 * 2 * (2 * 2 + 2 * 2) / 5
    assert config.flops_per_token(training=False) == 2 * matrices + linear
    assert config.flops_per_token(training=False, seq_len=5) == 2 * matrices + linear + softmax
    assert config.flops_per_token(seq_len=5) == 3 * (2 * matrices + linear + softmax)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@torch.no_grad()
def test_decoding_gives_the_logits_of_one_pass(chunk):
    model = make()
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
    states, parts = None, []
    for part in tokens.split(chunk, dim=1):
        logits, states = model(part, states=states, return_states=True)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))
    assert states.layers[1].shape == (2, 2, 40, 2, 8)


@torch.no_grad()
def test_a_state_can_be_continued_twice():
    model, tokens = make(), torch.arange(12).view(1, 12)
    _, state = model(tokens, return_states=True)
    first, _ = model(tokens[:, :1], states=state, return_states=True)
    model(tokens[:, 5:9], states=state, return_states=True)
    again, _ = model(tokens[:, :1], states=state, return_states=True)
    assert torch.equal(first, again)


def test_gradients_reach_every_weight():
    model = make()
    tokens = torch.arange(20).view(1, 20)
    F.cross_entropy(model(tokens)[0], tokens[0].flip(0)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": "LX"}, "layer_types is 'LX'"),
        ({"layer_types": ""}, "layer_types is ''"),
        ({"layer_types": "LLS"}, r"a divisor of that \(4\)"),
        ({"num_key_value_heads": 3}, "divisor of num_heads 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"layer_types": "S", "dim": 4}, "even number"),
        ({"rope_base": 0.0}, "rope_base"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TNLConfig.preset("tiny", **fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_mask": torch.ones(1, 4)}, "softmax layers do not support padding"),
        ({"cu_seqlens": torch.tensor([0, 4]), "return_states": True}, "together with states"),
        ({"states": TNLState([torch.zeros(2, 1, 3, 2, 8)] * 4, 5)}, "holds keys of 3 tokens"),
    ],
)
def test_unsupported_calls_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(1, 4, dtype=torch.int64), **options)


def test_a_hybrid_does_not_convert_to_a_released_checkpoint():
    with pytest.raises(ValueError, match="released models have no softmax"):
        to_released(make().state_dict(), CONFIG)
