"""Activation checkpointing changes memory and nothing else, and never repeats an exchange."""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from parallel.activation_checkpoint import EXCHANGE_OPS, checkpoint_blocks, checkpointed

LAYERS, T = 3, 33


class Counter(TorchDispatchMode):
    """Calls of each operator."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def gradients(group, mode):
    torch.manual_seed(0)
    config = dict(vocab_size=64, dim=32, num_layers=LAYERS, num_heads=2, glu_dim=64)
    model = TNL(TNLConfig.preset("tiny", **config))
    tokens = torch.randint(64, (1, T))
    checkpoint_blocks(model.blocks, mode)
    shard = SequenceShard.split(T, group)
    with Counter() as counter:
        model(shard.take(tokens), shard).square().sum().backward()
    calls = counter.calls
    exchanges = sum(calls[name] for name in EXCHANGE_OPS)
    return [p.grad for p in model.parameters()], list(model.state_dict()), calls, exchanges


def plain_and_checkpointed(group, mode):
    grads, names, calls, exchanges = gradients(group, "none")
    new_grads, new_names, new_calls, new_exchanges = gradients(group, mode)
    same = names == new_names and all(map(torch.equal, grads, new_grads))
    return same, (exchanges, new_exchanges), calls, new_calls


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_blocks_give_the_same_gradients_and_exchange_once(pool, mode):
    for same, exchanges, plain, calls in pool.run(plain_and_checkpointed, mode, size=2):
        assert same
        assert exchanges == (LAYERS, LAYERS)
        # The block does run twice: all of it, or only its cheap operators.
        assert (calls["aten::mm"] > plain["aten::mm"]) == (mode == "full")
        assert calls["aten::silu"] == 2 * plain["aten::silu"]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'some'.*none, full or selective"):
        checkpointed(nn.Linear(2, 2), "some")
