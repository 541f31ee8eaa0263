"""Calls that are repeated as recorded do what the first one did, with their own tensors."""

import contextlib
import ctypes
import gc
import sys
import weakref
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lasp
from lasp import attention, functional, ops, replay
from lasp.context import CPContext
from lasp.exchange import consistency
from lasp.exchange.symmetric_memory import StateBuffer
from lasp.ops import send_recv_state
from tests.lasp.launches import pretended

# One segment, segments that the scan sums, segments that a kernel combines.
LENGTHS = {"single": 100, "folded": 1500, "combined": 40000}


class Kernels:
    """Launches in place of a GPU's: their kernels, and names of their tensors."""

    def __init__(self):
        self.launches = []

    def __call__(self, launch, programs, addresses):
        self.launches.append((launch._kernel.__name__, programs, tuple(addresses)))

    def named(self, **tensors):
        """The launches so far, with tensors by these names, others by the order of their use."""
        names = {0: None} | {x.data_ptr(): name for name, x in tensors.items()}
        for _, _, addresses in self.launches:
            for address in addresses:
                names.setdefault(address, f"other {len(names)}")
        found = [(*rest, [names[a] for a in addresses]) for *rest, addresses in self.launches]
        self.launches.clear()
        return found


def make_inputs(T=1500, H=4, D=128, dtype=torch.bfloat16, **options):
    q, k, v = (torch.randn(1, T, H, D).to(dtype).requires_grad_(**options) for _ in range(3))
    return q, k, v, torch.randn(1, T, H, D).to(dtype)


def run(q, k, v, do, log_decay, **options):
    o = lasp.lightning_attention(q, k, v, log_decay, **options)
    leaves = dict(q=q, k=k, v=v)
    if log_decay is not None and log_decay.requires_grad:
        leaves["log_decay"] = log_decay
    grads = torch.autograd.grad(o, tuple(leaves.values()), do)
    grads = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return dict(q=q, k=k, v=v, do=do, o=o) | grads


def recorded(name="forward"):
    kept = replay._of_device
    return [x for key, x in kept.items() if isinstance(x, replay.Recording) and key[0] == name]


@pytest.mark.parametrize("with_decay", [True, False])
@pytest.mark.parametrize("T", LENGTHS.values(), ids=LENGTHS.keys())
def test_later_calls_launch_what_the_first_did(T, with_decay):
    kernels = Kernels()
    with pretended(kernels):
        decays = [lasp.decay.retention(4) if with_decay else None for _ in range(3)]
        given = [{} if x is None else dict(log_decay=x) for x in decays]
        run(*make_inputs(T), decays[0])  # Makes the zeros that stand for no decay.
        kernels.launches.clear()
        replay.forget()
        first = run(*make_inputs(T), decays[0])
        want = kernels.named(**first, **given[0])
        assert {"scan_kernel"} <= {name for name, *_ in want}
        assert len(recorded("forward")) == len(recorded("backward")) == 1
        with (
            mock.patch.object(functional, "attn_fwd", side_effect=AssertionError),
            mock.patch.object(functional, "attn_bwd", side_effect=AssertionError),
        ):
            for log_decay, of_call in zip(decays[1:], given[1:], strict=True):
                again = run(*make_inputs(T), log_decay)
                assert kernels.named(**again, **of_call) == want
                for name, x in again.items():
                    assert (x.shape, x.stride(), x.dtype) == (
                        first[name].shape, first[name].stride(), first[name].dtype
                    )  # fmt: skip


