"""The operator over ranks: every rank, every gradient, against one rank's float64 definition."""

import functools
import random
import time

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp import exchange
from lasp.exchange import guard, peers
from parallel import recompute
from tests.lasp import cases

METHODS = sorted(exchange.METHODS)
SIZES = (1, 2, 3, 4)


def cut(total, size, how):
    """Borders of the shards: even, or uneven with empty ones."""
    if how == "even":
        return [total * rank // size for rank in range(size + 1)]
    borders = {1: [], 2: [total - 1], 3: [0, total // 5], 4: [total // 3, total // 3, total]}[size]
    return [0, *borders, total]


def device_of(group):
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def sharded(group, total, how, method, dtype, with_initial, scale=0.3):
    """This rank's part of what `cases.expected` gives for the whole sequence."""
    q, k, v, log_decay, state = cases.make_inputs(total, B=2, H=5, dtype=dtype)
    do, dfinal = cases.make_output_grads(v, state)
    q, k, v, log_decay, state, do, dfinal = (
        x.to(device_of(group)) for x in (q, k, v, log_decay, state, do, dfinal)
    )
    borders = cut(total, dist.get_world_size(group), how)
    rank = dist.get_rank(group)
    here = slice(borders[rank], borders[rank + 1])
    leaves = [x[:, here].detach().clone().requires_grad_() for x in (q, k, v)]
    initial = state.clone().requires_grad_() if with_initial and rank == 0 else None
    o, final = lasp.lightning_attention(
        *leaves,
        log_decay,
        scale=scale,
        initial_state=initial,
        output_final_state=True,
        group=group,
        exchange=method,
    )
    # The whole sequence's gradients, cut as the outputs are; the final state is the last rank's.
    last = rank == dist.get_world_size(group) - 1
    torch.autograd.backward((o, final), (do[:, here], dfinal if last else dfinal * 0))
    results = dict(o=o, state=final, dq=leaves[0].grad, dk=leaves[1].grad, dv=leaves[2].grad)
    dinitial = None if initial is None else initial.grad.cpu()
    return {name: x.detach().cpu() for name, x in results.items()}, dinitial


def check(pool, size, total, how="even", method="ring", dtype=torch.float64, with_initial=True):
    """Join what the ranks computed and compare it with the definition on one."""
    inputs = cases.make_inputs(total, B=2, H=5, dtype=dtype)
    inputs = inputs if with_initial else (*inputs[:4], None)
    truth = cases.expected(*inputs, scale=0.3)
    results = pool.run(sharded, total, how, method, dtype, with_initial, size=size)
    joined = {
        name: torch.cat([of_rank[name] for of_rank, _ in results], dim=1)
        for name in ("o", "dq", "dk", "dv")
    }
    joined["state"] = results[-1][0]["state"]
    if with_initial:
        joined["dinitial"] = results[0][1]
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    cases.assert_close(joined, truth, bound, f"{method} {size} ranks, {total} tokens")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["even", "uneven"])
def test_equals_one_rank(pool, size, how, method):
    check(pool, size, 100, how, method)


@pytest.mark.parametrize("total", [1, 2, 3, 63, 1000])
def test_any_length_even_fewer_tokens_than_ranks(pool, total):
    check(pool, 4, total, with_initial=False)


@pytest.mark.parametrize("size", SIZES)
def test_in_float32(pool, size):
    check(pool, size, 333, dtype=torch.float32)


def final_state_gradients(group):
    """Each rank's own final state in the loss: its gradient reaches all earlier ranks."""
    q, k, v, log_decay, _ = cases.make_inputs(90, state=False)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    borders = cut(90, size, "even")
    here = slice(borders[rank], borders[rank + 1])
    leaves = [x[:, here].clone().requires_grad_() for x in (k, v)]
    _, final = lasp.lightning_attention(
        q[:, here], *leaves, log_decay, output_final_state=True, group=group
    )
    ((rank + 1) * final).sum().backward()
    return [x.grad for x in leaves]


def test_gradients_of_every_final_state(pool):
    results = pool.run(final_state_gradients, size=3)
    q, k, v, log_decay, _ = cases.make_inputs(90, state=False)
    k, v = k.requires_grad_(), v.requires_grad_()
    for rank, stop in enumerate(cut(90, 3, "even")[1:]):
        _, state = lasp.reference.quadratic(q[:, :stop], k[:, :stop], v[:, :stop], log_decay)
        ((rank + 1) * state).sum().backward()
    for i, whole in enumerate((k, v)):
        joined = torch.cat([grads[i] for grads in results], dim=1)
        assert cases.relative_error(joined, whole.grad) < 1e-12


def delayed_bits(group, trials):
    """The same problem again and again, each message sent after a random delay."""
    send, gather = dist.isend, peers._all_gather
    chance = random.Random(dist.get_rank(group))

    def late(call):
        def wrapped(*args, **kwargs):
            time.sleep(chance.uniform(0, 0.004))
            return call(*args, **kwargs)

        return wrapped

    dist.isend, peers._all_gather = late(send), late(gather)
    try:
        return [
            [sharded(group, 61, "uneven", method, torch.float32, True)[0] for method in METHODS]
            for _ in range(trials)
        ]
    finally:
        dist.isend, peers._all_gather = send, gather


def test_random_delays_change_no_bit(pool):
    for trials in pool.run(delayed_bits, 200, size=4, timeout=100):
        for trial in trials[1:]:
            for now, before in zip(trial, trials[0], strict=True):
                assert all(torch.equal(now[name], before[name]) for name in before)


def count_messages(group, method):
    """Bytes this rank sends in a forward and in a backward, guard apart."""
    sent = []
    send, gather = dist.isend, peers._all_gather

    def counted_send(tensor, *args, **kwargs):
        sent.append(tensor.numel() * tensor.element_size())
        return send(tensor, *args, **kwargs)

    def counted_gather(out, tensor, *args, **kwargs):
        if tensor.is_floating_point():
            sent.append(tensor.numel() * tensor.element_size())
        return gather(out, tensor, *args, **kwargs)

    dist.isend, peers._all_gather = counted_send, counted_gather
    totals = []
    try:
        for T in (16, 300):
            q, k, v, log_decay, _ = cases.make_inputs(T, B=2, dtype=torch.float32)
            q = q.requires_grad_()
            o = lasp.lightning_attention(q, k, v, log_decay, group=group, exchange=method)
            forward, sent[:] = list(sent), []
            o.sum().backward()
            totals.append((forward, list(sent)))
            sent.clear()
    finally:
        dist.isend, peers._all_gather = send, gather
    return totals


def test_the_ring_sends_one_state_whatever_the_length(pool):
    one_state = 2 * 3 * 16 * 24 * 4
    for rank, totals in enumerate(pool.run(count_messages, "ring", size=3)):
        for forward, backward in totals:
            assert forward == ([one_state] if rank < 2 else [])
            assert backward == ([one_state] if rank > 0 else [])


def test_all_gather_is_one_collective(pool):
    for totals in pool.run(count_messages, "all_gather", size=3):
        assert all(len(forward) == len(backward) == 1 for forward, backward in totals)


def checkpointed(group, how):
    """(gradients as without checkpointing?, states this rank sent with it)."""
    q, k, v, log_decay, _ = (
        x.to(device_of(group)) for x in cases.make_inputs(50, dtype=torch.float32)
    )
    q = q.requires_grad_()

    class Layer(torch.nn.Module):
        def forward(self, q):
            return lasp.lightning_attention(q * 2, k, v, log_decay, group=group)

    def count_sends(layer):
        sent, send = [], dist.isend
        dist.isend = lambda *args, **kwargs: (sent.append(1), send(*args, **kwargs))[1]
        try:
            layer(q).sum().backward()
        finally:
            dist.isend = send
        grad, q.grad = q.grad, None
        return grad, len(sent)

    if how == "kept":
        layer = recompute.checkpointed(Layer())
    else:
        layer = functools.partial(
            torch.utils.checkpoint.checkpoint, Layer(), use_reentrant=how == "reentrant"
        )
    plain_grad, _ = count_sends(Layer())
    grad, sends = count_sends(layer)
    return torch.equal(grad, plain_grad), sends


@pytest.mark.parametrize(
    "how, sends", [("reentrant", [2, 3, 1]), ("non-reentrant", [2, 3, 1]), ("kept", [1, 2, 1])]
)
def test_checkpointing(pool, how, sends):
    # Plain checkpointing repeats the forward's exchange, on every rank alike; with the policy of
    # parallel.recompute the entering state is kept and nothing is sent twice.
    results = pool.run(checkpointed, how, size=3)
    assert all(equal for equal, _ in results)
    assert [count for _, count in results] == sends


def compiled(group):
    q, k, v, log_decay, _ = cases.make_inputs(50, dtype=torch.float32)

    def layer(q, k, v):
        return lasp.lightning_attention(q * 2, k, v, log_decay, group=group).sin()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = function(*leaves)
        o.sum().backward()
        results.append([o, *(x.grad for x in leaves)])
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*results, strict=True))


