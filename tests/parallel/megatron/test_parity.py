"""A TNL built and sharded by Megatron has the loss and the gradients of the native TNL."""

import pytest
import torch
import torch.nn.functional as F

from lasp.tnl import TNL, TNLConfig

TINY = dict(vocab_size=64, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)

slow = pytest.mark.slow
SIZES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]  # tensor x context parallel; the rest is data


def native(fields):
    """(float32 weights, tokens, loss, gradients) of the native TNL in float64."""
    torch.manual_seed(0)
    model = TNL(TNLConfig(**fields))
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    tokens = torch.randint(64, (4, 49))
    model.double()
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return weights, tokens, loss.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def reference():
    return native(TINY)


def check(outcomes, loss, grads, bound=1e-5):
    for seen_loss, seen, *_ in outcomes:
        assert seen_loss == pytest.approx(loss, rel=bound)
        assert seen.keys() == grads.keys()
        for name, expected in grads.items():
            error = (seen[name] - expected).norm() / expected.norm()
            assert error < bound, (name, error.item())


@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=slow)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loss_and_gradients_are_those_of_the_native_model(megatron, reference, sizes, layout):
    weights, tokens, loss, grads = reference
    options = dict(layout=layout)
    check(megatron.run("native_gradients", sizes, TINY, weights, tokens, options), loss, grads)


def test_logits_are_those_of_the_native_model_and_weights_convert_back(megatron):
    tnl = TINY | dict(vocab_size=63)
    model = TNL(TNLConfig(**tnl))
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    tokens = torch.randint(63, (2, 24))
    with torch.no_grad():
        expected = model(tokens)
    for logits, back in megatron.run("logits_and_weights", (2, 1), tnl, weights, tokens, 64):
        torch.testing.assert_close(logits[..., :63], expected, rtol=1e-5, atol=1e-5)
        assert logits.shape[-1] == 64 and not logits[..., 63].any()
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], x) for name, x in weights.items())


@pytest.mark.parametrize("sizes", [pytest.param((1, 1), marks=slow), (2, 2)], ids=str)
def test_the_hybrid_stack_gives_the_same_model(megatron, reference, sizes):
    """Its pattern counts MLPs as layers; decays must not."""
    pytest.importorskip("triton", reason="Megatron's hybrid stack imports triton")
    weights, tokens, loss, grads = reference
    check(megatron.run("hybrid_model_gradients", sizes, TINY, weights, tokens), loss, grads)


@pytest.mark.parametrize("sizes", [(2, 2)], ids=str)
def test_the_hybrid_stack_counts_softmax_layers_for_decays(megatron, hybrid, sizes):
    """As the native model and the block spec do."""
    pytest.importorskip("triton", reason="Megatron's hybrid stack imports triton")
    weights, tokens, loss, grads = hybrid
    check(megatron.run("hybrid_model_gradients", sizes, HYBRID, weights, tokens), loss, grads)


@pytest.mark.parametrize("exchange", ["all_gather", pytest.param("doubling", marks=slow)])
def test_sequence_parallel_activations(megatron, reference, exchange):
    weights, tokens, loss, grads = reference
    options = dict(exchange=exchange, megatron=dict(sequence_parallel=True))
    check(megatron.run("native_gradients", (2, 2), TINY, weights, tokens, options), loss, grads)


HYBRID = TINY | dict(layer_types="LSL", num_key_value_heads=2)


@pytest.fixture(scope="module")
def hybrid():
    """The second of three layers is softmax, with rotary positions and grouped queries."""
    return native(HYBRID)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "sizes", [*(pytest.param(x, marks=slow) for x in (*SIZES[:3], SIZES[4])), (2, 2)]
)
def test_a_hybrid_with_softmax_layers(megatron, hybrid, sizes, layout):
    weights, tokens, loss, grads = hybrid
    options = dict(layout=layout)
    check(megatron.run("native_gradients", sizes, HYBRID, weights, tokens, options), loss, grads)


GPT = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    normalization="RMSNorm",
    attention_dropout=0.0,
    hidden_dropout=0.0,
    init_method_std=0.2,
)


@pytest.mark.parametrize(
    "decay", ["tnl", *(pytest.param(x, marks=slow) for x in ("minimax", "ling", "none"))]
)
@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=slow)])
def test_a_gpt_with_grouped_queries_and_rotary_positions(megatron, decay, groups):
    """With fewer key heads than tensor-parallel ranks, Megatron shares them."""
    tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1))
    options = dict(decay=decay, feature_map="silu_qkv")
    fields = GPT | dict(num_query_groups=groups)
    loss, grads, _ = megatron.run("gradients", (1, 1), "gpt", fields, tokens, options)[0]
    check(megatron.run("gradients", (2, 2), "gpt", fields, tokens, options), loss, grads)
