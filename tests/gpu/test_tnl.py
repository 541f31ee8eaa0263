"""TNL on a GPU against the same weights in float64 on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.layers import SRMSNorm
from lasp.tnl.positions import LRPE
from parallel.activation_checkpoint import checkpointed
from parallel.compile import compile_blocks

# The released head sizes: D = 128, and K = 256 in layer 0.
CONFIG = TNLConfig(vocab_size=200, dim=256, num_layers=3, num_heads=2, glu_dim=384, init_std=0.06)


def make():
    torch.manual_seed(0)
    return TNL(CONFIG)


def tokens_of(batch, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(200, (batch, length), generator=generator)


def loss_and_grads(model, tokens):
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.double().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    grads = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
    return logits.detach().double().cpu(), grads


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def compare(model, length, logits_tolerance, grad_tolerance):
    tokens = tokens_of(2, length + 1)
    expected, wanted = loss_and_grads(make().double(), tokens)
    logits, grads = loss_and_grads(model.cuda(), tokens.cuda())
    assert error(logits, expected) < logits_tolerance
    for name, grad in grads.items():
        # A rate's gradient is a small sum of large terms of both signs, weighed by position.
        allowed = grad_tolerance * (4 if name.endswith("theta") else 1)
        assert error(grad, wanted[name]) < allowed, name


@pytest.mark.parametrize("length", [1, 63, 100, 1000])
def test_float32(length, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    # 1e-2: a kernel may use TF32 for its products despite the switch for matmul.
    compare(make(), length, 2e-3, 1e-2)


@pytest.mark.parametrize("length", [1, 63, 1000])
def test_bfloat16(length):
    compare(make().bfloat16(), length, 0.03, 0.05)


@pytest.mark.parametrize("length", [63, 1000])
def test_autocast(length):
    with torch.autocast("cuda", torch.bfloat16):
        compare(make(), length, 0.03, 0.05)


def test_compiled_and_recomputed_under_autocast():
    """As in training."""
    model = make()
    for block in model.blocks:
        checkpointed(block)
    compile_blocks(model.blocks, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        compare(model, 1000, 0.03, 0.05)


@pytest.mark.parametrize("length", [1, 63, 100])
@torch.no_grad()
def test_decoding_gives_the_logits_of_one_pass(length):
    model, tokens = make().cuda(), tokens_of(2, length + 8).cuda()
    expected = model(tokens)
    logits, states = model(tokens[:, :length], return_states=True)
    parts = [logits]
    for t in range(length, length + 8):
        logits, states = model(tokens[:, t : t + 1], states=states, return_states=True)
        parts.append(logits)
    assert error(torch.cat(parts, 1), expected) < 2e-3


def test_sampling_with_a_generator_on_the_gpu():
    model, tokens = make().bfloat16().cuda(), tokens_of(2, 70).cuda()

    def draw():
        generator = torch.Generator("cuda").manual_seed(3)
        return model.generate(tokens, 20, temperature=0.9, top_k=20, generator=generator)

    first = draw()
    assert first.shape == (2, 90)
    assert torch.equal(first[:, :70], tokens)
    assert torch.equal(first, draw())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 65, 256, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn_like(x)
    exact = x.detach().double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    (wanted,) = torch.autograd.grad(expected, exact, weight.double())
    y = SRMSNorm(256)(x)
    (grad,) = torch.autograd.grad(y, x, weight)
    assert y.dtype == grad.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    assert error(y.double(), expected) < tolerance
    assert error(grad.double(), wanted) < tolerance


@pytest.mark.parametrize("position", [0, 2**20 + 17])
def test_lrpe_equals_the_cpu(position):
    torch.manual_seed(0)
    cpu, q, k = LRPE(2, 128), torch.randn(2, 2500, 2, 128), torch.randn(2, 2500, 2, 128)
    gpu = copy.deepcopy(cpu).cuda()
    outcomes = []
    for lrpe, device in ((cpu, "cpu"), (gpu, "cuda")):
        inputs = [x.to(device).requires_grad_() for x in (q, k)]
        outputs = lrpe(*inputs, position)
        weights = [torch.cos(x.detach()) for x in outputs]
        grads = torch.autograd.grad(outputs, [*inputs, lrpe.theta], weights)
        outcomes.append([x.cpu() for x in (*outputs, *grads)])
    for a, b in zip(*outcomes, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("layer", [0, 1])
def test_compiled_block_equals_eager(layer):
    block = make().blocks[layer].bfloat16().cuda()
    x = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for call in (block, torch.compile(block)):
        out, _ = call(x, SequenceShard.whole(300))
        (grad,) = torch.autograd.grad(out.float().square().sum(), x)
        results.append((out.detach().double(), grad.double()))
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager) < 0.02
