"""Gradients are summed over ranks, once per step, whether weights are full or sharded."""

import collections

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lasp
from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from parallel.activation_checkpoint import EXCHANGE_OPS, checkpoint_blocks
from parallel.compile import compile_blocks
from parallel.data import accumulate, replicate, reshard, shard
from parallel.loss import chunked_cross_entropy
from parallel.mesh import ParallelDims, build_mesh, sharding_mesh


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).sum()


def inputs(rank, micro):
    generator = torch.Generator().manual_seed(10 * rank + micro)
    return torch.randn(5, 3, generator=generator)


def summed_gradients(group, reduce_dtype):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # Weights differ at first: all ranks must take the first rank's.
    torch.manual_seed(rank)
    model = Tower()
    wrapped = replicate(model, group, reduce_dtype=reduce_dtype)
    torch.manual_seed(0)
    plain = Tower()
    reductions = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reductions.append(1) or original(*args, **kwargs)
    try:
        for micro in range(3):
            with accumulate(wrapped, last=micro == 2):
                wrapped(inputs(rank, micro)).backward()
    finally:
        dist.all_reduce = original
    for other in range(size):
        for micro in range(3):
            plain(inputs(other, micro)).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    error = max(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in pairs)
    return error, len(reductions)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_gradients_are_the_sum_over_ranks_and_micro_batches(pool, size, dtype, bound):
    for error, reductions in pool.run(summed_gradients, dtype, size=size):
        assert error < bound
        # This model fits into one bucket: three micro-batches, one reduction.
        assert reductions == 1


def test_a_module_on_one_device_needs_no_group():
    model = Tower()
    with accumulate(model, last=False):
        model(inputs(0, 0)).backward()
    assert model.first.weight.grad is not None


MICRO, LENGTH = 2, 31
# Sizes that four ranks do not divide, and LRPE in two of three layers.
SHAPE = dict(vocab_size=65, dim=36, num_layers=3, num_heads=2, glu_dim=50, lrpe_layers=(0, 2))


