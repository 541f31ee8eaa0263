"""Compiled blocks compute what the model does, break nowhere, and exchange no state twice."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh

from lasp import SequenceShard, exchange
from lasp.tnl import TNL, TNLConfig
from parallel.compile import compile_blocks, eagerly
from parallel.mesh import whole
from parallel.recompute import checkpointed
from parallel.tensor import tensor_parallel
from tests.compiler import needs_compiler

CONFIG = dict(vocab_size=64, dim=32, num_layers=4, num_heads=2, glu_dim=48)
T = 33


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(backend=None, recompute=False, **config):
    torch.manual_seed(0)
    model = TNL(TNLConfig.preset("tiny", **CONFIG | config))
    if recompute:
        for block in model.blocks:
            checkpointed(block)
    if backend is not None:
        compile_blocks(model.blocks, fullgraph=True, backend=backend)
    return model


def gradients(model, length=T, group=None, dtype=None):
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(64, (1, length), generator=generator)
    weight = torch.randn(1, length, 32, generator=generator)
    shard = SequenceShard.split(length, group)
    mine = shard.token_slice
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        hidden = model(tokens[:, mine], shard=shard, return_hidden=True)
    (hidden.float() * weight[:, mine]).sum().backward()
    return [p.grad.double() for p in model.parameters()]


def errors(actual, truth):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(actual, truth, strict=True)]


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_one_kind_share_a_graph_and_break_nowhere(recompute):
    actual = gradients(make("aot_eager", recompute))
    # The first layer has LRPE, the others have not.
    assert counters["stats"]["unique_graphs"] == 2
    assert max(errors(actual, gradients(make()))) < 1e-6


def test_another_length_does_not_ask_for_another_graph_each_time():
    model = make("aot_eager", num_layers=2, lrpe_layers=())
    for length in (T, 20, 21, 50, 7):
        model.zero_grad()
        actual = gradients(model, length)
        assert max(errors(actual, gradients(make(None, num_layers=2, lrpe_layers=()), length))) < (
            1e-6
        )
    assert counters["stats"]["unique_graphs"] == 2


@needs_compiler
def test_fused_kernels_are_as_exact_as_eager_ones():
    """As in training: recomputed, under autocast."""
    shape, dtype = dict(num_layers=1), torch.bfloat16
    truth = gradients(make(**shape).double())
    actual = errors(gradients(make("inductor", recompute=True, **shape), dtype=dtype), truth)
    eager = errors(gradients(make(**shape), dtype=dtype), truth)
    assert max(actual) < 2 * max(eager)


def test_eagerly_compiles_nothing():
    model = make("aot_eager")
    with eagerly(model.blocks):
        gradients(model)
    assert not counters["stats"]
    gradients(model)
    assert counters["stats"]["unique_graphs"] == 2


def on_a_rank(group):
    torch._dynamo.reset()
    starts, original = [], exchange.start

    def start(*args, **kwargs):
        starts.append(kwargs.get("reverse", False))
        return original(*args, **kwargs)

    exchange.start = start
    try:
        actual = gradients(make("aot_eager", recompute=True), group=group)
        count = len(starts)
        expected = gradients(make(), group=group)
    finally:
        exchange.start = original
    return count, max(errors(actual, expected))


def test_recomputed_compiled_blocks_exchange_once(pool):
    for count, error in pool.run(on_a_rank, size=2):
        assert count == 2 * CONFIG["num_layers"]
        assert error < 1e-6


def on_a_tensor_rank(group):
    torch._dynamo.reset()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    found = []
    for backend in ("aot_eager", None):
        model = tensor_parallel(make(), mesh)
        if backend is not None:
            for block in model.blocks:
                checkpointed(block)
            compile_blocks(model.blocks, fullgraph=True, backend=backend)
        gradients(model)
        found.append([whole(p.grad) for p in model.parameters()])
    return max(errors(*found))


def test_blocks_cut_over_tensor_ranks_compile_whole(pool):
    assert max(pool.run(on_a_tensor_rank, size=2)) < 1e-6


def test_autocast_halves_the_residual_stream():
    dtypes = []
    model = make()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: dtypes.append(args[0].dtype))
    gradients(model, dtype=torch.bfloat16)
    gradients(model)
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] * 4
