"""What a training step does on a GPU only: fused passes, and nothing that waits for the device."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lasp.ops.host_values import decay_rates
from lasp.tnl.heads import split_heads
from launch.distributed import start_copy
from launch.optimizer import clipped_step
from parallel.loss import chunked_cross_entropy


def error(actual, expected):
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


# 1,000 divides into parts of a row, 101 does not.
@pytest.mark.parametrize("vocab_size", [3000, 101])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_both_gradients(vocab_size, compiled):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 300, 64), torch.randn(vocab_size, 64) / 4
    labels = torch.randint(vocab_size, (1, 300))
    labels[0, ::7] = -100
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = (exact[0] @ exact[1].T)[0]
    wanted = F.cross_entropy(logits, labels[0], reduction="sum")
    grads = torch.autograd.grad(wanted, exact)
    leaves = [x.cuda().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", torch.bfloat16):
        loss = chunked_cross_entropy(*leaves, labels.cuda(), chunk_size=128, compiled=compiled)
    got = torch.autograd.grad(loss, leaves)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-3)
    assert got[1].dtype == torch.float32
    for actual, expected in zip(got, grads, strict=True):
        assert error(actual, expected) < 0.01


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-6)])
def test_the_joined_gradient_of_heads(activation, dtype, bound):
    torch.manual_seed(0)
    qkvu, grads = torch.randn(2, 33, 3, 4, 128).to(dtype), torch.randn(4, 2, 33, 3, 128).to(dtype)
    results = []
    for x, given in ((qkvu.double(), grads.double()), (qkvu.cuda(), grads.cuda())):
        x.requires_grad_()
        results += torch.autograd.grad(split_heads(x, activation), x, list(given))
    assert error(results[1], results[0]) < bound


def test_clipping_and_skipping_on_the_device():
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64, device="cuda")
    fused = copy.deepcopy(plain)
    adam = dict(lr=0.1, eps=1.0, fused=True)
    optimizers = [torch.optim.AdamW(each.parameters(), **adam) for each in (plain, fused)]
    yes, no = (torch.full((), value, device="cuda") for value in (True, False))
    for scale in (1e-3, 10.0):
        for module in (plain, fused):
            module.zero_grad()
            (module(torch.ones(1, 64, device="cuda")).sum() * scale).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        if norm > 1:
            torch.nn.utils.clip_grads_with_norm_(plain.parameters(), 1.0, norm)
        optimizers[0].step()
        clipped_step(optimizers[1], norm, 1.0, skip=no)
        for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    before = [p.detach().clone() for p in fused.parameters()]
    for p in fused.parameters():
        p.grad.fill_(torch.nan)
    clipped_step(optimizers[1], norm * torch.nan, 1.0, skip=yes)
    assert all(map(torch.equal, before, fused.parameters()))
    state = optimizers[1].state[fused.weight]
    assert state["step"] == 2 and state["exp_avg"].isfinite().all()


def test_a_copy_waits_for_nothing_that_comes_later():
    vector = torch.arange(3.0, device="cuda")
    wait = start_copy(vector)
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    done.record()
    assert wait() == [0, 1, 2]
    assert not done.query()


def test_a_decay_is_read_once_whatever_tensor_holds_it():
    log_decay = -torch.rand(4, device="cuda")
    rates = decay_rates(log_decay)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # As in a compiled backward.
        assert decay_rates(log_decay.detach()) is rates
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log_decay.sub_(1)
    assert decay_rates(log_decay.detach()) == tuple(log_decay.tolist())