class WithLoss(nn.Module):
    """A TNL that returns its loss, so that the wrapped module has one forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = TNL(TNLConfig.preset("tiny", **SHAPE))

    def forward(self, tokens, labels, part):
        tokens, labels = part.take(tokens), part.take(labels)
        hidden = self.model(tokens, part, return_hidden=True)
        return chunked_cross_entropy(hidden, self.model.head_weight, labels, chunk_size=16)


class Collectives(TorchDispatchMode):
    """Calls of each collective and of the exchange, and the dtypes of reduced tensors."""

    NAMES = {
        "c10d::_allgather_base_": "gather",
        "c10d::_reduce_scatter_base_": "reduce_scatter",
        "c10d::allreduce_": "all_reduce",
        **dict.fromkeys(EXCHANGE_OPS, "exchange"),
    }

    def __init__(self):
        super().__init__()
        self.calls, self.dtypes = collections.Counter(), set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = self.NAMES.get(op.name())
        if name is not None:
            self.calls[name] += 1
        if name == "reduce_scatter":
            self.dtypes.add(args[1].dtype)
        return op(*args, **(kwargs or {}))


def relative_error(actual, expected):
    """The largest over all gradients, relative to the largest entry of each."""
    return max(
        ((x.grad.full_tensor() - y.grad).abs().max() / y.grad.abs().max()).item()
        for x, y in zip(actual.parameters(), expected.parameters(), strict=True)
    )


def exact_blocks(blocks):
    """Those with LRPE."""
    return [blocks[0], blocks[2]]


def fsdp_step(group, degrees, options, mode, accumulation):
    """Largest error of a gradient, the collectives of a step, and the share of the weights held."""
    dims = ParallelDims.resolve(dist.get_world_size(group), **degrees)
    mesh = build_mesh(dims, "cpu")
    plain, model = WithLoss(), WithLoss()
    blocks = model.model.blocks
    checkpoint_blocks(blocks, mode)
    shard(model, sharding_mesh(mesh), blocks=blocks, exact=exact_blocks(blocks), **options)
    tokens = torch.randint(65, (MICRO * dims.dp, LENGTH + 1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    plain(inputs, labels, SequenceShard.whole(LENGTH)).backward()
    part = SequenceShard.split(LENGTH, mesh["cp"].get_group() if dims.cp > 1 else None)
    with torch.no_grad():
        # The step must not depend on what a validation has gathered.
        model(inputs[:1], labels[:1], part)
    reshard(model)
    with Collectives() as seen:
        for micro in range(MICRO):
            row = micro * dims.dp + dims.dp_rank(dist.get_rank(group))
            with accumulate(model, last=micro == MICRO - 1, **accumulation):
                model(inputs[row : row + 1], labels[row : row + 1], part).backward()
    held = sum(p.to_local().numel() for p in model.parameters())
    share = held / sum(p.numel() for p in plain.parameters())
    return relative_error(model, plain), seen.calls, seen.dtypes, share


# Units that are gathered and reduced: the blocks, and embedding with head.
UNITS, BLOCKS = 4, 3
NEVER = {"reshard_after_forward": False}
# Degrees of the mesh, options of `shard`, activation checkpointing, options of `accumulate`.
MESHES = {
    "fsdp": ({"dp_shard": 4}, {}, "none", {}),
    "fsdp, cp, checkpointed": ({"dp_shard": 2, "cp": 2}, {}, "full", {}),
    "hsdp": ({"dp_replicate": 2, "dp_shard": 2}, {}, "none", {}),
    "hsdp, cp": ({"dp_replicate": 2, "cp": 2}, {}, "selective", {}),
    "zero-1": ({"dp_shard": 4}, NEVER, "none", {"keep_gathered": True}),
    "zero-2": ({"dp_shard": 4}, NEVER, "none", {"every": True}),
}


@pytest.mark.parametrize("name", MESHES)
def test_sharded_weights_get_the_gradients_of_one_process(pool, name):
    degrees, options, _, accumulation = MESHES[name]
    for error, calls, dtypes, share in pool.run(fsdp_step, *MESHES[name], size=4):
        assert error < 1e-5
        assert dtypes == {torch.float32}
        # Rows that do not divide leave some ranks with a few more.
        assert share < 1.15 * degrees.get("dp_replicate", 1) / 4
        # Accumulation communicates once, unless told otherwise.
        assert calls["reduce_scatter"] == UNITS * (MICRO if accumulation.get("every") else 1)
        assert calls["all_reduce"] == (UNITS if "dp_replicate" in degrees else 0)
        forwards = 1 if accumulation.get("keep_gathered") else MICRO
        # Blocks are gathered again for the backward if resharded, and never for a recomputation.
        again = MICRO * BLOCKS if options.get("reshard_after_forward", True) else 0
        assert calls["gather"] == forwards * UNITS + again
        # One state exchange per block, recomputed or not.
        assert calls["exchange"] == MICRO * BLOCKS


def in_bfloat16(group):
    """Dtypes of weights in the forward, of kept and of reduced tensors; error of gradients."""
    mesh = build_mesh(ParallelDims.resolve(4, dp_shard=4), "cpu")
    plain, model = WithLoss(), WithLoss()
    blocks = model.model.blocks
    options = dict(exact=exact_blocks(blocks), param_dtype=torch.bfloat16)
    shard(model, sharding_mesh(mesh), blocks=blocks, **options)
    seen = []
    for block in blocks:
        block.token_mixer.register_forward_hook(
            lambda mixer, *_: seen.append({p.dtype for p in mixer.parameters()})
        )
    tokens = torch.randint(65, (4, LENGTH + 1))
    inputs, labels, part = tokens[:, :-1], tokens[:, 1:], SequenceShard.whole(LENGTH)
    rank = dist.get_rank(group)
    with torch.autocast("cpu", torch.bfloat16), Collectives() as reduced:
        plain(inputs, labels, part).backward()
        model(inputs[rank : rank + 1], labels[rank : rank + 1], part).backward()
    errors = [
        ((x.grad.full_tensor() - y.grad).norm() / y.grad.norm()).item()
        for x, y in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    kept = {tensor.dtype for p in model.parameters() for tensor in (p, p.grad)}
    return seen, kept, reduced.dtypes, max(errors)


def test_bfloat16_is_gathered_and_float32_is_kept_and_reduced(pool):
    for seen, kept, reduced, error in pool.run(in_bfloat16, size=4):
        assert seen == [{torch.float32}, {torch.bfloat16}, {torch.float32}]
        assert kept == reduced == {torch.float32}
        assert error < 3e-2


def compiled_step(group, mode):
    """Error of the gradients of compiled, checkpointed FSDP blocks; exchanges; graphs."""
    dims = ParallelDims.resolve(4, dp_shard=2, cp=2)
    mesh = build_mesh(dims, "cpu")
    plain, model = WithLoss(), WithLoss()
    blocks = model.model.blocks
    checkpoint_blocks(blocks, mode)
    compile_blocks(blocks, backend="aot_eager", fullgraph=True)
    shard(model, sharding_mesh(mesh), blocks=blocks, exact=exact_blocks(blocks))
    tokens = torch.randint(65, (dims.dp, 33))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    plain(inputs, labels, SequenceShard.whole(32)).backward()
    part = SequenceShard.split(32, mesh["cp"].get_group())
    row = dims.dp_rank(dist.get_rank(group))
    exchanges, start = [], lasp.exchange.start
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lasp.exchange, "start", lambda *a, **k: exchanges.append(1) or start(*a, **k))
        model(inputs[row : row + 1], labels[row : row + 1], part).backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return relative_error(model, plain), len(exchanges), graphs


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("none", marks=pytest.mark.slow),
        "full",
        pytest.param("selective", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_can_be_sharded_and_checkpointed(pool, mode):
    for error, exchanges, graphs in pool.run(compiled_step, mode, size=4):
        assert error < 1e-5
        # One in the forward of each block and one in its backward.
        assert exchanges == 2 * BLOCKS
        # Blocks of a kind share a graph: those with LRPE, and those without.
        assert graphs == 2
