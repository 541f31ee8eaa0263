"""The check in shared memory: ranks that are late, disagree or cannot share; what is left."""

import gc
import mmap
import os
import random
import re
import resource
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lasp.exchange import consistency, shared_memory

# Seconds after which a process that still runs is a failure.
DEADLINE = 60


class Died(NamedTuple):
    """In place of what a process gives that ends without giving anything."""

    code: int


def run(function, *args, size, folder):
    """The results of `function(group, *args)` on each rank.

    Processes of their own, since some of them die; forked from one that has imported everything.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, str(folder / "store"), rank, size, function, args)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    outcomes = []
    try:
        for rank, (process, pipe) in enumerate(started):
            assert pipe.poll(DEADLINE), f"rank {rank} of {size} gave no answer"
            try:
                outcomes.append(pipe.recv())
            except EOFError:
                process.join()
                outcomes.append(Died(process.exitcode))
    finally:
        for process, pipe in started:
            pipe.close()
            process.kill()
            process.join()
    return outcomes


def _work(pipe, store, rank, size, function, args):
    torch.set_num_threads(1)
    store = dist.FileStore(store, size)
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    pipe.send(function(dist.group.WORLD, *args))
    # Until it is killed: the others may not be done, and would see it end.
    time.sleep(2 * DEADLINE)


def agrees(group, value):
    """True if the ranks found their values equal."""
    try:
        consistency.PendingCheck(group, {"a": value}).wait()
    except ValueError:
        return False
    return True


def error_of(group):
    """(the error of a check that fails, after how many seconds)."""
    began = time.perf_counter()
    with pytest.raises(RuntimeError) as caught:
        consistency.PendingCheck(group, {"a": 1}).wait()
    return str(caught.value), time.perf_counter() - began


def shares(group):
    return consistency._connections[group][2] is not None


def at_random_times(group, number, odd):
    """Which of many checks found a difference; before each a rank may wait a little."""
    rank = dist.get_rank(group)
    chance = random.Random(rank)
    differed = []
    for n in range(number):
        if chance.random() < 0.1:
            time.sleep(chance.uniform(0, 0.002))
        if not agrees(group, n if odd.get(n) == rank else -1):
            differed.append(n)
    return differed, shares(group)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_rank_sees_every_difference_and_no_other(tmp_path, size):
    chance = random.Random(size)
    odd = {n: chance.randrange(size) for n in chance.sample(range(1000), 5)} if size > 1 else {}
    outcomes = run(at_random_times, 1000, odd, size=size, folder=tmp_path)
    assert outcomes == [(sorted(odd), True)] * size


def past_the_wrap(group, odd):
    """As above, on the shared memory itself; near the wrap one rank reads long after the other."""
    agrees(group, 0)
    shared, rank = consistency._connections[group][2], dist.get_rank(group)
    differed = []
    for n in range(70_000):
        all_equal = shared.start(n + 1 << 16 if rank == 1 and n in odd else 0)
        if rank == 1 and 65_525 < n < 65_540:
            time.sleep(0.01)
        if not all_equal():
            differed.append(n)
    return differed


def test_epochs_wrap_around(tmp_path):
    odd = [0, 5, 65_530, 65_531, 65_532, 65_533, 65_534, 65_535, 65_536, 69_999]
    assert run(past_the_wrap, odd, size=2, folder=tmp_path) == [odd] * 2


def one_is_late(group):
    """One rank is late; it is told when it comes."""
    agrees(group, 0)
    if dist.get_rank(group) == 1:
        dist.barrier(group)
        return error_of(group)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    outcomes = [error_of(group), error_of(group)]
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=DEADLINE), group)
    dist.barrier(group)
    return outcomes


def test_a_late_rank_is_named_and_told(tmp_path):
    first, late, third = run(one_is_late, size=3, folder=tmp_path)
    for (text, seconds), (again, soon) in (first, third):
        assert text.startswith("Timed out: ")
        assert re.search(r"rank 1 of the group has not made this call within \d+\.\d s", text)
        assert seconds < 20
        # As over a connection that is closed.
        assert again == text and soon < 1
    assert max(first[0][1], third[0][1]) >= 1
    assert "rank 0 of the group has stopped waiting" in late[0] and late[1] < 10


def not_waited_for(group, late):
    """An exception between start and wait on rank 0, once and twice in a row."""
    found = []
    for n in range(20):
        if dist.get_rank(group) == 0 and n % 4:
            consistency.PendingCheck(group, {"a": 0})
            continue
        if dist.get_rank(group) == late:
            time.sleep(0.01)
        found.append(agrees(group, n if n % 8 == 4 and dist.get_rank(group) == 1 else 0))
    return found


def test_a_check_without_a_wait_leaves_the_ranks_in_step(tmp_path):
    for late in range(3):
        folder = tmp_path / str(late)
        folder.mkdir()
        first, *others = run(not_waited_for, late, size=3, folder=folder)
        assert first == [n % 8 != 4 for n in range(0, 20, 4)]
        assert others == [[n % 8 != 4 for n in range(20)]] * 2


def difference_not_waited_for(group, by_messages):
    """Rank 0 does not wait for a check that the others wait for; its next call does."""
    without = mock.patch.object(shared_memory, "join", lambda *_: None)
    with without if by_messages else nullcontext():
        agrees(group, 0)
    if dist.get_rank(group) == 0:
        consistency.PendingCheck(group, {"a": 1})
    with pytest.raises(ValueError) as caught:
        consistency.PendingCheck(group, {"a": 2}).wait()
    return str(caught.value), [agrees(group, n) for n in range(5)]


@pytest.mark.parametrize("by_messages", [False, True])
def test_a_difference_that_was_not_waited_for_is_explained_to_every_rank(by_messages, tmp_path):
    outcomes = run(difference_not_waited_for, by_messages, size=3, folder=tmp_path)
    for rank, (text, later) in enumerate(outcomes):
        assert "disagree on a (rank 0: 1, rank 1: 2, rank 2: 2)" in text
        assert ("the previous call, which this rank did not finish, failed" in text) == (rank == 0)
        assert later == [True] * 5


def difference_unexplained(group):
    """Rank 0 makes its next call when the others have stopped waiting."""
    agrees(group, 0)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
    if dist.get_rank(group) == 0:
        consistency.PendingCheck(group, {"a": 1})
        time.sleep(6)
    else:
        with pytest.raises(RuntimeError):
            consistency.PendingCheck(group, {"a": 2}).wait()
    return error_of(group)


def test_a_difference_that_is_not_explained_ends_the_group(tmp_path):
    (first, _), *others = run(difference_unexplained, size=3, folder=tmp_path)
    assert "rank 1 of the group has stopped waiting" in first
    for text, _ in others:
        assert "the ranks of the group disagreed, and not all said on what" in text


def in_one_flight(group, odd):
    """Two checks at once: the second waits for the first."""
    first = consistency.PendingCheck(group, {"a": 0})
    second = consistency.PendingCheck(group, {"a": 1 if dist.get_rank(group) == odd else 0})
    first.wait()
    with pytest.raises(ValueError, match=f"rank {odd}: 1"):
        second.wait()
    consistency.PendingCheck(group, {"a": 1 if dist.get_rank(group) == odd else 0})
    with pytest.raises(ValueError, match=f"the previous call.*rank {odd}: 1"):
        consistency.PendingCheck(group, {"a": 0})
    return agrees(group, 0)


def test_two_checks_at_once(tmp_path):
    assert run(in_one_flight, 2, size=3, folder=tmp_path) == [True] * 3


def one_host_each(group):
    shared_memory.host_id = lambda: f"host {dist.get_rank(group)}"


def one_unknown_host(group):
    if dist.get_rank(group) == 1:
        shared_memory.host_id = lambda: ""


def no_folder(group):
    shared_memory.tempfile.mkstemp = refuse


def no_room(group):
    """For what the file holds; the name of an empty file there can be."""
    create = shared_memory._create

    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            return create(size)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    shared_memory._create = limited


def another_folder(group):
    """One rank does not find the file."""
    if dist.get_rank(group) == 1:
        shared_memory._open = lambda path, *rest, real=shared_memory._open: real(path + "-", *rest)


def another_file(group):
    """One rank finds one of that name that is not meant."""
    if dist.get_rank(group) == 1:
        real = shared_memory._open
        shared_memory._open = lambda path, token, size: real(path, token[::-1], size)


def another_memory(group):
    """One rank writes where the others see nothing."""
    if dist.get_rank(group) == 1:
        shared_memory.mmap.mmap = partial(mmap.mmap, flags=mmap.MAP_PRIVATE)


def refuse(*args, **kwargs):
    raise PermissionError


def fall_back(group, hindrance):
    hindrance(group)
    create, paths = shared_memory.tempfile.mkstemp, []

    def recording(*args, **kwargs):
        handle, path = create(*args, **kwargs)
        paths.append(path)
        return handle, path

    shared_memory.tempfile.mkstemp = recording
    rank = dist.get_rank(group)
    agreed = [agrees(group, rank if n == 2 else 0) for n in range(4)]
    return agreed, shares(group), [path for path in paths if os.path.exists(path)]


HINDRANCES = [one_host_each, one_unknown_host, no_folder, no_room, another_folder, another_file]


@pytest.mark.parametrize("hindrance", [*HINDRANCES, another_memory])
def test_ranks_that_cannot_all_share_send_messages(tmp_path, hindrance):
    outcomes = run(fall_back, hindrance, size=3, folder=tmp_path)
    assert outcomes == [([True, True, False, True], False, [])] * 3


def left_behind(group):
    """What is mapped for a group in use, and once it is gone."""
    group = dist.new_group()
    agrees(group, 0)
    in_use = mappings()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return in_use, mappings()


def mappings():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "/lasp-" in line]


def test_nothing_is_left(tmp_path):
    outcomes = run(left_behind, size=2, folder=tmp_path)
    # By now the ranks have been killed; but the name was gone before.
    assert outcomes[0][0] == outcomes[1][0]
    (name,) = outcomes[0][0]
    assert name.endswith(" (deleted)") and not os.path.exists(name.removesuffix(" (deleted)"))
    assert [afterwards for _, afterwards in outcomes] == [[], []]
