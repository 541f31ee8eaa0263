"""The layers of a TNL: rows, decay, channel mixer, norm, compilation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from lasp import SequenceShard, decay
from lasp.tnl import TNLConfig
from lasp.tnl.heads import split_heads
from lasp.tnl.layers import SGLU, GatedLinearAttention, SRMSNorm, TNLBlock

CONFIG = TNLConfig(vocab_size=32, dim=24, num_layers=3, num_heads=3, glu_dim=40, init_std=0.2)


def make_block(layer, dtype=torch.float64, config=CONFIG):
    torch.manual_seed(layer)
    block = TNLBlock(config, layer)
    for parameter in block.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return block.to(dtype)


def test_rows_of_the_projection_are_ordered_by_head():
    """Zeroing head 1's contiguous rows must change nothing but head 1's columns of W_o's input."""
    mixer = make_block(1).token_mixer
    seen = []
    mixer.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mixer.norm = torch.nn.Identity()  # it mixes heads
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    shard = SequenceShard.whole(9)
    mixer(x, shard)
    with torch.no_grad():
        mixer.qkvu_proj.weight[32:64] = 0
    mixer(x, shard)
    before, after = (o.unflatten(-1, (3, 8)) for o in seen)
    assert (after[:, :, 1] == 0).all()
    assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]])
    assert (before != 0).any(-1).all()


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_split_heads_is_a_split_with_the_gradients_of_autograd(activation):
    qkvu = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    q, k, v, u = qkvu.unbind(-2)
    if activation == "silu":
        q, k = F.silu(q), F.silu(k)
    wanted, got = (q, k, v, u), split_heads(qkvu, activation)
    grads = torch.randn(4, 2, 3, 2, 5, dtype=torch.float64).unbind(0)
    assert all(map(torch.equal, got, wanted))
    with torch.no_grad():
        assert all(map(torch.equal, split_heads(qkvu, activation), wanted))
    pairs = [torch.autograd.grad(each, qkvu, grads)[0] for each in (got, wanted)]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_decay_stays_float32_to_the_bit(cast):
    block = getattr(TNLBlock(CONFIG, 1), cast)()
    assert torch.equal(block.token_mixer.log_decay, decay.tnl(3, 1, 3))
    assert "token_mixer.log_decay" not in block.state_dict()


def test_decay_survives_meta_initialisation():
    with torch.device("meta"):
        block = TNLBlock(CONFIG, 2)
    block.to_empty(device="cpu")
    assert torch.equal(block.token_mixer.log_decay, decay.tnl(3, 2, 3))


def test_sglu_is_the_equation():
    torch.manual_seed(0)
    glu = SGLU(CONFIG)
    x = torch.randn(2, 5, 24)
    expected = F.linear(F.linear(x, glu.w1.weight) * F.linear(x, glu.w2.weight), glu.w3.weight)
    assert torch.equal(glu(x), expected)


def test_decay_depends_on_the_layer():
    """The same weights in another layer give another output."""
    mixers = [GatedLinearAttention(CONFIG, layer).double() for layer in (1, 2)]
    mixers[1].load_state_dict(mixers[0].state_dict())
    x = torch.randn(1, 50, 24, dtype=torch.float64)
    first, second = (mixer(x, SequenceShard.whole(50))[0] for mixer in mixers)
    assert torch.equal(first[:, 0], second[:, 0])
    assert (first[:, 10:] - second[:, 10:]).abs().max() > 1e-3 * first.abs().max()


@pytest.mark.parametrize("layer_types", ["L", "LSL"])
@pytest.mark.parametrize("layer", [0, 1])
def test_compiled_block_equals_eager(layer, layer_types):
    config = dataclasses.replace(CONFIG, layer_types=layer_types)
    block, shard = make_block(layer, torch.float32, config), SequenceShard.whole(17)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for call in (block, compiled):
        x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
        y, _ = call(x.requires_grad_(), shard)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results)


def norm_equation(x, eps=1e-6):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 1e-3)],
)
def test_norm_equals_the_equation(dtype, tolerance):
    torch.manual_seed(0)
    # Squares of 300 overflow float16: the mean square must be taken in float32.
    x = (300 * torch.randn(3, 7, 96)).to(dtype).requires_grad_()
    y = SRMSNorm(96)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), norm_equation(x), rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, weight)
    (expected,) = torch.autograd.grad(norm_equation(x), x, weight.double())
    assert (grad - expected).abs().max() <= 4 * tolerance * expected.abs().max()


def test_norm_of_zero_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = SRMSNorm(8)(x)
    y.sum().backward()
    assert (y == 0).all()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1000.0))


def test_norm_under_autocast_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert SRMSNorm(8)(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
