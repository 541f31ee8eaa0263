"""What crosses ranks: how much, how often, and with any timing."""

import functools
import random
import time

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp import exchange, shard
from lasp.exchange import ChunkChain, Transition, comm
from lasp.exchange.symmetric_memory import StateBuffer
from lasp.ops import chunked
from parallel import activation_checkpoint
from tests.lasp import cases, sharded
from tests.lasp.sharded import METHODS, Problem


class Sent:
    """Bytes of every state that this rank sends, by message or peer memory, with a delay of up to
    `delay` seconds before each message.

    The consistency check sends integers, which are not counted.
    """

    def __init__(self, delay=0.0, seed=0):
        self.bytes = []
        self._delay, self._chance = delay, random.Random(seed)

    def __enter__(self):
        self._calls = dist.isend, comm._all_gather, StateBuffer.put
        dist.isend = self._counting(dist.isend, 0)
        comm._all_gather = self._counting(comm._all_gather, 1)
        StateBuffer.put = self._counting_puts(StateBuffer.put)
        return self

    def __exit__(self, *error):
        dist.isend, comm._all_gather, StateBuffer.put = self._calls

    def _counting(self, call, place):
        def wrapped(*args, **kwargs):
            if args[place].is_floating_point():
                self.bytes.append(args[place].numel() * args[place].element_size())
                time.sleep(self._chance.uniform(0, self._delay))
            return call(*args, **kwargs)

        return wrapped

    def _counting_puts(self, call):
        def wrapped(buffer, transition, state_in, *, sends, **options):
            if sends:
                local = transition.local
                self.bytes.append(local.numel() * local.element_size())
            return call(buffer, transition, state_in, sends=sends, **options)

        return wrapped


def delayed_bits(group, problems, trials):
    """The same problems repeatedly, each message sent after a random delay."""
    with Sent(delay=0.001, seed=dist.get_rank(group)):
        return [sharded.run_all(group, problems) for _ in range(trials)]


def test_random_delays_change_no_bit(pool):
    documents = (0, 7, 20, 40)
    problems = [
        Problem(40, "ring", dtype=torch.float32),
        Problem(40, "ring", "zigzag", documents=documents, dtype=torch.float32),
        Problem(40, "all_gather", "zigzag", dtype=torch.float32),
        Problem(40, "doubling", documents=documents, dtype=torch.float32),
        Problem(40, "doubling", "zigzag", dtype=torch.float32),
    ]
    for trials in pool.run(delayed_bits, problems, 40, size=4):
        for trial in trials[1:]:
            for now, before in zip(trial, trials[0], strict=True):
                assert all(torch.equal(now[name], before[name]) for name in before)


def count_messages(group, method, layout, documents=None):
    """Bytes of this rank's messages in a forward and in a backward, at two lengths."""
    totals = []
    for T in (16, 300):
        q, k, v, log_decay, _ = cases.make_inputs(T, dtype=torch.float32)
        cu_seqlens = None
        if documents is not None:
            scaled = [T * x for x in documents]
            cu_seqlens = torch.tensor(scaled, dtype=torch.int32)
        k = k.requires_grad_()
        options = dict(group=group, exchange=method, layout=layout, cu_seqlens=cu_seqlens)
        with Sent() as forward:
            o = lasp.lightning_attention(q, k, v, log_decay, **options)
        with Sent() as backward:
            o.sum().backward()
        totals.append((forward.bytes, backward.bytes))
    return totals


STATE = 3 * 16 * 24 * 4


def test_the_ring_sends_one_state_whatever_the_length(pool):
    for rank, totals in enumerate(pool.run(count_messages, "ring", "contiguous", size=3)):
        for forward, backward in totals:
            assert forward == ([STATE] if rank < 2 else [])
            assert backward == ([STATE] if rank > 0 else [])


def test_the_ring_in_zigzag_sends_one_state_per_chunk(pool):
    # Up to the last rank, which passes the state to itself, and down again.
    for rank, totals in enumerate(pool.run(count_messages, "ring", "zigzag", size=3)):
        for forward, backward in totals:
            assert forward == backward == [STATE] * (1 if rank in (0, 2) else 2)


def test_all_gather_is_one_collective(pool):
    message = STATE + 3 * 4
    for layout, chunks in (("contiguous", 1), ("zigzag", 2)):
        for totals in pool.run(count_messages, "all_gather", layout, size=3):
            for forward, backward in totals:
                assert forward == backward == [chunks * message]


