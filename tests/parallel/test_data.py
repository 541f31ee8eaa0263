"""Gradients are summed over ranks, once per step, whether weights are whole or cut."""

import collections

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lasp
from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from parallel.data import accumulate, replicate, reshard, shard
from parallel.loss import chunked_cross_entropy
from parallel.mesh import ParallelDims, build_mesh, sharding_mesh
from parallel.recompute import recompute


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
    # Different weights at first: the first rank's must win.
    torch.manual_seed(rank)
    model = Tower()
    wrapped = replicate(model, group, reduce_dtype=reduce_dtype)
    torch.manual_seed(0)
    alone = Tower()
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
            alone(inputs(other, micro)).backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    error = max(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in pairs)
    return error, len(reductions)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_gradients_are_the_sum_over_ranks_and_micro_batches(pool, size, dtype, bound):
    for error, reductions in pool.run(summed_gradients, dtype, size=size):
        assert error < bound
        # One bucket holds this model: three micro-batches, one reduction.
        assert reductions == 1


def test_a_module_alone_needs_no_group():
    model = Tower()
    with accumulate(model, last=False):
        model(inputs(0, 0)).backward()
    assert model.first.weight.grad is not None


MICRO, LENGTH = 2, 31
# Sizes that four ranks do not divide evenly, and LRPE in two of three layers.
SHAPE = dict(vocab_size=65, dim=36, num_layers=3, num_heads=2, glu_dim=50, lrpe_layers=(0, 2))


