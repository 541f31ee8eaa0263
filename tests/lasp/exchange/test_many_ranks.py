"""What a comparison of many ranks costs: requests to the store and connections, counted on threads
that each are a rank."""

import collections
import functools
import gc
import math
import os
import threading
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from lasp.exchange import consistency, shared_memory


class CountingStore(dist.Store):
    """Counts the requests of one rank, by name."""

    def __init__(self, store):
        super().__init__()
        self._store, self.requests = store, collections.Counter()

    def set(self, key, value):
        self.requests["set"] += 1
        self._store.set(key, value)

    def get(self, key):
        self.requests["get"] += 1
        return self._store.get(key)

    def add(self, key, number):
        self.requests["add"] += 1
        return self._store.add(key, number)

    def wait(self, *arguments):
        self._store.wait(*arguments)


def on_threads(size, function):
    """function(rank) of each rank on a thread of its own; the results, in order of ranks."""
    results, errors = [None] * size, []

    def run(rank):
        try:
            results[rank] = function(rank)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.fixture
def sockets():
    """A function that returns the open sockets of this process beyond those of before."""

    def count():
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(os.path.islink(x) and "socket" in os.readlink(x) for x in links)

    gc.collect()
    return functools.partial(lambda before: count() - before, count())


@pytest.mark.parametrize("size", [32, 64])
def test_many_ranks_make_logarithmic_numbers_of_requests_and_connections(size, sockets):
    root = dist.HashStore()
    stores = [CountingStore(root) for _ in range(size)]

    def compare(rank):
        connections = consistency.connect(stores[rank], rank, size, timedelta(seconds=60))
        number = 7 if rank != size - 1 else 8
        same = consistency._RoundsComparison(7, connections).all_equal()
        return connections, same, consistency._RoundsComparison(number, connections).all_equal()

    found = on_threads(size, compare)
    assert [each[1:] for each in found] == [(True, False)] * size
    rounds = math.ceil(math.log2(size))
    # That it is there, and the last one that all are; its own address, and those of the ranks that
    # it sends to and hears of. (Half way round both are the same rank.)
    most = max(sum(store.requests.values()) for store in stores)
    assert most <= 2 * rounds + 2
    # Each connection has two ends here, each rank listens, and a loop wakes itself.
    assert sockets() <= size * (2 * rounds + 4)


def test_a_rank_that_does_not_come_ends_the_others_within_the_timeout():
    size, root = 20, dist.HashStore()

    def join(rank):
        if rank == 7:
            return None
        try:
            consistency.connect(root, rank, size, timedelta(seconds=1))
        except RuntimeError as error:
            return str(error)

    begun = time.monotonic()
    found = on_threads(size, join)
    assert found.pop(7) is None
    assert all("all ranks here" in each or "imeout" in each for each in found)
    # Gloo alone would need five times the timeout.
    assert time.monotonic() - begun < 4


def test_few_ranks_connect_to_all(sockets):
    size = 8
    root = dist.HashStore()
    stores = [CountingStore(root) for _ in range(size)]

    def join(rank):
        return consistency.connect(stores[rank], rank, size, timedelta(seconds=60))

    connections = on_threads(size, join)
    assert len(connections) == size
    assert sockets() >= size * (size - 1)


def test_many_ranks_of_several_hosts_gather_nothing():
    """They learn in rounds that they cannot share memory."""
    size, root, host = 20, dist.HashStore(), threading.local()

    def may_share(names):
        def join(rank):
            host.name = names[rank]
            store = dist.PrefixStore("".join(names), root)
            connections = consistency.connect(store, rank, size, timedelta(seconds=60))
            # Kept until all ranks have an answer.
            return connections, consistency._may_share_memory(connections)

        return [answer for _, answer in on_threads(size, join)]

    with (
        mock.patch.object(shared_memory, "host_id", lambda: host.name),
        mock.patch.object(consistency, "_all_gather", side_effect=AssertionError),
    ):
        assert may_share(["a"] * size) == [True] * size
        assert may_share(["a"] * 16 + ["b"] * 4) == [False] * size
