"""Recomputation changes memory and nothing else, and never repeats a state exchange."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from parallel.recompute import HostMemory, checkpointed, recompute

CONFIG = dict(vocab_size=64, dim=32, num_layers=3, num_heads=2, glu_dim=64)
T = 33


class Counter(TorchDispatchMode):
    """Calls of each operator."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] = self.calls.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def gradients(group, mode):
    torch.manual_seed(0)
    model = TNL(TNLConfig.preset("tiny", **CONFIG))
    tokens = torch.randint(64, (1, T))
    recompute(model.blocks, mode)
    shard = SequenceShard.split(T, group)
    with Counter() as counter:
        logits = model(tokens[:, shard.token_slice], shard=shard)
        logits.square().sum().backward()
    return [p.grad for p in model.parameters()], counter.calls, list(model.state_dict())


def on_a_rank(group, mode):
    plain, plain_calls, names = gradients(group, "none")
    again, again_calls, same_names = gradients(group, mode)
    assert names == same_names
    equal = all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    return equal, plain_calls, again_calls


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_give_the_same_gradients_and_exchange_once(pool, mode):
    for equal, plain_calls, again_calls in pool.run(on_a_rank, mode, size=2):
        assert equal
        layers = CONFIG["num_layers"]
        assert plain_calls["lasp::enter"] == again_calls["lasp::enter"] == layers
        assert again_calls["lasp::attend_backward"] == layers
        # The rest of the block did run twice: all of it, or what is cheap.
        again = mode == "full"
        assert (again_calls["aten::mm"] > plain_calls["aten::mm"]) == again
        assert again_calls["lasp::attend"] == (2 if again else 1) * layers
        assert again_calls["aten::silu"] == 2 * plain_calls["aten::silu"]


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="'some'.*none, full or selective"):
        checkpointed(nn.Linear(2, 2), "some")


class Squares(nn.Module):
    def forward(self, x, number):
        return x + x * x * number


class Watched(HostMemory):
    """Every tensor goes to the host, and the order of arrivals and departures is noted."""

    def __init__(self):
        super().__init__(minimum_bytes=0)
        self.events, self.handles = [], []

    def store(self, tensor, stay=False):
        stored = super().store(tensor, stay)
        self.handles.append(stored)
        return stored

    def load(self, stored):
        before = [each._returned is not None for each in self.handles]
        loaded = super().load(stored)
        after = [each._returned is not None for each in self.handles]
        self.events.append((self.handles.index(stored), before, after))
        return loaded


def run_squares(host, blocks=3):
    modules = [Squares() for _ in range(blocks)]
    for number, module in enumerate(modules, 1):
        checkpointed(module, "full", host, stay=host is not None and number == blocks)
    x = torch.linspace(-1, 1, 7, requires_grad=True)
    out = x * 1
    for number, module in enumerate(modules):
        out = module(out, number)
    out.sum().backward()
    return x.grad


def test_block_inputs_wait_on_the_host_and_return_one_ahead():
    host = Watched()
    assert torch.equal(run_squares(host), run_squares(None))
    # The last block's input never left; taking one starts the return of the one before it.
    assert [event[0] for event in host.events] == [2, 1, 0]
    (_, first, _), (_, second, _), (_, third, last) = host.events
    assert first == [False, False, True]
    assert second[:2] == [False, True] and third[:2] == [True, False]
    assert last[:2] == [False, False], "a tensor that was taken is held by nobody else"
    assert all(each._host is not None for each in host.handles[:2])


def test_small_tensors_and_weights_stay():
    host = HostMemory()
    small, numbers = torch.ones(3), torch.arange(10**6)
    weight = nn.Parameter(torch.ones(10**6))
    for tensor in (small, numbers, weight):
        assert host.store(tensor) is tensor and host.load(tensor) is tensor
    large = torch.rand(10**6)
    stored = host.store(large)
    assert stored is not large
    assert torch.equal(host.load(stored), large)


def with_host(group):
    """Gradients of a sharded sequence with block inputs on the host, and the exchanges."""
    outcomes = []
    for host in (None, HostMemory(minimum_bytes=0)):
        torch.manual_seed(0)
        model = TNL(TNLConfig.preset("tiny", **CONFIG))
        tokens = torch.randint(64, (1, T))
        for block in model.blocks:
            checkpointed(block, "full", host)
        shard = SequenceShard.split(T, group)
        with Counter() as counter:
            model(tokens[:, shard.token_slice], shard=shard).square().sum().backward()
        outcomes.append(([p.grad for p in model.parameters()], counter.calls["lasp::enter"]))
    (plain, calls), (again, same_calls) = outcomes
    return dist.get_rank(group), all(map(torch.equal, plain, again)), calls, same_calls


def test_the_host_changes_nothing(pool):
    for _, equal, calls, same_calls in pool.run(with_host, size=2):
        assert equal and calls == same_calls == CONFIG["num_layers"]