def test_doubling_sends_a_logarithm_of_states(pool):
    for rank, totals in enumerate(pool.run(count_messages, "doubling", "contiguous", size=4)):
        for forward, backward in totals:
            assert len(forward) == (2, 2, 1, 0)[rank]
            assert len(backward) == (0, 1, 2, 2)[rank]


@pytest.mark.parametrize("method", METHODS)
def test_only_ranks_that_share_a_document_exchange(pool, method):
    # Shards of one unit; a document over ranks 1 and 2, the other boundaries between documents.
    results = pool.run(count_messages, method, "contiguous", (0, 1, 3, 4), size=4)
    for rank, totals in enumerate(results):
        for forward, backward in totals:
            if method == "all_gather":
                # A collective: all take part, or none.
                assert len(forward) == len(backward) == 1
            else:
                assert (len(forward), len(backward)) == (rank == 1, rank == 2)
    for totals in pool.run(count_messages, method, "contiguous", (0, 1, 2, 3), size=3):
        assert totals == [([], []), ([], [])]


def send_before_receiving(group):
    """The state that enters; the last rank has it before the first rank has started."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    first, last = (dist.get_global_rank(group, place) for place in (0, size - 1))
    token = torch.zeros(1)
    if rank == 0:
        dist.recv(token, src=last, group=group, tag=7)
    state = torch.full((1, 2, 3, 4), float(rank))
    each = Transition(state, None)
    (entering,) = exchange.start([each], ChunkChain(group), method="ring").wait()
    if rank == size - 1:
        dist.send(token, dst=first, group=group, tag=7)
    return None if entering is None else float(entering.mean())


def test_the_ring_is_one_hop_if_nothing_passes_through(pool):
    assert pool.run(send_before_receiving, size=4) == [None, 0.0, 1.0, 2.0]


def returned_and_sent(group, layout):
    """True if a final state shares memory with a message, which NCCL may still be sending."""
    sent, isend = [], dist.isend
    q, k, v, log_decay, _ = cases.make_inputs(6, state=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "isend", lambda x, **options: sent.append(x) or isend(x, **options))
        _, final = lasp.lightning_attention(
            q, k, v, log_decay, output_final_state=True, group=group, layout=layout
        )
    return final.untyped_storage().data_ptr() in [x.untyped_storage().data_ptr() for x in sent]


@pytest.mark.parametrize("layout", shard.LAYOUTS)
def test_a_final_state_may_be_written_to(pool, layout):
    assert pool.run(returned_and_sent, layout, size=3) == [False] * 3


def kept_tensors(group, method):
    """Bytes saved for the backward beyond q, k, v, with a group minus on one device."""
    sizes = []
    for each in (group, None):
        q, k, v, log_decay, _ = cases.make_inputs(64, dtype=torch.float32)
        known = {x.data_ptr() for x in (q, k, v, log_decay)}
        saved = {}

        def pack(x, saved=saved, known=known):
            if x.data_ptr() not in known:
                saved[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            lasp.lightning_attention(
                q, k.requires_grad_(), v, log_decay, group=each, exchange=method
            )
        sizes.append(sum(saved.values()))
    return sizes[0] - sizes[1]


@pytest.mark.parametrize("method", METHODS)
def test_one_state_is_kept_for_the_backward(pool, method):
    first, *others = pool.run(kept_tensors, method, size=3)
    # An int64 on the host: which call it is.
    number = 8
    assert first == number
    for kept in others:
        # A factor per head may come with it.
        assert STATE + number <= kept <= STATE + number + 3 * 4


def new_states(group, method):
    """Tensors as large as a state that an exchange makes, forward and backward."""
    rank = dist.get_rank(group)
    made = []

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                made.append(result.numel() // state.numel())
            return result

    state = torch.full((1, 2, 16, 16), float(rank))
    for reverse in (False, True):
        each = Transition(state, state.new_ones(2, 1, 1))
        with Operators():
            exchange.start([each], ChunkChain(group, reverse=reverse), method=method).wait()
    return sum(made)


def test_memory_of_the_ring_does_not_grow_with_the_ranks(pool):
    # What is received and what is sent on, in each direction; less at the ends.
    for size, states in ((2, 1), (3, 4), (4, 4)):
        assert max(pool.run(new_states, "ring", size=size)) == states
    assert max(pool.run(new_states, "all_gather", size=4)) > 8


class Layer(torch.nn.Module):
    """An attention whose inputs are recomputed."""

    def __init__(self, group):
        super().__init__()
        inputs = cases.make_inputs(50, dtype=torch.float32, state=False)
        self.q, self.k, self.v, self.log_decay, _ = inputs
        self.to_device = sharded.device_of(group)
        self.group = group

    def forward(self, x):
        q, k, v, log_decay = (
            t.to(self.to_device) for t in (self.q, self.k, self.v, self.log_decay)
        )
        return lasp.lightning_attention(q * x, k * x, v, log_decay, group=self.group)


def keeping(layer, use_reentrant, x):
    once = activation_checkpoint.keeping_exchanges(layer)
    return torch.utils.checkpoint.checkpoint(once, x, use_reentrant=use_reentrant)


def checkpointed(group, how):
    """(gradients as without checkpointing?, states this rank sent with it)."""
    x = torch.ones(1, 50, 3, 16, device=sharded.device_of(group), requires_grad=True)

    def gradient_and_sends(layer):
        with Sent() as sent:
            layer(x).sum().backward()
        grad, x.grad = x.grad, None
        return grad, len(sent.bytes)

    if "by hand" in how:
        layer = functools.partial(keeping, Layer(group), "non-reentrant" not in how)
    elif "kept" in how:
        layer = activation_checkpoint.checkpointed(Layer(group))
    else:
        layer = functools.partial(
            torch.utils.checkpoint.checkpoint,
            Layer(group),
            use_reentrant=how == "reentrant",
        )
    if "compiled" in how:
        kept = layer
        layer = torch.compile(lambda x: kept(x), backend="aot_eager", fullgraph=True)
    plain_grad, _ = gradient_and_sends(Layer(group))
    grad, sends = gradient_and_sends(layer)
    return torch.allclose(grad, plain_grad, rtol=1e-6, atol=1e-6), sends


@pytest.mark.parametrize(
    "how, sends",
    [
        ("reentrant", [2, 3, 1]),
        ("non-reentrant", [2, 3, 1]),
        ("kept", [1, 2, 1]),
        ("kept compiled", [1, 2, 1]),
        ("kept by hand, reentrant", [1, 2, 1]),
        ("kept by hand, non-reentrant", [1, 2, 1]),
    ],
)
def test_checkpointing_sends_no_state_twice_if_the_exchange_is_kept(pool, how, sends):
    # Plain checkpointing repeats the exchange of the forward, on every rank alike.
    results = pool.run(checkpointed, how, size=3)
    assert all(equal for equal, _ in results)
    assert [count for _, count in results] == sends


def overlapping(group):
    """Events of a forward and of a backward, in the order this rank reaches them."""
    events = []

    def noting(event, call):
        def noted(*args, **kwargs):
            events.append(event)
            return call(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (exchange, "start"),
            (exchange.PendingExchange, "wait"),
            (chunked, "scan"),
            (chunked, "scan_dkdv"),
        ):
            patch.setattr(owner, name, noting(name, getattr(owner, name)))
        q, k, v, log_decay, _ = cases.make_inputs(8, state=False)
        o = lasp.lightning_attention(q, k.requires_grad_(), v, log_decay, group=group)
        forward, events[:] = list(events), []
        o.sum().backward()
    return forward, events


def test_the_backward_computes_dq_during_the_exchange(pool):
    for forward, backward in pool.run(overlapping, size=2):
        assert forward == ["start", "wait", "scan"]
        # dq needs no remote state, dk and dv do.
        assert backward == ["start", "scan", "wait", "scan_dkdv", "scan", "scan"]


def profiled_ranges(group):
    q, k, v, log_decay, _ = cases.make_inputs(8, state=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        o = lasp.lightning_attention(q, k.requires_grad_(), v, log_decay, group=group)
        o.sum().backward()
    names = {event.key for event in profile.key_averages()}
    return sorted(name for name in names if name.startswith("lasp::exchange"))


def test_exchanges_are_ranges_of_a_profile(pool):
    for names in pool.run(profiled_ranges, size=2):
        assert names == ["lasp::exchange.backward", "lasp::exchange.forward"]


@pytest.mark.parametrize("layout", shard.LAYOUTS)
def test_chunks_of_each_rank(pool, layout):
    chains = pool.run(describe_chain, layout, size=3)
    for rank, (forward, backward) in enumerate(chains):
        size = 6 if layout == "zigzag" else 3
        held = shard.chunks_of_rank(rank, 3, layout)
        assert forward == held
        assert backward == tuple(size - 1 - place for place in held[::-1])


def describe_chain(group, layout):
    chains = [ChunkChain(group, layout, reverse) for reverse in (False, True)]
    rank = dist.get_rank(group)
    for chain in chains:
        assert all(chain.group_rank(chunk) == rank for chunk in chain.local_chunks)
        for chunk in range(chain.num_chunks):
            assert chain.chunks_of(chain.group_rank(chunk)).count(chunk) == 1
    return tuple(chain.local_chunks for chain in chains)
