"""The full model: causality, chunked reading, packing, padding, dtypes, initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig, TNLState

# init_std 0.2: with 0.02 the small model's blocks would hardly change the embedding.
CONFIG = TNLConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)


def make(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = TNLConfig(**{**vars(CONFIG), **overrides})
    return TNL(config).to(dtype)


def tokens_of(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(50, (batch, length), generator=generator)


def test_hidden_times_head_weight_is_logits():
    model, tokens = make(), tokens_of(2, 20)
    hidden = model(tokens, return_hidden=True)
    assert hidden.shape == (2, 20, 32)
    torch.testing.assert_close(hidden @ model.head_weight.T, model(tokens))
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 20), rtol=1e-3, atol=0)
    assert model.head_weight is model.embedding.weight


def test_causal():
    model, tokens = make(), tokens_of(1, 40)
    changed = tokens.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 50
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :25], b[:, :25], rtol=0, atol=1e-6)
    assert (a[:, 25:] - b[:, 25:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(
    "boundaries", [(0, 100), (0, 1, 64, 100), (0, 63, 64, 65, 100), (0, 0, 50, 100)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_reading_in_chunks_is_reading_at_once(boundaries, dtype, tolerance):
    model, tokens = make(dtype), tokens_of(2, 100)
    expected, final = model(tokens, return_states=True)
    states, parts = None, []
    for start, stop in zip(boundaries, boundaries[1:], strict=False):
        logits, states = model(tokens[:, start:stop], states=states, return_states=True)
        parts.append(logits)
    error = (torch.cat(parts, 1) - expected).abs().max() / expected.abs().max()
    assert error < tolerance
    assert states.position == final.position == 100
    for layer, (a, b) in enumerate(zip(states.layers, final.layers, strict=True)):
        assert a.shape == (2, 4, CONFIG.key_dim(layer), 8)
        assert (a - b).abs().max() / b.abs().max() < tolerance


def test_shard_offset_is_the_lrpe_position():
    """Reading from an empty state at another position shifts LRPE and nothing else."""
    model, tokens = make(), tokens_of(1, 10)
    fresh = [torch.zeros(1, 4, CONFIG.key_dim(i), 8) for i in range(3)]
    for position in (0, 1000):
        state = TNLState([x.clone() for x in fresh], position)
        logits = model(tokens, states=state)
        # Positions are relative: with an empty state, a shift changes only rounding.
        torch.testing.assert_close(logits, model(tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer_types", ["L", "LSL"])
def test_packed_documents_equal_separate_ones(layer_types):
    """Their positions differ, but only differences of positions matter."""
    model, tokens = make(torch.float64, layer_types=layer_types), tokens_of(1, 60)
    packed = model(tokens, cu_seqlens=torch.tensor([0, 23, 23, 60], dtype=torch.int32))
    separate = torch.cat([model(tokens[:, :23]), model(tokens[:, 23:])], 1)
    torch.testing.assert_close(packed, separate)


def test_left_padding_has_no_effect():
    model, tokens = make(torch.float64), tokens_of(2, 30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :12] = False
    logits = model(tokens, padding_mask=mask)
    torch.testing.assert_close(logits[:1], model(tokens[:1]))
    torch.testing.assert_close(logits[1:, 12:], model(tokens[1:, 12:]))


def test_empty_sequence():
    model = make()
    logits = model(tokens_of(2, 0))
    assert logits.shape == (2, 0, 50)
    logits.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_bfloat16_error_is_that_of_bfloat16(mode):
    model, tokens = make(), tokens_of(2, 100)
    expected = make(torch.float64)(tokens)
    if mode == "pure":
        logits = model.bfloat16()(tokens)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].token_mixer.lrpe.theta.grad.dtype == torch.float32
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03


def test_initial_weights():
    model = make(dim=256, num_heads=8, init_std=0.02, pad_token_id=3)
    for name, weight in model.named_parameters():
        if not name.endswith("theta"):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(weight.mean().item()) < 0.001, name
    assert (model.embedding.weight[3] == 0).all()
    assert (make().embedding.weight != 0).all(-1).all()


def test_meta_model_materialises():
    expected = make()
    with torch.device("meta"):
        model = TNL(CONFIG)
    model.to_empty(device="cpu")
    for each in (expected, model):
        torch.manual_seed(0)
        each.init_weights()
    assert torch.equal(model(tokens_of(1, 9)), expected(tokens_of(1, 9)))


@pytest.mark.parametrize("layer_types", ["L", "LLS"])
def test_meta_device_gives_shapes(layer_types):
    with torch.device("meta"):
        model = TNL(TNLConfig(**{**vars(CONFIG), "layer_types": layer_types}))
        logits, states = model(torch.zeros(2, 9, dtype=torch.int64), return_states=True)
        logits.sum().backward()
    assert logits.shape == (2, 9, 50) and states.position == 9
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_state_dict_holds_parameters_only_and_round_trips():
    model, other = make(), TNL(CONFIG)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens_of(1, 9)), model(tokens_of(1, 9)))


def test_embedding_scale():
    tokens = tokens_of(1, 5)
    scaled, plain = make(num_layers=1), make(num_layers=1, scale_embedding=False)
    with torch.no_grad():
        plain.embedding.weight *= math.sqrt(32)
    hidden = [m(tokens, return_hidden=True) for m in (scaled, plain)]
    torch.testing.assert_close(*hidden)


@torch.no_grad()
def test_no_activation_variant_differs():
    tokens = tokens_of(1, 20)
    assert (make()(tokens) - make(activation="none")(tokens)).abs().max() > 1e-2


def test_training_lowers_the_loss():
    model = make(init_std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(64).remainder(7).expand(2, -1)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(50), rel=0.1)
    assert losses[-1] < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(5, dtype=torch.int64)), r"tokens\[None\]"),
        (lambda m: m(torch.zeros(1, 5)), "float32"),
        (lambda m: m(tokens_of(1, 5), SequenceShard.whole(6)), "5 tokens were given"),
        (lambda m: m(tokens_of(1, 5), padding_mask=torch.ones(1, 4)), "padding_mask"),
        (lambda m: m(tokens_of(1, 5), states=TNLState([], 0)), "0 layers and this model 3"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())
