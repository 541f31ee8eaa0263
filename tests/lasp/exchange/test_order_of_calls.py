"""Ranks that run backwards in different orders, leave one out, or run one more call."""

import pytest
import torch
import torch.distributed as dist

import lasp
from parallel.activation_checkpoint import EXCHANGE_OPS
from tests.lasp import cases


def attention(group, heads=3):
    q, k, v, log_decay, _ = cases.make_inputs(10, dtype=torch.float32, state=False)
    q, k, v = (x[:, :, :heads].clone().requires_grad_() for x in (q, k, v))
    return lasp.lightning_attention(q, k, v, log_decay[:heads], group=group).sum()


def softmax(group):
    q, k, v = (torch.ones(1, 10, 2, 8, requires_grad=True) for _ in range(3))
    return lasp.softmax_attention(q, k, v, group=group).sum()


def previous_tokens(group):
    x = torch.ones(1, 10, 4, requires_grad=True)
    return lasp.exchange_previous_tokens(x, 3, group=group).sum()


def recomputed(group):
    """All of a call is run again in the backward, but for the exchange."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    ops = [getattr(torch.ops.lasp, name.split("::")[1]).default for name in EXCHANGE_OPS]
    q = torch.ones(1, 10, 2, 8, requires_grad=True)

    def run(q):
        return lasp.lightning_attention(q, 2 * q, 3 * q, group=group).sum()

    return checkpoint(
        run,
        q,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(ops),
    )


CALLS = {
    "attention": attention,
    "softmax": softmax,
    "previous tokens": previous_tokens,
    "recomputed": recomputed,
}


def backwards(group, call, is_swapped):
    """Two equal calls; the odd rank runs their backwards in the other order."""
    losses = [CALLS[call](group) for _ in range(2)]
    if is_swapped and dist.get_rank(group) == 1:
        losses.reverse()
    for loss in losses[::-1]:
        loss.backward()


@pytest.mark.parametrize("call", CALLS)
def test_swapped_backwards_of_equal_calls_raise_on_every_rank(pool, call):
    pool.run(backwards, call, False, size=3)
    for outcome in pool.outcomes(backwards, call, True, size=3):
        with pytest.raises(ValueError, match="disagree on which forward the backward belongs to"):
            raise outcome
    # No message is left over.
    pool.run(backwards, call, False, size=3)


def test_a_repeated_call_is_compared_too(pool):
    # By now the calls of this kind are recorded, if they can be.
    for _ in range(4):
        pool.run(backwards, "attention", False, size=2)
    for outcome in pool.outcomes(backwards, "attention", True, size=2):
        with pytest.raises(ValueError, match="disagree on which forward"):
            raise outcome


def other_heads(group):
    losses = [attention(group, heads) for heads in (3, 2)]
    if dist.get_rank(group) == 0:
        losses.reverse()
    for loss in losses:
        loss.backward()


def left_out(group):
    loss = attention(group)
    if dist.get_rank(group) != 1:
        loss.backward()
    attention(group)


def one_more(group):
    loss = attention(group)
    if dist.get_rank(group) == 1:
        attention(group)
    loss.backward()


def another_operation(group):
    attention(group) if dist.get_rank(group) == 1 else softmax(group)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (other_heads, "which forward the backward belongs to"),
        (left_out, r"operation .*backward of lightning_attention.*rank 1: 'lightning_attention'"),
        (one_more, r"operation .*backward of lightning_attention.*rank 1: 'lightning_attention'"),
        (another_operation, r"operation .*softmax_attention.*rank 1: 'lightning_attention'"),
    ],
)
def test_calls_in_another_order_raise_on_every_rank(pool, function, what):
    for outcome in pool.outcomes(function, size=3):
        with pytest.raises(ValueError, match=f"disagree on (the )?{what}"):
            raise outcome
