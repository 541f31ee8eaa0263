"""What a call over ranks remembers from the calls before, and when it goes past the dispatcher."""

import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import lasp
from lasp import shard
from lasp.exchange import ChunkChain
from tests.lasp import cases, sharded
from tests.lasp.sharded import Problem


def test_calls_of_other_kinds_one_after_another(pool):
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
        found.append((sums(other), sums(group), sums(other), ChunkChain(other, reverse=True).local_chunks))
        dist.destroy_process_group(other)
        kept.append(weakref.ref(other))
        del other
    gc.collect()
    return found, sum(each() is not None for each in kept)


def test_groups_of_equal_size_are_told_apart(pool):
    up, down = (1.0, 3.0, 6.0, 10.0), (10.0, 9.0, 7.0, 4.0)
    for rank, (found, kept) in enumerate(pool.run(in_groups_of_equal_size, size=4)):
        backward = (down[rank], up[rank], down[rank], (rank,))
        assert found[0] == up[rank]
        assert found[1] == found[3] == backward
        assert found[2] == (up[rank], up[rank], up[rank], (3 - rank,))
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


def test_a_decay_that_was_changed_or_replaced_is_seen(pool):
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


class Counter(TorchDispatchMode):
    """Calls of this library's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("lasp::"):
            self.calls.append(name.split("::")[1])
        return func(*args, **(kwargs or {}))


def both_ways(group, layout, packed, initial, with_final):
    """Results past the dispatcher and through it, and the operators seen on the second way."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    q, k, v, log_decay, state = cases.make_inputs(12, dtype=torch.float32, N=2 if packed else None)
    options = dict(group=group, layout=layout, output_final_state=with_final)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 17, 12 * size], dtype=torch.int32)
    # Without k and v, the backward has nothing to exchange.
    results = []
    for needing in (slice(0, 3), slice(0, 1)):
        for watched in (False, True):
            leaves = [x.clone() for x in (q, k, v)]
            if initial and (packed or rank == 0):
                leaves.append(state.clone())
                options["initial_state"] = leaves[3]
            needed = leaves[needing] + (leaves[3:] if needing.stop == 3 else [])
            for x in needed:
                x.requires_grad_()
            # On the way past the dispatcher there is none to be called.
            counter = Counter() if watched else mock.patch.object(torch.ops, "lasp", None)
            with counter:
                outputs = lasp.lightning_attention(*leaves[:3], log_decay, **options)
                outputs = outputs if with_final else (outputs,)
                sum(x.square().sum() for x in outputs).backward()
            results.append(([*outputs, *(x.grad for x in needed)], getattr(counter, "calls", None)))
    return results


@pytest.mark.parametrize("layout", shard.LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "states"])
def test_who_watches_sees_operators_and_nothing_else_differs(pool, layout, packed, more):
    for results in pool.run(both_ways, layout, packed, more, more, size=2):
        for (plain, _), (watched, calls) in zip(results[::2], results[1::2], strict=True):
            assert calls == ["state_fwd", "attn_fwd", "attn_bwd"]
            assert len(plain) == len(watched)
            assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
