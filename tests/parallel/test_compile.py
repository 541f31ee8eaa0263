"""Compiled blocks compute what the model does, break nowhere, and exchange no state twice."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh

from lasp import SequenceShard, exchange
from lasp.tnl import TNL, TNLConfig
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.compile import compile_blocks, compiler_options, eagerly, fused
from parallel.mesh import full_tensor
from parallel.tnl import tensor_parallel
from tests.compiler import needs_compiler

CONFIG = dict(vocab_size=64, dim=32, num_layers=4, num_heads=2, glu_dim=48)
T = 33


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(backend=None, mode="none", **config):
    torch.manual_seed(0)
    model = TNL(TNLConfig.preset("tiny", **CONFIG | config))
    checkpoint_blocks(model.blocks, mode)
    if backend is not None:
        compile_blocks(model.blocks, fullgraph=True, backend=backend)
    return model


def gradients(model, length=T, group=None, dtype=None):
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(64, (1, length), generator=generator)
    weight = torch.randn(1, length, 32, generator=generator)
    shard = SequenceShard.split(length, group)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        hidden = model(shard.take(tokens), shard, return_hidden=True)
    (hidden.float() * shard.take(weight)).sum().backward()
    return [p.grad.double() for p in model.parameters()]


def fuse_everywhere(monkeypatch):
    """Compile fused functions on the CPU too, without a compiler of C++."""
    compile = torch.compile
    monkeypatch.setattr("parallel.compile._pays_to_compile", lambda x: True)
    monkeypatch.setattr(torch, "compile", lambda f, options, **other: compile(
        f, backend="aot_eager", **other))  # fmt: skip


def errors(actual, truth):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(actual, truth, strict=True)]


@pytest.mark.parametrize("decay", ["fixed", "learned"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_blocks_of_one_kind_share_a_graph_without_breaks(mode, decay):
    actual = gradients(make("aot_eager", mode, decay=decay))
    # The first layer has LRPE, the others do not.
    assert counters["stats"]["unique_graphs"] == 2
    assert max(errors(actual, gradients(make(decay=decay)))) < 1e-6


def test_a_fused_function_has_one_graph_without_gradients(monkeypatch):
    fuse_everywhere(monkeypatch)

    @fused
    def scaled(x, factor, into, power):
        into.copy_(x)
        return x**power * factor

    x, factor, into = torch.randn(3, 5), torch.randn(5), torch.zeros(3, 5)
    with torch.no_grad():
        for inputs in (x, x.clone().requires_grad_()):
            into.zero_()
            assert torch.equal(scaled(inputs, factor, into, 2), x**2 * factor)
            assert torch.equal(into, x)
    assert counters["stats"]["unique_graphs"] == 1
    x.requires_grad_()
    scaled(x, factor, into.detach(), 2).sum().backward()
    torch.testing.assert_close(x.grad, (2 * x * factor).detach())
    assert counters["stats"]["unique_graphs"] == 2


def test_other_lengths_share_one_more_graph():
    shape = dict(num_layers=2, lrpe_layers=())
    model = make("aot_eager", **shape)
    for length in (T, 20, 21, 50, 7):
        model.zero_grad()
        actual = gradients(model, length)
        assert max(errors(actual, gradients(make(**shape), length))) < 1e-6
    assert counters["stats"]["unique_graphs"] == 2


@needs_compiler
def test_fused_kernels_are_as_exact_as_eager_ones():
    """As in training: checkpointed, under autocast."""
    shape, dtype = dict(num_layers=1), torch.bfloat16
    truth = gradients(make(**shape).double())
    actual = errors(gradients(make("inductor", "full", **shape), dtype=dtype), truth)
    eager = errors(gradients(make(**shape), dtype=dtype), truth)
    assert max(actual) < 2 * max(eager)


@pytest.mark.parametrize("precision_casts", [False, True])
def test_this_torch_takes_the_options(precision_casts):
    # torch checks names and types when it wraps a block, before anything is compiled.
    compile_blocks(make().blocks, precision_casts=precision_casts)
    options = compiler_options(precision_casts=precision_casts)
    assert options["emulate_precision_casts"] is precision_casts


def test_eagerly_compiles_nothing():
    model = make("aot_eager")
    with eagerly(model.blocks):
        gradients(model)
    assert not counters["stats"]
    gradients(model)
    assert counters["stats"]["unique_graphs"] == 2


def exchanges_and_error(group):
    torch._dynamo.reset()
    starts, original = [], exchange.start

    def start(*args, **kwargs):
        starts.append(kwargs.get("reverse", False))
        return original(*args, **kwargs)

    exchange.start = start
    try:
        actual = gradients(make("aot_eager", "full"), group=group)
    finally:
        exchange.start = original
    return len(starts), max(errors(actual, gradients(make(), group=group)))


def test_checkpointed_compiled_blocks_exchange_once(pool):
    for count, error in pool.run(exchanges_and_error, size=2):
        assert count == 2 * CONFIG["num_layers"]
        assert error < 1e-6


def error_of_compiled_shards(group):
    torch._dynamo.reset()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    results = []
    for is_compiled in (True, False):
        model = tensor_parallel(make(), mesh)
        if is_compiled:
            checkpoint_blocks(model.blocks, "full")
            compile_blocks(model.blocks, fullgraph=True, backend="aot_eager")
        gradients(model)
        results.append([full_tensor(p.grad) for p in model.parameters()])
    return max(errors(*results))


def test_tensor_parallel_blocks_compile_without_breaks(pool):
    assert max(pool.run(error_of_compiled_shards, size=2)) < 1e-6


def test_autocast_halves_the_residual_stream():
    dtypes = []
    model = make()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: dtypes.append(args[0].dtype))
    gradients(model, dtype=torch.bfloat16)
    gradients(model)
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] * 4