CHANGES = {
    "length": dict(T=1501),
    "heads": dict(H=5),
    "dtype": dict(dtype=torch.float16),
    "no gradient": dict(requires_grad=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_specs_are_another_kind_of_call(change):
    with pretended():
        for _ in range(2):
            lasp.lightning_attention(*make_inputs()[:3])
        assert len(recorded()) == 1
        for _ in range(2):
            lasp.lightning_attention(*make_inputs(**CHANGES[change])[:3])
        assert len(recorded()) == 2


def test_other_options_and_strides_are_another_kind_of_call():
    q, k, v, _ = make_inputs()
    wide = torch.randn(1, 1500, 4, 256, dtype=torch.bfloat16)[..., :128].requires_grad_()
    with pretended():
        for n, (inputs, options) in enumerate(
            [
                ((q, k, v), {}),
                ((q, k, v), dict(scale=0.5)),
                ((q, k, v), dict(output_final_state=True)),
                ((wide, k, v), {}),
                ((q.detach(), k.detach(), v.detach()), {}),
            ]
        ):
            lasp.lightning_attention(*inputs, **options)
            assert len(recorded()) == n + 1


def test_what_cannot_be_repeated_runs_in_full_every_time():
    q, k, v, _ = make_inputs()
    state = torch.zeros(1, 4, 128, 128)
    boundaries = torch.tensor([0, 700, 1500], dtype=torch.int32)
    odd = torch.zeros(q.numel() + 8, dtype=q.dtype)[1:][: q.numel()].view(q.shape)
    assert odd.data_ptr() % 16 == 2
    with pretended(), mock.patch.object(functional, "attn_fwd", wraps=functional.attn_fwd) as full:
        for n in range(1, 6):
            lasp.lightning_attention(q, k, v, initial_state=state)
            lasp.lightning_attention(q, k, v, cu_seqlens=boundaries)
            lasp.lightning_attention(q, k.detach(), v)  # Of equal specs, with equal addresses:
            lasp.lightning_attention(q, q, v)
            lasp.lightning_attention(odd, k, v)
            lasp.lightning_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
            assert full.call_count >= 5 * n


def test_equal_tensors_do_not_decide_for_different_ones():
    """q and k of the first call are one tensor, those of the next are not."""
    kernels = Kernels()
    with pretended(kernels):
        q, k, v, _ = make_inputs(requires_grad=False)
        lasp.lightning_attention(q, q, v)
        kernels.launches.clear()
        for _ in range(3):
            lasp.lightning_attention(q, k, v)
            assert all("k" in names or "q" in names for *_, names in kernels.named(q=q, k=k))


def test_refused_decays_are_refused_again():
    q, k, v, _ = make_inputs()
    log_decay = lasp.decay.retention(4)
    with pretended():
        for _ in range(2):
            lasp.lightning_attention(q, k, v, log_decay)
        log_decay[2] = 0.5
        with pytest.raises(ValueError, match="log_decay of head 2 is 0.5"):
            lasp.lightning_attention(q, k, v, log_decay)
        with pytest.raises(ValueError, match="requires a gradient"):
            lasp.lightning_attention(q, k, v, lasp.decay.retention(4).requires_grad_())


@pytest.mark.parametrize(
    "option", [dict(exchange="tree"), dict(layout="striped"), dict(shard_lengths=(-1,))], ids=str
)
def test_refused_options_are_refused_again(option):
    """Also without a group, where they change nothing."""
    q, k, v, _ = make_inputs()
    with pretended():
        for _ in range(2):
            lasp.lightning_attention(q, k, v)
        with pytest.raises(ValueError, match=next(iter(option))):
            lasp.lightning_attention(q, k, v, **option)


def test_transforms_of_functorch_are_refused_for_the_same_reason():
    q, k, v, _ = make_inputs()
    with pretended(), pytest.raises(RuntimeError, match="setup_context"):
        torch.vmap(lasp.lightning_attention)(q[None], k[None], v[None])


def test_a_decay_without_values_is_left_to_the_checks_of_all_ranks():
    """A rank that raised before them would make the others wait."""
    x = torch.ones(1, 8, 4, 16)
    context = CPContext(mock.Mock(torch.distributed.ProcessGroup))
    tensors = x, x, x, torch.ones(4, device="meta"), None, None
    options = 1.0, False, False, context
    with pretended():
        assert attention._remembered_call("forward", tensors, options) is ops.PLAIN_CALL


def remembered(tensor, group=None):
    """The call that GPUs would remember, of a tensor that says it is on one."""
    triton = SimpleNamespace(has_hooks=lambda: False, current_stream=lambda device: 7)
    with mock.patch.object(ops, "_triton", lambda: triton):
        return ops.remembered_call("forward", (tensor,), (), group)


@pytest.mark.parametrize("is_capturing", [False, True])
def test_a_cuda_graph_holds_no_memory_of_a_recording(is_capturing):
    """What a group's recordings hold is freed with the group, or earlier."""
    group = mock.Mock(torch.distributed.ProcessGroup)
    tensor = mock.Mock(wraps=torch.ones(4), is_cuda=True, get_device=lambda: 0)
    with mock.patch("torch.cuda.is_current_stream_capturing", lambda: is_capturing):
        call = remembered(tensor, group)
    assert (call is ops.PLAIN_CALL) == is_capturing


def test_accelerators_that_the_kernels_do_not_serve_need_no_triton():
    tensor = mock.Mock(is_cuda=False, get_device=lambda: 0)
    with mock.patch.object(ops, "_triton", side_effect=ImportError):
        assert ops.remembered_call("forward", (tensor,), ()) is ops.PLAIN_CALL


def test_second_derivatives_are_refused_not_wrong():
    q, k, v, do = make_inputs(dtype=torch.float32)
    with pretended():
        for _ in range(3):
            o = lasp.lightning_attention(q, k, v)
            (dq,) = torch.autograd.grad(o, q, do.requires_grad_(), create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                dq.sum().backward()


def test_a_kernel_of_other_hands_is_not_left_out():
    """A call that runs an operator of torch beside its launches is never repeated."""
    q, k, v, _ = make_inputs()
    scan = functional.ops.backend

    def other(x):
        x + 1
        return scan(x)

    with pretended(), mock.patch.object(functional.ops, "backend", other):
        from lasp.ops import triton

        scan = lambda x: triton  # noqa: E731
        for _ in range(3):
            lasp.lightning_attention(q, k, v)
        assert not recorded()


def record(note, *tensors):
    """What is recorded of a call that does nothing but `note`."""
    replay.forget()
    call = replay.Call("forward", tensors, (), stream=0)
    with call.record():
        note()
    call.finish(())
    return recorded()


def test_a_view_at_the_address_of_a_tensor_is_not_taken_for_it():
    x, called = torch.zeros(4, 4), []
    assert len(record(lambda: replay.note_call(called.append, x), x)) == 1
    assert not record(lambda: replay.note_call(called.append, x[:2]), x)
    assert called[0] is x and called[1].shape == (2, 4)


def test_odd_constants_are_left_to_other_variants_of_the_kernel():
    x, constant = torch.zeros(4), torch.zeros(8)

    def note(constant):
        replay.note_constants(constant)
        replay.note_launch(lambda device: print, 1, 0, (x, constant))

    assert len(record(lambda: note(constant), x)) == 1
    assert not record(lambda: note(constant[1:]), x)
    replay.forget()


def count_calls(function):
    """Calls of Python functions, and of functions in C, while function() runs."""
    counts = {"call": 0, "c_call": 0}

    def note(frame, event, argument):
        if event in counts:
            counts[event] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counts["call"], counts["c_call"]


def test_what_a_repeated_call_costs_the_host():
    """Forward and backward of one layer; of these, torch's own part is half."""
    inputs = make_inputs(4096, 16)
    log_decay = lasp.decay.retention(16)
    with pretended():
        full = count_calls(lambda: run(*inputs, log_decay))
        repeated = count_calls(lambda: run(*inputs, log_decay))
    assert repeated[0] <= 135 and repeated[1] <= 150, (full, repeated)
    assert full[0] > 3 * repeated[0], (full, repeated)


def floats_at(address, count):
    """Memory as an array; operators of torch would be seen by the recorder."""
    return np.frombuffer((ctypes.c_float * count).from_address(address), dtype=np.float32)


SIZE = 2 * 128 * 128


def states_over_ranks(group, shares_memory):
    """The state that entered rank 1 in calls whose local states are their number, by all_gather;
    whether the last was repeated; and the number of exchanges that the next check compares."""
    rank, entered, calls = dist.get_rank(group), [], iter(range(1, 100))

    def kernel(launch, programs, addresses):
        name = launch._kernel.__name__
        if name == "state_kernel":
            floats_at(addresses[3], SIZE)[:] = next(calls)
        if name == "scan_kernel" and rank == 1:
            entered.append(np.unique(floats_at(addresses[4], SIZE)).tolist())

    q, k, v = (torch.zeros(1, 64, 2, 128) for _ in range(3))
    connections, shared = consistency._connections_of(group)
    found = connections, shared if shares_memory else None
    with (
        pretended(kernel),
        mock.patch.object(consistency, "_connections_of", lambda group: found),
    ):
        for _ in range(4):
            lasp.lightning_attention(q, k, v, group=group, exchange="all_gather")
        kept = replay._of_groups.get(group, {})
        repeated = [x for x in kept.values() if isinstance(x, replay.Recording)]
        lasp.lightning_attention(q, k, v, group=group)  # Messages are never repeated.
    return entered, len(repeated), consistency._exchanges[group]


@pytest.mark.parametrize("shares_memory", [True, False], ids=["one host", "two hosts"])
def test_exchanges_are_repeated_with_their_checks(pool, shares_memory):
    outcomes = pool.run(states_over_ranks, shares_memory, size=2)
    (_, first, _), (entered, second, exchanges) = outcomes
    assert entered[:4] == [[1.0], [2.0], [3.0], [4.0]]
    assert (first, second) == (1, 1)
    assert exchanges >= 5


class Buffer(StateBuffer):
    """The ring's in peer memory, on the CPU: it launches, and nothing is sent."""

    def __init__(self, rank, ranks):
        self._rank, self.timeout, self._send_recv_state = rank, timedelta(60), send_recv_state
        self.ranks = ranks
        sides = [(torch.zeros(SIZE, dtype=torch.int64), torch.zeros(64, dtype=torch.int32))] * 2
        self._buffers = dict.fromkeys((rank - 1, rank, rank + 1), sides)
        self.forks, self.joins = [], 0

    @contextlib.contextmanager
    def on_stream(self, *tensors):
        replay.note_call(self._fork, *tensors)
        yield

    def _fork(self, *tensors):
        self.forks.append([None if x is None else x.shape for x in tensors])

    def _join(self):
        self.joins += 1


def ring_in_memory(group, by_token):
    """Of three calls of a kind: launches of each, forks and joins so far; how many are kept."""
    kernels, buffer = Kernels(), Buffer(dist.get_rank(group), range(2))
    seen, inputs = [], make_inputs(64, 2)
    log_decay = -torch.rand(1, 64, 2) if by_token else None
    if by_token:
        log_decay.requires_grad_()
    with pretended(kernels), mock.patch("lasp.exchange.ring.find_buffer", return_value=buffer):
        run(*inputs, log_decay, group=group)  # Makes the constants.
        for _ in range(3):
            kernels.launches.clear()
            run(*inputs, log_decay, group=group)
            launches = [(name, programs) for name, programs, _ in kernels.launches]
            seen.append((launches, len(buffer.forks), buffer.joins))
        kept = [x for x in replay._of_groups[group].values() if isinstance(x, replay.Recording)]
    return seen, buffer.forks, len(kept)


@pytest.mark.parametrize("by_token", [False, True])
def test_the_ring_in_memory_is_repeated(pool, by_token):
    for seen, forks, kept in pool.run(ring_in_memory, by_token, size=2):
        assert kept == 2
        first, *others = seen
        assert [name for name, *_ in first[0]].count("send_recv_state_kernel") == 2
        for n, (launches, *counts) in enumerate(others, start=1):
            assert launches == first[0]
            # Forward and backward; a join by the exchange's wait, one before dq of the backward.
            assert counts == [first[1] + 2 * n, first[2] + 3 * n]
        assert forks[:2] == forks[2:4] == forks[4:6] == forks[6:]


def recordings_over_two_hosts(group):
    """How many calls are kept, of ranks 1 to 3 on one host."""
    rank, inputs = dist.get_rank(group), make_inputs(64, 2, dtype=torch.float32)
    buffer = Buffer(rank, range(1, 4)) if rank > 0 else None
    with pretended(), mock.patch("lasp.exchange.ring.find_buffer", return_value=buffer):
        for _ in range(4):
            run(*inputs, None, group=group)
        kept = replay._of_groups[group].values()
        return sum(isinstance(x, replay.Recording) for x in kept)


def test_ranks_that_send_no_message_repeat_the_ring_over_hosts(pool):
    """Beside others that run in full: a message goes from rank 0 to rank 1, or back."""
    assert pool.run(recordings_over_two_hosts, size=4) == [0, 0, 2, 2]


def of_a_group_that_ends(group):
    """How many recordings its calls left, and whether it is still there afterwards."""
    own = dist.new_group()
    q, k, v, do = make_inputs(64, 2, dtype=torch.float32)
    with pretended():
        for _ in range(3):
            run(q, k, v, do, None, group=own, exchange="all_gather")
        kept = sum(isinstance(x, replay.Recording) for x in replay._of_groups[own].values())
        reference = weakref.ref(own)
        dist.destroy_process_group(own)
        del own
        gc.collect()
        return kept, reference() is not None


def test_recordings_end_with_their_group(pool):
    assert pool.run(of_a_group_that_ends, size=4, timeout=60) == [(2, False)] * 4


def disagreeing(group):
    q, k, v = (torch.zeros(1, 64, 2, 128) for _ in range(3))
    with pretended():
        for n in range(6):
            scale = 2.0 if n == 5 and dist.get_rank(group) == 1 else 1.0
            kept = [*replay._of_groups.get(group, {}).values()]
            assert n < 5 or any(isinstance(x, replay.Recording) for x in kept)
            lasp.lightning_attention(q, k, v, scale=scale, group=group, exchange="all_gather")


def test_ranks_that_disagree_in_a_repeated_call_all_raise(pool):
    for outcome in pool.outcomes(disagreeing, size=2):
        with pytest.raises(ValueError, match="disagree on scale"):
            raise outcome
