"""Ranks that disagree: a ValueError on every rank, and no rank is left waiting."""

import contextlib
import functools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp.exchange import consistency
from tests.lasp import cases, sharded
from tests.lasp.sharded import Problem


def disagree(group, field, known=False):
    """Rank 1 makes another call than the others; `known`: after calls of both kinds."""
    if known:
        call(group, field, odd=False)
        call(group, field, odd=True)
    call(group, field, odd=dist.get_rank(group) == 1)


def call(group, field, odd):
    q, k, v, log_decay, state = (
        x.to(sharded.device_of(group)) for x in cases.make_inputs(20, dtype=torch.float32)
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
    if field == "layout" and odd:
        kwargs["layout"] = "zigzag"
    if field in ("documents", "many documents"):
        total = 20 * dist.get_world_size(group)
        inner = (20, 25) if field == "documents" else range(1, total - 1)
        kwargs["cu_seqlens"] = torch.tensor([0, *inner, total - odd, total], dtype=torch.int32)
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
        k = k.requires_grad_()
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
    "layout": "disagree on layout.*contiguous.*zigzag",
    "documents": r"disagree on cu_seqlens.*\(0, 20, 25, 60, 60\).*\(0, 20, 25, 59, 60\)",
    "many documents": r"disagree on cu_seqlens.*digest",
    "lengths": "do not fit",
    "positive decay": "must be <= 0",
    "state": "initial_state is given on rank 1",
    "device": "k on meta: move both",
    "dimensions": "must have 4 dimensions",
    "scale is none": "scale is None: it must be a number",
    "gradient": "disagree on whether gradients of k and v are needed",
}


def check_disagreement(pool, field, known, size=3):
    # A rank left waiting would raise gloo's own error, after the group's timeout.
    for outcome in pool.outcomes(disagree, field, known, size=size):
        with pytest.raises(ValueError, match=FIELDS[field]):
            raise outcome
    # No message is left over: the next call of the same ranks works.
    sharded.check(pool, size, Problem(20, dtype=torch.float32))


@pytest.mark.parametrize("field", FIELDS)
def test_disagreement_is_a_value_error_on_every_rank(pool, field):
    check_disagreement(pool, field, known=False)


@pytest.mark.parametrize("field", ["dtype", "decay", "exchange"])
def test_calls_that_agreed_before_are_compared_again(pool, field):
    check_disagreement(pool, field, known=True)


@contextlib.contextmanager
def by_messages(few_ranks=16):
    """Compare as between hosts; all ranks of a group enter it together."""
    real = consistency._connections_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency, "_connections_of", lambda group: (real(group)[0], None))
        patch.setattr(consistency, "_FEW_RANKS", few_ranks)
        yield


def compare_by_messages(group, odd, few_ranks):
    """The rank `odd` passes another value."""
    with by_messages(few_ranks):
        for _ in range(3):
            consistency.PendingCheck(group, {"a": 1}).wait()
        try:
            consistency.PendingCheck(group, {"a": 2 if dist.get_rank(group) == odd else 1}).wait()
        except ValueError as error:
            consistency.PendingCheck(group, {"a": 1}).wait()
            return str(error)


# In rounds, as many ranks do, and all at once.
@pytest.mark.parametrize("few_ranks", [0, 16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_of_several_hosts_compare_by_messages(pool, size, few_ranks):
    for odd in range(size):
        for text in pool.run(compare_by_messages, odd, few_ranks, size=size):
            assert f"rank {odd}: 2" in text


def ways(group):
    """Whether shared memory compares: by messages, and by default."""
    with by_messages():
        checks = [consistency.PendingCheck(group, {"a": 1})]
    checks.append(consistency.PendingCheck(group, {"a": 1}))
    for check in checks:
        check.wait()
    # A function of the shared memory, or a method of messages.
    return [isinstance(check._all_equal, functools.partial) for check in checks]


def test_ranks_of_one_host_compare_in_shared_memory(pool):
    assert pool.run(ways, size=3) == [[False, True]] * 3


def order(group, out_of_step):
    """Two kinds of call; one rank makes them in the other order."""
    scales = (1.0, 0.5) if out_of_step and dist.get_rank(group) == 0 else (0.5, 1.0)
    q, k, v, log_decay, _ = cases.make_inputs(4, state=False)
    for scale in scales:
        lasp.lightning_attention(q, k, v, log_decay, scale=scale, group=group)


def test_calls_out_of_order(pool):
    pool.run(order, False, size=3)
    for outcome in pool.outcomes(order, True, size=3):
        with pytest.raises(ValueError, match=r"disagree on scale \(rank 0: 1.0, rank 1: 0.5"):
            raise outcome


def through(group, way, function):
    with way():
        return function(group)


def checked_while_busy(group):
    """The check of a call shares no message with what runs on the group meanwhile."""
    rank = dist.get_rank(group)
    token = torch.full((1,), float(rank))
    check = consistency.PendingCheck(group, {"a": 1})
    works = []
    if rank == 0:
        works.append(dist.irecv(token, src=dist.get_global_rank(group, 1), group=group))
    check.wait()
    if rank == 1:
        works.append(dist.isend(token, dst=dist.get_global_rank(group, 0), group=group))
    for work in works:
        work.wait()
    return float(token)


WAYS = [contextlib.nullcontext, by_messages]


@pytest.mark.parametrize("way", WAYS)
def test_a_check_waits_for_nothing_on_the_group(pool, way):
    assert pool.run(through, way, checked_while_busy, size=2) == [1.0, 1.0]


def one_is_late(group):
    """Seconds that a rank waits for one that never comes, once the group's timeout is a second."""
    fresh = dist.new_group()
    consistency.PendingCheck(fresh, {"a": 1}).wait()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), fresh)
    began = time.perf_counter()
    if dist.get_rank(group) == 0:
        return None
    with pytest.raises(RuntimeError, match="Timed out"):
        consistency.PendingCheck(fresh, {"a": 1}).wait()
    return time.perf_counter() - began


@pytest.mark.parametrize("way", WAYS)
def test_a_late_rank_is_waited_for_as_long_as_the_group_says(pool, way):
    for seconds in pool.run(through, way, one_is_late, size=4)[1:]:
        # A busy machine's seconds; the group began with a timeout of minutes.
        assert seconds < 30
