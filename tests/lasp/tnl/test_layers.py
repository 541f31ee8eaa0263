import copy

import pytest
import torch
import torch.nn.functional as F

from lasp import SequenceShard, decay
from lasp.tnl import TNLConfig
from lasp.tnl.layers import SGLU, GatedLinearAttention, TNLBlock

CONFIG = TNLConfig(vocab_size=32, dim=24, num_layers=3, num_heads=3, glu_dim=40, init_std=0.2)


def make_block(layer, dtype=torch.float64):
    torch.manual_seed(layer)
    block = TNLBlock(CONFIG, layer)
    for parameter in block.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return block.to(dtype)


def test_rows_of_the_projection_go_head_by_head():
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


def test_head_slices_sum_to_the_whole():
    """What tensor parallelism does: rows of qkvu and columns of W_o in parts, one norm for all."""
    mixer = make_block(0).token_mixer
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    shard = SequenceShard.whole(11)
    whole, _ = mixer(x, shard)
    scales = []
    norm = mixer.norm

    def measure(_, inputs, output):
        scales.append((output / inputs[0]).detach()[..., :1])

    norm.register_forward_hook(measure)
    mixer(x, shard)
    total = 0
    for heads in (slice(0, 1), slice(1, 3)):
        part = copy.deepcopy(mixer)
        part.keep_heads(heads)
        rows = slice(heads.start * 32, heads.stop * 32)
        columns = slice(heads.start * 8, heads.stop * 8)
        part.qkvu_proj.weight = torch.nn.Parameter(mixer.qkvu_proj.weight[rows])
        part.out_proj.weight = torch.nn.Parameter(mixer.out_proj.weight[:, columns])
        part.norm = torch.nn.Identity()
        part.norm.register_forward_hook(lambda _, inputs, output: output * scales[0])
        part.double()
        total = total + part(x, shard)[0]
    torch.testing.assert_close(total, whole)


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


def test_last_layer_hardly_forgets_and_first_does():
    """The decay is that of the layer: moving the block to another layer changes its output."""
    mixers = [GatedLinearAttention(CONFIG, layer).double() for layer in (1, 2)]
    mixers[1].load_state_dict(mixers[0].state_dict())
    x = torch.randn(1, 50, 24, dtype=torch.float64)
    first, second = (mixer(x, SequenceShard.whole(50))[0] for mixer in mixers)
    assert torch.equal(first[:, 0], second[:, 0])
    assert (first[:, 10:] - second[:, 10:]).abs().max() > 1e-3 * first.abs().max()


@pytest.mark.parametrize("layer", [0, 1])
def test_block_compiles(layer):
    block = make_block(layer, torch.float32)
    x = torch.randn(2, 17, 24, requires_grad=True)
    shard = SequenceShard.whole(17)
    expected, _ = block(x, shard)
    (want,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(block, backend="aot_eager")
    out, _ = compiled(x, shard)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, want)
