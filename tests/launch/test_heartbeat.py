"""How often a rank reports to the store of its job. What it finds is tested in tests/faults."""

import json
import time

import pytest

from launch.heartbeat import Heartbeat
from launch.hosts import Host, Hosts


class Store:
    """Keeps what is written, in order."""

    def __init__(self):
        self.reports = []

    def clone(self):
        return self

    def set_timeout(self, timeout):
        pass

    def set(self, key, value):
        self.reports.append(json.loads(value))

    def check(self, keys):
        return False


@pytest.fixture
def store():
    return Store()


def start(store, tmp_path, size):
    hosts = Hosts([Host("here", "1")] * size)
    return Heartbeat(store, 0, hosts, seconds=60, folder=tmp_path)


def test_few_ranks_report_every_phase(store, tmp_path):
    heartbeat = start(store, tmp_path, 2)
    for step in range(1, 4):
        heartbeat.step = step
        heartbeat.enter("forward")
        deadline = time.monotonic() + 60
        while f"step {step}, forward" != store.reports[-1]["where"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    heartbeat.stop()
    assert store.reports[-1]["ended"] == ""


def test_many_ranks_do_not_flood_the_store(store, tmp_path):
    """Of 2,000 ranks, each reports every other second, whatever the length of a step."""
    heartbeat = start(store, tmp_path, 2000)
    began = time.monotonic()
    while time.monotonic() - began < 3:
        heartbeat.enter("forward")
        time.sleep(0.005)
    heartbeat.stop()
    # The first and the last one come in addition.
    assert len(store.reports) <= 2 + (time.monotonic() - began) / 2
    assert store.reports[-1]["where"] == "forward"
