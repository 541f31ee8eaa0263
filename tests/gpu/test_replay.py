"""Repeated calls on GPUs give the bits of the call that was recorded."""

import threading
from unittest import mock

import pytest
import torch

import lasp
from lasp import replay
from lasp.exchange import shared_memory

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
# With Triton's scan, and with the Hopper scan where the GPU is one.
LENGTHS = [1024, 8192]


def make_inputs(T, seed=0, device="cuda", by_token=False):
    """q, k, v that need gradients, do and log_decay; memory of their own for every seed."""
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(device=device, dtype=torch.bfloat16, generator=generator)
    q, k, v, do = (torch.randn(1, T, 16, 128, **options) / 8 for _ in range(4))
    log_decay = lasp.decay.retention(16).to(device)
    if by_token:
        log_decay = log_decay * torch.rand(1, T, 16, device=device, generator=generator)
        log_decay.requires_grad_()
    return [x.requires_grad_() for x in (q, k, v)], do, log_decay


def run(leaves, do, log_decay, **options):
    o = lasp.lightning_attention(*leaves, log_decay, **options)
    if log_decay.requires_grad:
        leaves = [*leaves, log_decay]
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def recorded(kept):
    return sum(isinstance(each, replay.Recording) for each in kept.values())


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("T", LENGTHS)
def test_three_sets_of_tensors_take_turns(T):
    replay.forget()
    sets = [make_inputs(T, seed) for seed in range(3)]
    wanted = []
    for each in sets:
        replay.forget()
        wanted.append(run(*each))
    for _ in range(3):
        for each, of_each in zip(sets, wanted, strict=True):
            assert equal(run(*each), of_each)
    assert recorded(replay._of_device) == 2


@pytest.mark.parametrize("T", LENGTHS)
def test_two_threads_share_the_launches(T):
    """Each on a stream of its own, in threads that have not used CUDA before."""
    sets = [make_inputs(T, seed) for seed in range(2)]
    wanted = [run(*each) for each in sets]
    torch.cuda.synchronize()
    found, errors = [True, True], []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    found[i] &= equal(run(*sets[i]), wanted[i])
                torch.cuda.synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and found == [True, True]


@needs_two
@pytest.mark.parametrize("T", LENGTHS)
def test_the_second_gpu_while_the_first_is_current(T):
    assert torch.cuda.current_device() == 0
    wanted = run(*make_inputs(T, device="cuda:1"))
    for _ in range(3):
        assert equal(run(*make_inputs(T, device="cuda:1")), wanted)


@pytest.mark.parametrize("T", LENGTHS)
def test_a_graph_holds_nothing_of_a_recording(T):
    """Captured on a stream whose calls are recorded already."""
    leaves, do, log_decay = make_inputs(T)
    wanted = run(leaves, do, log_decay)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            run(leaves, do, log_decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(leaves, do, log_decay)
    replay.forget()
    torch.cuda.empty_cache()
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    assert equal(captured, wanted)


def over_ranks(group, exchange, graph, by_token=False):
    """Whether later calls, or a graph after its recordings are gone, have the bits of the first;
    and how many kinds of calls are recorded."""
    rank = torch.distributed.get_rank(group)
    leaves, do, log_decay = make_inputs(1024, seed=rank, by_token=by_token)
    options = dict(group=group, exchange=exchange)
    wanted = run(leaves, do, log_decay, **options)
    # On another stream everything is recorded anew.
    replay.forget(group)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [equal(run(leaves, do, log_decay, **options), wanted) for _ in range(5)]
    same = all(found)
    count = recorded(replay._of_groups[group])
    if graph:
        held = torch.cuda.CUDAGraph()
        with torch.cuda.graph(held, stream=stream, capture_error_mode="thread_local"):
            captured = run(leaves, do, log_decay, **options)
        replay.forget(group)
        torch.cuda.empty_cache()
        filler = torch.full((2**20,), float("nan"), device="cuda")
        held.replay()
        same &= equal(captured, wanted) and filler.isnan().all().item()
    torch.cuda.synchronize()
    return same, count


@needs_two
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_calls_over_ranks(pool, exchange, graph, by_token):
    assert pool.run(over_ranks, exchange, graph, by_token, size=2) == [(True, 2)] * 2


def without_shared_memory(group):
    with mock.patch.object(shared_memory, "host_id", return_value=""):
        other = torch.distributed.new_group()
        found = over_ranks(other, "all_gather", False)
        torch.distributed.destroy_process_group(other)
    return found


@needs_two
def test_ranks_that_compare_their_calls_by_messages(pool):
    assert pool.run(without_shared_memory, size=2) == [(True, 2)] * 2
