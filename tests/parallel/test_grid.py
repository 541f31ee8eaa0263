"""Every mesh trains the same model: the launcher's own steps, over all layouts of 4 and 8 ranks."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from launch import train
from launch.config import load_config
from launch.distributed import DistContext, RankInfo
from launch.resolve import batching
from launch.trainer import train_step, validate
from parallel.mesh import MESH_AXES, ParallelDims, build_mesh, whole
from tests.distributed import Pool
from tests.launch.runs import flags

STEPS = 5
# 67 tokens: uneven shards.
SHAPE = dict(
    data__source="random",
    model__vocab_size=64,
    model__dim=32,
    model__num_layers=2,
    model__num_heads=8,
    model__glu_dim=48,
    training__seq_len=67,
    training__global_batch_size=8,
    training__max_norm=0.1,
    validation__steps=1,
)


def layouts(ranks):
    """All (dp_replicate, dp_shard, cp, tp) whose product is `ranks`."""
    degrees = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [each for each in itertools.product(degrees, repeat=4) if math.prod(each) == ranks]


def name(degrees):
    """Degrees other than 1."""
    pairs = zip(MESH_AXES, degrees, strict=True)
    return "-".join(f"{axis}{degree}" for axis, degree in pairs if degree > 1)


def trained(folder, place, mesh, **changes):
    """Losses and norms of STEPS steps, validation loss, first and last weights, first gradients."""
    replicate, shard, cp, tp = place.dims.degrees.values()
    layout = dict(
        parallelism__data_parallel_replicate_degree=replicate,
        parallelism__data_parallel_shard_degree=shard,
        parallelism__context_parallel_degree=cp,
        parallelism__tensor_parallel_degree=tp,
    )
    config = load_config(flags(job__dump_folder=folder, **(SHAPE | layout | changes)))
    world = DistContext(place, mesh)
    run = train.set_up(config, world, batching(config, place))
    first = weights_of(run.model)
    outcomes = [train_step(run, False)]
    gradients = {name: whole(p.grad).clone() for name, p in run.model.named_parameters()}
    outcomes += [train_step(run, False) for _ in range(STEPS - 1)]
    held_out = validate(run)
    curve = [(outcome.loss, outcome.grad_norm) for outcome in outcomes]
    return curve, held_out, first, weights_of(run.model), gradients


def weights_of(model):
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def on_one_rank(group, folder, degrees, changes):
    rank = dist.get_rank()
    dims = ParallelDims(**dict(zip(MESH_AXES, degrees, strict=True)), world_size=group.size())
    place = RankInfo(rank, rank, "gloo", torch.device("cpu"), dims)
    results = trained(folder, place, build_mesh(dims, "cpu"), **changes)
    # Weights and gradients are whole on every rank: one need send them.
    return results if rank == 0 else results[:2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    place = RankInfo(0, 0, "gloo", torch.device("cpu"), ParallelDims())
    return trained(tmp_path_factory.mktemp("alone"), place, None)


@pytest.fixture(scope="module")
def pool8():
    pool = Pool({8: tuple(range(8))})
    yield pool
    pool.stop()


def check(pool, tmp_path, degrees, alone, accumulation):
    dp = degrees[0] * degrees[1]
    local = 8 // dp // accumulation
    changes = dict(training__local_batch_size=local)
    outcomes = pool.run(on_one_rank, tmp_path, degrees, changes, size=math.prod(degrees))
    expected_curve, held_out, first, last, gradients = alone
    for curve, rank_held_out, *_ in outcomes:
        assert curve == outcomes[0][0], "ranks report different metrics"
        for got, expected in zip(curve, expected_curve, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
        assert rank_held_out == pytest.approx(held_out, rel=1e-5)
    _, _, rank_first, rank_last, rank_gradients = outcomes[0]
    for name, expected in first.items():
        assert torch.equal(rank_first[name], expected), f"{name} starts elsewhere"
    for got, wanted, bound in ((rank_gradients, gradients, 1e-5), (rank_last, last, 1e-3)):
        assert got.keys() == wanted.keys()
        for name, expected in wanted.items():
            error = (got[name] - expected).abs().max() / expected.abs().max()
            assert error < bound, f"{name} is off by {error:.1e}"


def test_clipping_is_part_of_it(alone):
    curve, _, first, last, gradients = alone
    assert all(norm > 2 * SHAPE["training__max_norm"] for _, norm in curve)
    assert all(not torch.equal(first[name], last[name]) for name in first)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("degrees", layouts(4), ids=name)
def test_four_ranks_train_as_one(pool, tmp_path, degrees, alone):
    check(pool, tmp_path, degrees, alone, accumulation=2)


@pytest.mark.parametrize("degrees", layouts(8), ids=name)
def test_eight_ranks_train_as_one(pool8, tmp_path, degrees, alone):
    check(pool8, tmp_path, degrees, alone, accumulation=1)
