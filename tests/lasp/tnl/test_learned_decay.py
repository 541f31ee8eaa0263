"""A learned decay: its formula and start, the model against the token loop, and over ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import lasp
from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.learned_decay import DecayProjection, fixed_decay, learned_decay
from parallel.activation_checkpoint import checkpoint_blocks

CONFIG = TNLConfig(
    vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2, decay="learned"
)
FIXED = dataclasses.replace(CONFIG, decay="fixed")
HEADS_AND_LAYERS = [(8, 24), (6, 3), (12, 5), (1, 1)]


def make(dtype=torch.float64, config=CONFIG):
    """A model as after some training: its decays differ from token to token."""
    torch.manual_seed(0)
    model = TNL(config)
    for module in model.modules():
        if isinstance(module, DecayProjection):
            torch.nn.init.normal_(module.weight, std=0.2)
            torch.nn.init.normal_(module.bias)
    return model.to(dtype)


def batch_of(batch, length):
    tokens = torch.randint(50, (batch, length + 1), generator=torch.Generator().manual_seed(length))
    return tokens[:, :-1], tokens[:, 1:]


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("num_heads", "num_layers"), HEADS_AND_LAYERS)
def test_it_starts_at_the_fixed_decay_with_the_same_slope_in_every_layer(num_heads, num_layers):
    half_slopes = torch.tensor(lasp.decay.alibi_slopes(num_heads)) / 2
    for layer in range(num_layers):
        constants = fixed_decay(num_heads, layer, num_layers, slice(0, num_heads))
        u = torch.zeros(num_heads, requires_grad=True)
        log_decay = learned_decay(u, *constants)
        torch.testing.assert_close(
            log_decay, lasp.decay.tnl(num_heads, layer, num_layers), rtol=1e-7, atol=0
        )
        (slope,) = torch.autograd.grad(log_decay.sum(), u)
        torch.testing.assert_close(slope, -half_slopes, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_it_is_the_formula_and_never_positive(layer, dtype):
    scale = torch.tensor([1e-6, 1e-3, 1.0, 30.0, 1e4])[:, None, None]
    u = (scale * torch.randn(5, 200, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    log_decay = learned_decay(u, *fixed_decay(4, layer, 3, slice(0, 4)))
    assert log_decay.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert (log_decay <= 0).all() and log_decay.isfinite().all()
    factor = 1 - layer / 2 + 1e-5
    slopes = torch.tensor(lasp.decay.alibi_slopes(4), dtype=torch.float64)
    powers = torch.stack((torch.zeros(u.shape, dtype=torch.float64), u.double() / factor))
    expected = -slopes * factor * torch.logsumexp(powers * torch.log(torch.tensor(2.0)), 0)
    expected = expected / torch.log(torch.tensor(2.0))
    # Where the curve has bent to 0, the argument's rounding is an error of the exponent.
    torch.testing.assert_close(log_decay.double(), expected, rtol=1e-4, atol=1e-9)


def test_its_gradient_is_that_of_differences():
    u = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constants = fixed_decay(4, 1, 3, slice(0, 4))
    assert torch.autograd.gradcheck(lambda u: learned_decay(u, *constants), u.requires_grad_())


@pytest.mark.parametrize("layer_types", ["L", "LLS"])
@torch.no_grad()
def test_a_new_model_is_the_one_with_fixed_decays(layer_types):
    models = []
    for config in (CONFIG, FIXED):
        torch.manual_seed(0)
        models.append(TNL(dataclasses.replace(config, layer_types=layer_types)))
    learned, fixed = (model(batch_of(2, 100)[0]) for model in models)
    assert error(learned, fixed) < 1e-6
    changed = make(torch.float32, dataclasses.replace(CONFIG, layer_types=layer_types))
    assert error(changed(batch_of(2, 100)[0]), fixed) > 0.01


def test_weights_of_a_model_with_fixed_decays_need_strict_false():
    torch.manual_seed(1)
    fixed, model = TNL(FIXED), TNL(CONFIG)
    with pytest.raises(RuntimeError, match=r"Missing key.*decay_proj\.weight"):
        model.load_state_dict(fixed.state_dict())
    model.load_state_dict(fixed.state_dict(), strict=False)
    tokens, _ = batch_of(1, 60)
    assert error(model(tokens), fixed(tokens)) < 1e-6


def test_it_materialises_from_the_meta_device():
    with torch.device("meta"):
        model = TNL(CONFIG)
    model.to_empty(device="cpu")
    expected = make(torch.float32)
    for each in (model, expected):
        torch.manual_seed(0)
        each.init_weights()
    assert torch.equal(model(batch_of(1, 9)[0]), expected(batch_of(1, 9)[0]))


def by_token_loop(mixer, x):
    """The mixer's equations with one step per token, in float64; layers without LRPE."""
    q, k, v, u = mixer.qkvu_proj(x).unflatten(-1, (-1, 4, mixer.head_dim)).unbind(-2)
    factor = 1 - mixer.layer / (mixer.config.num_layers - 1) + 1e-5
    slopes = torch.tensor(lasp.decay.alibi_slopes(mixer.config.num_heads), dtype=torch.float64)
    # softplus(z) = -log(sigmoid(-z)), and 2^y = exp(y log 2).
    z = mixer.decay_proj(x) / factor * torch.log(torch.tensor(2.0, dtype=torch.float64))
    decay = torch.exp(slopes * factor / torch.log(torch.tensor(2.0)).double() * F.logsigmoid(-z))
    state, out = 0, []
    for t in range(x.shape[1]):
        outer = F.silu(k[:, t]).unsqueeze(-1) * v[:, t].unsqueeze(-2)
        state = decay[:, t, :, None, None] * state + outer
        out.append(torch.einsum("bhd,bhde->bhe", F.silu(q[:, t]), state))
    o = torch.stack(out, 1).flatten(-2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return mixer.out_proj(u.flatten(-2) * o)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("layer", [1, 2])
def test_output_and_gradients_are_those_of_the_token_loop(layer, dtype, bound):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 2, 70, 32, generator=generator, dtype=torch.float64)
    results = []
    for of, call in (
        (dtype, lambda mixer, x: mixer(x, SequenceShard.whole(70))[0]),
        (torch.float64, by_token_loop),
    ):
        mixer, here = make(of).blocks[layer].token_mixer, x.to(of, copy=True).requires_grad_()
        y = call(mixer, here)
        (y * weight.to(of)).sum().backward()
        results.append([y, here.grad, *(p.grad for p in mixer.parameters())])
    assert len(results[0]) == 6
    for actual, expected in zip(*results, strict=True):
        assert error(actual.double(), expected) < bound