def test_compiles_without_a_graph_break(pool):
    assert all(pool.run(compiled, size=2, timeout=110))


def disagree(group, field):
    """Rank 1 calls with something else than the others."""
    odd = dist.get_rank(group) == 1
    q, k, v, log_decay, state = (
        x.to(device_of(group)) for x in cases.make_inputs(20, dtype=torch.float32)
    )
    kwargs = dict(group=group)
    if field == "dtype" and odd:
        q, k, v = q.half(), k.half(), v.half()
    if field == "heads" and odd:
        q, k, v, log_decay = q[:, :, :2], k[:, :, :2], v[:, :, :2], log_decay[:2]
    if field == "head size" and odd:
        v = v[..., :20]
    if field == "batch" and odd:
        q, k, v = (x.expand(2, *x.shape[1:]) for x in (q, k, v))
    if field == "decay" and odd:
        log_decay = log_decay * 0.999
    if field == "no decay" and odd:
        log_decay = None
    if field == "scale" and odd:
        kwargs["scale"] = 0.5
    if field == "exchange" and odd:
        kwargs["exchange"] = "all_gather"
    if field == "lengths" and odd:
        v = v[:, :-1]
    if field == "positive decay" and odd:
        log_decay = -log_decay
    if field == "state" and odd:
        kwargs["initial_state"] = state
    if field == "device" and odd:
        k = k.to("meta")
    if field == "dimensions" and odd:
        k = k[0, 0, 0, 0]
    if field == "scale is none" and odd:
        kwargs["scale"] = None
    if field == "gradient" and odd:
        q = q.requires_grad_()
    lasp.lightning_attention(q, k, v, log_decay, **kwargs)


