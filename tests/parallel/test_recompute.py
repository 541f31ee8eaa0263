"""Recomputation changes memory and nothing else, and never repeats a state exchange."""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig
from parallel.recompute import checkpointed

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


def gradients(group, recompute):
    torch.manual_seed(0)
    model = TNL(TNLConfig.preset("tiny", **CONFIG))
    tokens = torch.randint(64, (1, T))
    if recompute:
        for block in model.blocks:
            checkpointed(block)
    shard = SequenceShard.split(T, group)
    with Counter() as counter:
        logits = model(tokens[:, shard.token_slice], shard=shard)
        logits.square().sum().backward()
    return [p.grad for p in model.parameters()], counter.calls, list(model.state_dict())


def on_a_rank(group):
    plain, plain_calls, names = gradients(group, recompute=False)
    again, again_calls, same_names = gradients(group, recompute=True)
    assert names == same_names
    equal = all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    return dist.get_rank(group), equal, plain_calls, again_calls


def test_recomputed_blocks_give_the_same_gradients_and_exchange_once(pool):
    for _, equal, plain_calls, again_calls in pool.run(on_a_rank, size=2):
        assert equal
        layers = CONFIG["num_layers"]
        assert plain_calls["lasp::enter"] == again_calls["lasp::enter"] == layers
        # The rest of the block did run twice.
        assert again_calls["aten::mm"] > plain_calls["aten::mm"]
        assert again_calls["lasp::attend_backward"] == layers
