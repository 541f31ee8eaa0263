"""What a call over ranks remembers from earlier calls never reaches another kind of call."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

import lasp
from tests.lasp import cases, sharded
from tests.lasp.sharded import Problem


def test_calls_of_many_kinds_in_turn_equal_the_definition(pool):
    """Fails if what is remembered leaves out anything that the result depends on."""
    wide = dict(dtype=torch.float32)
    kinds = [
        Problem(60),
        Problem(60, layout="zigzag"),
        Problem(60, rates=-60.0),
        Problem(40, **wide),
        Problem(60, lengths=(20, 30, 10)),
        Problem(60, lengths=(10, 20, 30), method="doubling"),
        Problem(60, documents=(0, 25, 60)),
        Problem(60, documents=(0, 20, 40, 60)),
        Problem(60, documents=(0, 25, 60), layout="zigzag"),
        Problem(60, documents=(0, 25, 60), lengths=(30, 20, 10)),
    ]
    sharded.check(pool, 3, *kinds, *kinds[::-1])


def sums(group):
    """The sum of 1 + global rank over the ranks of the group up to this one."""
    x = torch.full((1, 1, 1, 1), 1.0 + dist.get_rank())
    one = torch.ones_like(x)
    return lasp.lightning_attention(one, one, x, group=group).item()


def in_groups_of_equal_size(group):
    """Sums in groups of the same ranks in another order, each destroyed before the next is made;
    how many of those groups are still in memory."""
    found, kept = [sums(group)], []
    for order in ((3, 2, 1, 0), (0, 1, 2, 3), (3, 2, 1, 0)):
        other = dist.new_group(list(order), sort_ranks=False)
        found.append((sums(other), sums(group), sums(other)))
        dist.destroy_process_group(other)
        kept.append(weakref.ref(other))
        del other
    gc.collect()
    return found, sum(each() is not None for each in kept)


def test_groups_of_equal_size_are_told_apart(pool):
    up, down = (1.0, 3.0, 6.0, 10.0), (10.0, 9.0, 7.0, 4.0)
    for rank, (found, kept) in enumerate(pool.run(in_groups_of_equal_size, size=4)):
        backward = (down[rank], up[rank], down[rank])
        assert found[0] == up[rank]
        assert found[1] == found[3] == backward
        assert found[2] == (up[rank], up[rank], up[rank])
        assert kept == 0


def with_decays(group):
    """Outputs for a decay, for the same tensor changed in place, and for another one; each with
    what it should be, computed anew."""
    q, k, v, log_decay, _ = cases.make_inputs(8, dtype=torch.float32, state=False)
    here = slice(4 * dist.get_rank(group), 4 * dist.get_rank(group) + 4)
    pairs = []
    for change in (None, -1.0, -200.0, None):
        if change is None:
            log_decay = log_decay.clone() - 0.25
        else:
            log_decay.fill_(change)
        mine = (x[:, here].clone().requires_grad_() for x in (q, k, v))
        o = lasp.lightning_attention(*mine, log_decay, group=group)
        whole = lasp.lightning_attention(q, k, v, log_decay)
        pairs.append((o.detach(), whole[:, here]))
    return pairs


def test_a_decay_that_was_changed_or_replaced_is_used(pool):
    for pairs in pool.run(with_decays, size=2):
        for o, expected in pairs:
            torch.testing.assert_close(o, expected)
        assert not torch.allclose(pairs[0][0], pairs[1][0])


def late_disagreement(group, what):
    """Two calls that agree, and one where rank 1 changed something in place."""
    q, k, v, log_decay, _ = cases.make_inputs(8, dtype=torch.float32, state=False)
    lengths = [8, 8]
    options = dict(group=group, cu_seqlens=torch.tensor([0, 5, 16], dtype=torch.int32))
    for step in range(3):
        if step == 2 and dist.get_rank(group) == 1:
            if what == "log_decay":
                log_decay.mul_(2)
            elif what == "cu_seqlens":
                options["cu_seqlens"][1] = 6
            else:
                lengths[:] = [7, 9]
        lasp.lightning_attention(q, k, v, log_decay, shard_lengths=lengths, **options)


@pytest.mark.parametrize(
    "what, message",
    [
        ("log_decay", "disagree on log_decay"),
        ("cu_seqlens", r"disagree on cu_seqlens.*\(0, 5, 16\).*\(0, 6, 16\)"),
        ("shard_lengths", "rank 1 of the group holds 8 tokens, but its shard is 9"),
    ],
)
def test_a_remembered_call_is_compared_by_value(pool, what, message):
    for outcome in pool.outcomes(late_disagreement, what, size=2):
        with pytest.raises(ValueError, match=message):
            raise outcome