FIELDS = {
    "dtype": "disagree on dtype.*float32.*float16",
    "heads": r"disagree on batch, heads.*\(1, 3, 16, 24\).*\(1, 2, 16, 24\)",
    "head size": r"disagree on batch, heads.*\(1, 3, 16, 20\)",
    "batch": r"disagree on batch, heads.*\(2, 3, 16, 24\)",
    "decay": "disagree on log_decay",
    "no decay": "disagree on log_decay.*None",
    "scale": "disagree on scale.*1.0.*0.5",
    "exchange": "disagree on exchange.*ring.*all_gather",
    "lengths": "do not fit",
    "positive decay": "must be <= 0",
    "state": "initial_state is given on rank 1",
    "device": "k on meta: move both",
    "dimensions": "must have 4 dimensions",
    "scale is none": "scale is None: it must be a number",
    "gradient": "disagree on whether a gradient is needed",
}


@pytest.mark.parametrize("field", FIELDS)
def test_disagreement_is_a_value_error_on_every_rank(pool, field):
    begun = time.monotonic()
    for outcome in pool.outcomes(disagree, field, size=3, timeout=20):
        assert isinstance(outcome, ValueError), outcome
        with pytest.raises(ValueError, match=FIELDS[field]):
            raise outcome
    assert time.monotonic() - begun < 5
    # The pool is in order: the next call of the same ranks works.
    check(pool, 3, 20)


def packed_over_ranks(group):
    q, k, v, log_decay, _ = cases.make_inputs(20, state=False)
    cu_seqlens = torch.tensor([0, 8, 40], dtype=torch.int32)
    lasp.lightning_attention(q, k, v, log_decay, cu_seqlens=cu_seqlens, group=group)


def test_packed_documents_over_ranks_are_refused_for_now(pool):
    for outcome in pool.outcomes(packed_over_ranks, size=2):
        with pytest.raises(ValueError, match="not supported yet: pack documents on one"):
            raise outcome


def not_a_member(group):
    q, k, v, log_decay, _ = cases.make_inputs(5, state=False)
    # What `new_group` returns to ranks that are not in it.
    lasp.lightning_attention(q, k, v, log_decay, group=dist.GroupMember.NON_GROUP_MEMBER)


def test_a_group_that_this_rank_is_not_in(pool):
    (outcome,) = pool.outcomes(not_a_member, size=1)
    with pytest.raises(ValueError, match="not a member of `group`"):
        raise outcome


def agree_twice(group):
    guard.agree(group, {"a": 1}, every_time=True)
    guard.agree(group, {"a": 1 if dist.get_rank(group) else 2}, every_time=True)


def test_the_guard_compares_again_when_a_call_changes(pool):
    for outcome in pool.outcomes(agree_twice, size=2):
        with pytest.raises(ValueError, match="rank 0: 2, rank 1: 1"):
            raise outcome
