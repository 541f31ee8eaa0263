"""Dropout: its rate, and masks that depend on seed, layer, position and channel only."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig, TNLState
from lasp.tnl.dropout import DropoutKey, dropout
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.loss import chunked_cross_entropy
from parallel.mesh import full_tensor
from parallel.streaming import backward_in_segments
from parallel.tnl import tensor_parallel

CONFIG = TNLConfig(
    vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2, dropout=0.3
)
HYBRID = dataclasses.replace(CONFIG, layer_types="LSL")
SEEDS = torch.tensor([12, (1 << 62) - 5])


def make(config=CONFIG, dtype=torch.float64):
    torch.manual_seed(0)
    return TNL(config).to(dtype)


def batch_of(total):
    tokens = torch.randint(50, (2, total + 1), generator=torch.Generator().manual_seed(total))
    return tokens[:, :-1], tokens[:, 1:]


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def masks(rate, seeds, positions, channels, layer=1, place=0):
    key = DropoutKey.of(torch.tensor(seeds), torch.tensor(positions), rate).of_layer(layer)
    return dropout(torch.ones(len(seeds), len(positions), channels), key, place)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_values_are_kept_and_scaled_with_the_probability_of_the_rate(rate):
    y = masks(rate, range(4), range(500), 512)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
    # Of a million values, and of each sequence, position and channel: within five deviations.
    for dims in ((), (1, 2), (0, 2), (0, 1)):
        kept = (y > 0).double().mean(dims) if dims else (y > 0).double().mean()
        count = y.numel() / kept.numel()
        assert (kept - (1 - rate)).abs().max() < 5 * (rate * (1 - rate) / count) ** 0.5


def test_masks_of_other_seeds_layers_places_positions_and_channels_are_independent():
    base = dict(seeds=[7], positions=range(1000, 1600), channels=256)
    whole = masks(0.5, **base)
    others = [
        masks(0.5, **base | {"seeds": [8]}),
        masks(0.5, **base | {"seeds": [7 + (1 << 32)]}),
        masks(0.5, **base | {"positions": range(1001, 1601)}),
        masks(0.5, **base | {"positions": range(1000 + (1 << 32), 1600 + (1 << 32))}),
        masks(0.5, **base, layer=2),
        masks(0.5, **base, place=1),
        whole.roll(1, -1),
    ]
    for other in others:
        agree = (whole == other).double().mean().item()
        assert agree == pytest.approx(0.5, abs=5 * 0.5 / whole.numel() ** 0.5)


def test_gradients_pass_where_values_do():
    key = DropoutKey.of(SEEDS, torch.arange(9), 0.3)
    x = torch.randn(2, 9, 16, dtype=torch.bfloat16, requires_grad=True)
    y = dropout(x, key)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(x.grad != 0, y != 0)


def loss_and_grads(model, total=70, shard=None, **options):
    inputs, labels = batch_of(total)
    if shard is not None:
        inputs, labels = shard.take(inputs), shard.take(labels)
    hidden = model(inputs, shard, return_hidden=True, **options)
    loss = chunked_cross_entropy(hidden, model.head_weight, labels)
    loss.backward()
    return loss.detach(), [full_tensor(p.grad) for p in model.parameters()]


def test_only_training_has_dropout_and_torchs_seed_decides_it():
    model, plain = make(), make(dataclasses.replace(CONFIG, dropout=0.0))
    tokens, _ = batch_of(20)
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model.eval()(tokens), plain(tokens))
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(loss_and_grads(model)[0])
    assert losses[0] == losses[1] != losses[2]
    assert error(loss_and_grads(model)[0], loss_and_grads(plain)[0]) > 1e-3


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_have_the_masks_of_the_first_run(mode):
    expected = loss_and_grads(make())  # Drawn by the same seed, in `make`.
    model = make()
    checkpoint_blocks(model.blocks, mode)
    found = loss_and_grads(model)
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))


def over_ranks(group, config, layout):
    shard = SequenceShard.split(70, group, layout=layout)
    loss, grads = loss_and_grads(make(config), shard=shard, dropout_seeds=SEEDS)
    for each in (loss, *grads):
        dist.all_reduce(each, group=group)
    return loss, grads


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("config", [CONFIG, HYBRID], ids=["linear", "hybrid"])
def test_ranks_of_a_sequence_have_the_masks_of_one_device(pool, config, layout):
    loss, grads = loss_and_grads(make(config), dropout_seeds=SEEDS)
    for found, of_rank in pool.run(over_ranks, config, layout, size=3):
        assert error(found, loss) < 1e-6
        for (name, _), grad, truth in zip(
            make(config).named_parameters(), of_rank, grads, strict=True
        ):
            assert error(grad, truth) < 1e-5, name


def tensor_parallel_rank(group):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    model = tensor_parallel(make(dataclasses.replace(CONFIG, vocab_size=50)), mesh)
    try:
        tensor_parallel(make(), mesh, shard_sequence=True)
    except ValueError as problem:
        return *loss_and_grads(model, dropout_seeds=SEEDS), str(problem)


def test_tensor_parallel_ranks_have_the_masks_of_one_device(pool):
    loss, grads = loss_and_grads(make(), dropout_seeds=SEEDS)
    for found, of_rank, problem in pool.run(tensor_parallel_rank, size=2):
        assert error(found, loss) < 1e-10
        assert all(error(a, b) < 1e-5 for a, b in zip(of_rank, grads, strict=True))
        assert "dropout is 0.3 and shard_sequence is set" in problem


def test_a_sequence_in_segments_has_the_masks_of_the_whole():
    loss, grads = loss_and_grads(make(), dropout_seeds=SEEDS)
    model, (inputs, labels) = make(), batch_of(70)
    zeros = model.initial_states(2)

    def run(index, states, *, states_only):
        part = slice(30 * index, 30 * (index + 1))
        before = TNLState(list(states or zeros.layers), 30 * index)
        options = dict(states=before, dropout_seeds=SEEDS)
        if states_only:
            return None, model(inputs[:, part], states_only=True, **options).layers
        hidden, after = model(inputs[:, part], return_hidden=True, return_states=True, **options)
        return chunked_cross_entropy(hidden, model.head_weight, labels[:, part]), after.layers

    found, _ = backward_in_segments(run, 3)
    assert error(found, loss) < 1e-6
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert error(parameter.grad, grad) < 1e-5


def test_compiled_blocks_share_one_graph():
    model = make(dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    expected = loss_and_grads(make(dtype=torch.float32), dropout_seeds=SEEDS)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    found = loss_and_grads(model, dropout_seeds=SEEDS)
    # With LRPE and without.
    assert counter.frame_count == 2
    torch.testing.assert_close(found, expected)


def test_a_rate_out_of_range_is_refused():
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="it must be in 0 <= dropout < 1"):
            dataclasses.replace(CONFIG, dropout=rate)


def test_training_with_dropout_lowers_the_loss():
    model = make(dataclasses.replace(CONFIG, init_std=0.02, dropout=0.1), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(64).remainder(7).expand(2, -1)
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7
