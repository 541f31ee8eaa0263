"""Gradients are summed over ranks, once per step."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.data import accumulate, replicate


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
