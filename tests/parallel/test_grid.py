"""Every mesh trains the same model: steps of the launcher over all meshes of 4 and 8 ranks."""

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
from parallel.mesh import MESH_AXES, ParallelDims, build_mesh, full_tensor
from tests.launch.runs import flags

SLOW = pytest.mark.slow

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


def meshes(ranks):
    """All (dp_replicate, dp_shard, cp, tp) whose product is `ranks`."""
    degrees = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [each for each in itertools.product(degrees, repeat=4) if math.prod(each) == ranks]


def name(degrees):
    """Degrees other than 1."""
    pairs = zip(MESH_AXES, degrees, strict=True)
    return "-".join(f"{axis}{degree}" for axis, degree in pairs if degree > 1)


def trained(folder, info, mesh, **changes):
    """Losses and norms of STEPS steps, validation loss, first and last weights, first gradients."""
    replicate, shard, cp, tp = info.dims.degrees.values()
    degrees = dict(
        parallelism__data_parallel_replicate_degree=replicate,
        parallelism__data_parallel_shard_degree=shard,
        parallelism__context_parallel_degree=cp,
        parallelism__tensor_parallel_degree=tp,
    )
    config = load_config(flags(job__dump_folder=folder, **(SHAPE | degrees | changes)))
    context = DistContext(info, mesh)
    state = train.set_up(config, context, batching(config, info))
    first = weights_of(state.model)
    outcomes = [train_step(state)]
    gradients = {name: full_tensor(p.grad).clone() for name, p in state.model.named_parameters()}
    outcomes += [train_step(state) for _ in range(STEPS - 1)]
    held_out = validate(state)
    curve = [(outcome.loss, outcome.grad_norm) for outcome in outcomes]
    return curve, held_out, first, weights_of(state.model), gradients


def weights_of(model):
    return {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}


def on_one_rank(group, folder, degrees, changes):
    rank = dist.get_rank()
    dims = ParallelDims(**dict(zip(MESH_AXES, degrees, strict=True)), world_size=group.size())
    info = RankInfo(rank, rank, "gloo", torch.device("cpu"), dims)
    results = trained(folder, info, build_mesh(dims, "cpu"), **changes)
    # Weights and gradients are the same on every rank: one of them returns them.
    return results if rank == 0 else results[:2]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    info = RankInfo(0, 0, "gloo", torch.device("cpu"), ParallelDims())
    return trained(tmp_path_factory.mktemp("one_rank"), info, None)


def check(pool, tmp_path, degrees, one_rank, accumulation, bound=1e-5, **changes):
    dp = degrees[0] * degrees[1]
    changes |= dict(training__local_batch_size=8 // dp // accumulation)
    job = on_one_rank, tmp_path, degrees, changes
    outcomes = pool.run(*job, size=math.prod(degrees))
    expected_curve, held_out, first, last, gradients = one_rank
    for curve, rank_held_out, *_ in outcomes:
        assert curve == outcomes[0][0], "ranks report different metrics"
        for got, expected in zip(curve, expected_curve, strict=True):
            assert got == pytest.approx(expected, rel=bound)
        assert rank_held_out == pytest.approx(held_out, rel=bound)
    _, _, rank_first, rank_last, rank_gradients = outcomes[0]
    for name, expected in first.items():
        assert torch.equal(rank_first[name], expected), f"{name} starts with other values"
    for got, wanted, bound in ((rank_gradients, gradients, 1e-5), (rank_last, last, 1e-3)):
        assert got.keys() == wanted.keys()
        for name, expected in wanted.items():
            error = (got[name] - expected).abs().max() / expected.abs().max()
            assert error < bound, f"{name} is off by {error:.1e}"


def test_these_steps_clip_and_change_every_weight(one_rank):
    curve, _, first, last, gradients = one_rank
    assert all(norm > 2 * SHAPE["training__max_norm"] for _, norm in curve)
    assert all(not torch.equal(first[name], last[name]) for name in first)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("degrees", meshes(4), ids=name)
def test_four_ranks_train_as_one(pool, tmp_path, degrees, one_rank):
    check(pool, tmp_path, degrees, one_rank, accumulation=2)


# Segments of 25, 25 and 17 tokens, each over all cp ranks.
@pytest.mark.parametrize(
    "degrees",
    [
        (1, 4, 1, 1),
        (1, 1, 2, 2),
        *(pytest.param(x, marks=SLOW) for x in [(1, 1, 4, 1), (4, 1, 1, 1), (2, 1, 2, 1)]),
    ],
    ids=name,
)
def test_four_ranks_train_in_segments_as_one_on_whole_sequences(pool, tmp_path, degrees, one_rank):
    check(pool, tmp_path, degrees, one_rank, accumulation=2, training__segment_len=25)


@pytest.fixture(scope="module")
def one_rank_carried(tmp_path_factory):
    info = RankInfo(0, 0, "gloo", torch.device("cpu"), ParallelDims())
    return trained(tmp_path_factory.mktemp("one_rank_carried"), info, None, **CARRIED)


CARRIED = dict(
    training__segment_len=67, training__segment_gradient="truncated", training__carry_state=None
)


@pytest.mark.parametrize("degrees", [(2, 1, 2, 1), (1, 1, 2, 2)], ids=name)
def test_four_ranks_carry_states_as_one(pool, tmp_path, degrees, one_rank_carried):
    # States of earlier steps add their rounding to that of the weights.
    check(pool, tmp_path, degrees, one_rank_carried, accumulation=2, bound=1e-4, **CARRIED)


# Each axis beside cp and beside tp; ten heads, for FSDP also shards of uneven numbers of them.
LEARNED = dict(model__decay="learned", model__num_heads=10, model__dim=40)


@pytest.fixture(scope="module")
def one_rank_learned(tmp_path_factory):
    info = RankInfo(0, 0, "gloo", torch.device("cpu"), ParallelDims())
    return trained(tmp_path_factory.mktemp("one_rank_learned"), info, None, **LEARNED)


def test_learned_decays_move(one_rank_learned):
    _, _, first, last, gradients = one_rank_learned
    for kind in ("weight", "bias"):
        name = f"blocks.1.token_mixer.decay_proj.{kind}"
        assert not first[name].any() and gradients[name].all() and last[name].all()


@pytest.mark.parametrize(
    "degrees",
    [
        (1, 4, 1, 1),
        (1, 1, 2, 2),
        *(pytest.param(x, marks=SLOW) for x in [(1, 2, 1, 2), (2, 1, 2, 1)]),
    ],
    ids=name,
)
def test_four_ranks_train_a_learned_decay_as_one(pool, tmp_path, degrees, one_rank_learned):
    check(pool, tmp_path, degrees, one_rank_learned, accumulation=2, **LEARNED)


# Only with eight ranks can three axes be larger than 1. The other meshes are larger degrees of what
# four ranks have, and the second with three axes differs from two of four ranks by cp only.
THREE_AXES = {(1, 2, 2, 2)}


@pytest.mark.parametrize(
    "degrees",
    [pytest.param(x, marks=() if x in THREE_AXES else SLOW) for x in meshes(8)],
    ids=name,
)
def test_eight_ranks_train_as_one(pool8, tmp_path, degrees, one_rank):
    check(pool8, tmp_path, degrees, one_rank, accumulation=1)