class WithLoss(nn.Module):
    """A TNL that answers with its loss, so that the wrapped module sees one forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = TNL(TNLConfig.preset("tiny", **SHAPE))

    def forward(self, tokens, labels, part):
        hidden = self.model(tokens, part, return_hidden=True)
        return chunked_cross_entropy(hidden, self.model.head_weight, labels, chunk_size=16)


class Collectives(TorchDispatchMode):
    """Calls of each collective and of the exchange, and the dtypes of what was reduced."""

    NAMES = {
        "_allgather_base_": "gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "allreduce_": "all_reduce",
        "enter": "exchange",
    }

    def __init__(self):
        super().__init__()
        self.calls, self.dtypes = collections.Counter(), set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = self.NAMES.get(op.name().split("::")[1])
        if name is not None:
            self.calls[name] += 1
        if name == "reduce_scatter":
            self.dtypes.add(args[1].dtype)
        return op(*args, **(kwargs or {}))


def cut_over_ranks(group, degrees, options, mode, wanted):
    """Largest relative error of a gradient, the calls of a step, and where the weights are."""
    rank, dims = dist.get_rank(group), ParallelDims.resolve(dist.get_world_size(group), **degrees)
    mesh = build_mesh(dims, "cpu")
    alone, cut = WithLoss(), WithLoss()
    blocks = cut.model.blocks
    recompute(blocks, mode)
    shard(cut, sharding_mesh(mesh), blocks=blocks, exact=[blocks[0], blocks[2]], **options)
    tokens = torch.randint(65, (MICRO * dims.dp, LENGTH + 1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    alone(inputs, labels, SequenceShard.whole(LENGTH)).backward()
    part = SequenceShard.split(LENGTH, mesh["cp"].get_group() if dims.cp > 1 else None)
    with torch.no_grad():
        # What a validation gathers is not what the step finds.
        cut(inputs[:1, part.token_slice], labels[:1, part.token_slice], part)
    reshard(cut)
    with Collectives() as seen:
        for micro in range(MICRO):
            row = slice(micro * dims.dp + dims.dp_rank(rank), None, 10**6)
            with accumulate(cut, last=micro == MICRO - 1, **wanted):
                cut(inputs[row, part.token_slice], labels[row, part.token_slice], part).backward()
    errors = [
        ((mine.grad.full_tensor() - whole.grad).abs().max() / whole.grad.abs().max()).item()
        for mine, whole in zip(cut.parameters(), alone.parameters(), strict=True)
    ]
    held = sum(p.to_local().numel() for p in cut.parameters())
    return max(errors), seen.calls, seen.dtypes, held / sum(p.numel() for p in alone.parameters())


# Units that are gathered and reduced: the blocks, and embedding with head.
UNITS, BLOCKS = 4, 3
LAYOUTS = {
    "fsdp": ({"dp_shard": 4}, {}, "none", {}),
    "fsdp, cp, recomputed": ({"dp_shard": 2, "cp": 2}, {}, "full", {}),
    "hsdp": ({"dp_replicate": 2, "dp_shard": 2}, {}, "none", {}),
    "hsdp, cp": ({"dp_replicate": 2, "cp": 2}, {}, "selective", {}),
    "zero-1": (
        {"dp_shard": 4},
        {"reshard_after_forward": False},
        "none",
        {"keep_gathered": True},
    ),
    "zero-2": ({"dp_shard": 4}, {"reshard_after_forward": False}, "none", {"every": True}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_cut_weights_get_the_gradients_of_one_process(pool, name):
    degrees, options, mode, wanted = LAYOUTS[name]
    for error, calls, dtypes, held in pool.run(cut_over_ranks, *LAYOUTS[name], size=4):
        assert error < 1e-5
        assert dtypes == {torch.float32}
        cut_over = 4 // degrees.get("dp_replicate", 1)
        # Rows that do not divide leave some ranks with more; none holds much more than its part.
        assert held < 1.15 / cut_over
        # Accumulation communicates once, unless it is told not to.
        assert calls["reduce_scatter"] == UNITS * (MICRO if wanted.get("every") else 1)
        assert calls["all_reduce"] == (UNITS if "dp_replicate" in degrees else 0)
        forwards = 1 if wanted.get("keep_gathered") else MICRO
        # Blocks are gathered again for the backward, or are not, and never for a recomputation.
        again = MICRO * BLOCKS if options.get("reshard_after_forward", True) else 0
        assert calls["gather"] == forwards * UNITS + again
        # A state exchange per block, recomputed or not.
        assert calls["exchange"] == MICRO * BLOCKS


def in_bfloat16(group):
    """Dtypes of weights in the forward, of what is kept, of what is reduced; error of gradients."""
    mesh = build_mesh(ParallelDims.resolve(4, dp_shard=4), "cpu")
    alone, cut = WithLoss(), WithLoss()
    blocks = cut.model.blocks
    shard(
        cut,
        sharding_mesh(mesh),
        blocks=blocks,
        exact=[blocks[0], blocks[2]],
        param_dtype=torch.bfloat16,
    )
    seen = []
    for block in blocks:
        block.token_mixer.register_forward_hook(
            lambda mixer, *_: seen.append({p.dtype for p in mixer.parameters()})
        )
    tokens = torch.randint(65, (4, LENGTH + 1))
    inputs, labels, part = tokens[:, :-1], tokens[:, 1:], SequenceShard.whole(LENGTH)
    rank = dist.get_rank(group)
    with torch.autocast("cpu", torch.bfloat16), Collectives() as reduced:
        alone(inputs, labels, part).backward()
        cut(inputs[rank : rank + 1], labels[rank : rank + 1], part).backward()
    errors = [
        ((mine.grad.full_tensor() - whole.grad).norm() / whole.grad.norm()).item()
        for mine, whole in zip(cut.parameters(), alone.parameters(), strict=True)
    ]
    kept = {tensor.dtype for p in cut.parameters() for tensor in (p, p.grad)}
    return seen, kept, reduced.dtypes, max(errors)


def test_bfloat16_is_gathered_and_float32_is_kept_and_reduced(pool):
    for seen, kept, reduced, error in pool.run(in_bfloat16, size=4):
        assert seen == [{torch.float32}, {torch.bfloat16}, {torch.float32}]
        assert kept == reduced == {torch.float32}
        assert error < 3e-2


def compiled(group, mode):
    """Error of the gradients of compiled, recomputed, cut blocks; exchanges; graph breaks."""
    rank, dims = dist.get_rank(group), ParallelDims.resolve(4, dp_shard=2, cp=2)
    mesh = build_mesh(dims, "cpu")
    alone, cut = WithLoss(), WithLoss()
    blocks = cut.model.blocks
    recompute(blocks, mode, offload=mode == "selective")
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=mode != "selective")
    shard(cut, sharding_mesh(mesh), blocks=blocks, exact=[blocks[0], blocks[2]])
    tokens = torch.randint(65, (dims.dp, 33))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    alone(inputs, labels, SequenceShard.whole(32)).backward()
    part, row = SequenceShard.split(32, mesh["cp"].get_group()), dims.dp_rank(rank)
    exchanges, start = [], lasp.exchange.start
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lasp.exchange, "start", lambda *a, **k: exchanges.append(1) or start(*a, **k))
        rows = slice(row, row + 1)
        cut(inputs[rows, part.token_slice], labels[rows, part.token_slice], part).backward()
    error = max(
        ((mine.grad.full_tensor() - whole.grad).abs().max() / whole.grad.abs().max()).item()
        for mine, whole in zip(cut.parameters(), alone.parameters(), strict=True)
    )
    counters = torch._dynamo.utils.counters
    return error, len(exchanges), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_blocks_can_be_cut_and_recomputed(pool, mode):
    for error, exchanges, graphs in pool.run(compiled, mode, size=4):
        assert error < 1e-5
        # One in the forward of each block and one in its backward.
        assert exchanges == 2 * BLOCKS
        # Blocks of a kind share a graph: those with LRPE, and those without.
        assert graphs == 2
