"""The model cut over ranks is the model on one device: logits, loss, gradients, states."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig, TNLState

CONFIG = TNLConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)

HYBRID = dataclasses.replace(CONFIG, layer_types="LSL", num_key_value_heads=2)

CUTS = [(0, 50, 100), (0, 1, 63), (0, 7, 64, 100), (0, 40, 40, 63), (0, 0, 1, 1)]


def make(config, dtype):
    torch.manual_seed(0)
    return TNL(config).to(dtype)


def batch_of(total):
    generator = torch.Generator().manual_seed(total)
    tokens = torch.randint(50, (2, total + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]  # shifted before the cut


def entering_state(config, dtype):
    generator = torch.Generator().manual_seed(7)
    # States are float32 or, in a float64 model on the CPU, float64.
    shapes = [
        (2, 2, 333, 2, 8) if config.is_softmax(i) else (2, 4, config.key_dim(i), 8)
        for i in range(3)
    ]
    layers = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return TNLState(layers, 333)


def loss_and_grads(model, tokens, labels, total, shard, states):
    logits, leaving = model(tokens, shard, states=states, return_states=True)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return logits.detach(), loss.detach(), grads, leaving


def on_one_rank(group, config, cuts, dtype, exchange, with_state, told):
    rank, total = dist.get_rank(group), cuts[-1]
    lengths = tuple(stop - start for start, stop in pairwise(cuts)) if told else None
    shard = SequenceShard(cuts[rank], cuts[rank + 1], total, group, exchange, lengths=lengths)
    tokens, labels = (x[:, shard.token_slice] for x in batch_of(total))
    states = entering_state(config, dtype) if with_state else None
    model = make(config, dtype)
    logits, loss, grads, leaving = loss_and_grads(model, tokens, labels, total, shard, states)
    for tensor in (loss, *grads.values()):
        dist.all_reduce(tensor, group=group)
    last = [x.detach() for x in leaving.layers]
    return logits, loss, grads, last, leaving.position


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_state", [False, True])
def test_sharded_model_is_the_whole_model(pool, cuts, dtype, tolerance, with_state):
    check(pool, cuts, dtype, tolerance, "ring", with_state)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "with_state", "told"),
    [
        (torch.float64, 1e-7, True, True),
        (torch.float64, 1e-7, True, False),
        (torch.float32, 1e-5, False, True),
    ],
)
def test_sharded_hybrid_is_the_whole_model(pool, cuts, dtype, tolerance, with_state, told):
    """Whether a shard knows all lengths, or the ranks ask each other."""
    check(pool, cuts, dtype, tolerance, "ring", with_state, HYBRID, told)


def zigzag(group, config, total, exchange):
    """Every rank's tokens, logits, gradients, and what it leaves: (position, states)."""
    shard = SequenceShard.split(total, group, exchange, layout="zigzag")
    tokens, labels = (shard.take(x) for x in batch_of(total))
    model = make(config, torch.float64)
    logits, _, grads, leaving = loss_and_grads(model, tokens, labels, total, shard, None)
    for grad in grads.values():
        dist.all_reduce(grad, group=group)
    states = [x.detach() for x in leaving.layers] if shard.is_last else None
    return shard.positions(), logits, grads, leaving.position, states


@pytest.mark.parametrize("total", [2, 62, 100])
@pytest.mark.parametrize(("exchange", "size"), [("ring", 3), ("all_gather", 2), ("doubling", 4)])
def test_zigzag_shards_are_the_whole_model(pool, exchange, size, total):
    logits, _, grads, leaving = loss_and_grads(
        make(HYBRID, torch.float64), *batch_of(total), total, None, None
    )
    results = pool.run(zigzag, HYBRID, total, exchange, size=size)
    for here, rank_logits, rank_grads, position, states in results:
        if len(here):
            assert error(rank_logits, logits[:, here]) < 1e-7
            assert position == here.max() + 1
        for name, grad in grads.items():
            if grad.abs().max() > 0:
                assert error(rank_grads[name], grad) < (1e-5 if name.endswith("theta") else 1e-7)
        for mine, wanted in zip(states or (), leaving.layers, strict=False):
            assert error(mine, wanted) < 1e-7
    assert sum(states is not None for *_, states in results) == 1


@pytest.mark.parametrize("exchange", ["all_gather", "doubling"])
def test_other_exchanges(pool, exchange):
    check(pool, (0, 7, 64, 100), torch.float32, 1e-5, exchange, False)


def check(pool, cuts, dtype, tolerance, exchange, with_state, config=CONFIG, told=False):
    total, size = cuts[-1], len(cuts) - 1
    options = (config, cuts, dtype, exchange, with_state, told)
    results = pool.run(on_one_rank, *options, size=size)
    states = entering_state(config, dtype) if with_state else None
    logits, loss, grads, leaving = loss_and_grads(
        make(config, dtype), *batch_of(total), total, None, states
    )
    assert error(torch.cat([result[0] for result in results], 1), logits) < tolerance
    for name, state in enumerate(leaving.layers):
        assert error(results[-1][3][name], state) < tolerance
    assert results[-1][4] == leaving.position == total + (333 if with_state else 0)
    for _, rank_loss, rank_grads, _, _ in results:
        assert error(rank_loss, loss) < tolerance
        # In float64 too, the rates' own gradient is stored in float32.
        for name, grad in grads.items():
            if grad.abs().max() > 0:
                assert error(rank_grads[name], grad) < max(tolerance, 1e-5 * name.endswith("theta"))