@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_bfloat16_computes_decays_in_float32(mode, monkeypatch):
    model, (tokens, labels) = make(torch.float32), batch_of(2, 100)
    expected, dtypes, attend = make()(tokens), [], lasp.lightning_attention

    def noting(q, k, v, log_decay, **options):
        dtypes.append((q.dtype, log_decay.dtype))
        return attend(q, k, v, log_decay, **options)

    monkeypatch.setattr(lasp, "lightning_attention", noting)
    if mode == "pure":
        logits = model.bfloat16()(tokens)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
    assert dtypes == [(torch.bfloat16, torch.float32)] * 3
    F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # The bound of tests/lasp/tnl/test_model.py for a fixed decay.
    assert (logits - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


@torch.no_grad()
def test_reading_in_chunks_and_decoding_give_the_logits_of_one_pass():
    model, (tokens, _) = make(), batch_of(2, 100)
    expected, states, parts = model(tokens), None, []
    for start, stop in ((0, 1), (1, 64), (64, 64), (64, 80), *((t, t + 1) for t in range(80, 100))):
        logits, states = model(tokens[:, start:stop], states=states, return_states=True)
        parts.append(logits)
    assert error(torch.cat(parts, 1), expected) < 1e-10


@torch.no_grad()
def test_greedy_generation_repeats_the_argmax_of_full_forwards():
    model, (tokens, _) = make(), batch_of(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :7] = False
    generated = model.generate(tokens, 10, padding_mask=mask, prefill_chunk=5)
    for row, start in ((0, 0), (1, 7)):
        alone = tokens[row : row + 1, start:]
        for _ in range(10):
            alone = torch.cat([alone, model(alone)[:, -1:].argmax(-1)], 1)
        assert torch.equal(generated[row : row + 1, start:], alone)


DOCUMENTS = (0, 23, 23, 47, 63)


def gradients(model, shard, cu_seqlens=None, batch=2):
    tokens, labels = (shard.take(each) for each in batch_of(batch, shard.total))
    logits = model(tokens, shard, cu_seqlens=cu_seqlens)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def on_one_rank(group, total, dtype, documents, options, mode):
    model = make(dtype)
    checkpoint_blocks(model.blocks, mode)
    shard = SequenceShard.split(total, group, **options)
    logits, grads = gradients(model, shard, documents, batch=1 if documents is not None else 2)
    for grad in grads.values():
        dist.all_reduce(grad, group=group)
    return shard.positions(), logits, grads


@pytest.mark.parametrize(
    ("size", "total", "documents", "options", "mode"),
    [
        (2, 63, None, {}, "none"),
        (3, 63, None, {}, "full"),
        (3, 63, None, dict(exchange="all_gather"), "selective"),
        (3, 63, DOCUMENTS, {}, "none"),
        (2, 62, None, dict(layout="zigzag"), "full"),
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_sharded_model_is_the_full_model(pool, size, total, documents, options, mode, dtype, bound):
    if documents is not None:
        documents = torch.tensor(documents, dtype=torch.int32)
    whole = SequenceShard.whole(total)
    batch = 1 if documents is not None else 2
    logits, grads = gradients(make(dtype), whole, documents, batch)
    outcomes = pool.run(on_one_rank, total, dtype, documents, options, mode, size=size)
    for here, rank_logits, rank_grads in outcomes:
        assert error(rank_logits, logits[:, here]) < bound
        for name, grad in grads.items():
            # The gradient of LRPE rates is stored in float32, in float64 too.
            assert error(rank_grads[name], grad) < max(bound, 1e-5 * name.endswith("theta")), name


def test_packed_documents_equal_separate_ones():
    model, (tokens, _) = make(), batch_of(1, 63)
    packed = model(tokens, cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32))
    separate = [model(tokens[:, a:b]) for a, b in ((0, 23), (23, 47), (47, 63))]
    torch.testing.assert_close(packed, torch.cat(separate, 1))
