"""How often a rank reports to the store of its job. What it finds is tested in tests/faults."""

import json
import threading
import time

import pytest
import torch.distributed as dist

from launch.heartbeat import Heartbeat, _PatientStore
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


class Reports(Store):
    """What other ranks have reported; they are silent from now on."""

    def __init__(self, reports):
        super().__init__()
        self._others = reports

    def check(self, keys):
        return all(key == "heartbeat/0" or key in self._others for key in keys)

    def multi_get(self, keys):
        everyone = {"heartbeat/0": json.dumps(self.reports[-1]), **self._others}
        return [everyone[key] for key in keys]


def find_cause(monkeypatch, tmp_path, reports):
    """What rank 0 of four says, with two ranks on each of two hosts."""
    monkeypatch.setattr("launch.heartbeat._SILENT", 0.1)
    hosts = Hosts([Host("a", "1")] * 2 + [Host("b", "2")] * 2)
    heartbeat = Heartbeat(Reports(reports), 0, hosts, seconds=60, folder=tmp_path)
    try:
        return heartbeat._find_cause()
    finally:
        heartbeat.stop()


def silent(*ranks):
    report = {"number": 1, "position": [9, 9], "where": "step 3, reduction", "ended": None}
    return {f"heartbeat/{rank}": json.dumps(report) for rank in ranks}


def test_a_host_is_named_if_all_its_ranks_are_silent(monkeypatch, tmp_path):
    found = find_cause(monkeypatch, tmp_path, silent(1, 2, 3))
    assert found == (
        "rank 1 on a (and 2 other ranks) is stopped or dead: it was last seen in step 3, reduction"
    )
    monkeypatch.setattr(Heartbeat, "_read", lively(1))
    found = find_cause(monkeypatch, tmp_path, silent(1, 2, 3))
    assert found == (
        "b (ranks 2 and 3) is down or cannot be reached: rank 2 was last seen in step 3, reduction"
    )


def lively(rank, read=Heartbeat._read):
    """Reading the reports, with a new one of a rank each time."""

    def wrapped(self):
        reports = read(self)
        reports[rank] = reports[rank] | {"number": time.monotonic()}
        return reports

    return wrapped


def test_a_host_none_of_whose_ranks_started_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(Heartbeat, "_read", lively(1))
    found = find_cause(monkeypatch, tmp_path, silent(1))
    assert found == "b (ranks 2 and 3) is down or cannot be reached: no rank there started"


def test_a_store_that_never_answers_raises_in_time(monkeypatch):
    monkeypatch.setattr("launch.heartbeat._STORE_SECONDS", 0.5)
    store = Store()
    store.set = lambda key, value: threading.Event().wait()
    patient, began = _PatientStore(store), time.monotonic()
    with pytest.raises(dist.DistStoreError, match="no answer within 0.5 s"):
        patient.set("heartbeat/0", "")
    # The call that hangs has had its time: no other waits for as long again.
    with pytest.raises(dist.DistStoreError):
        patient.check(["x"])
    assert time.monotonic() - began < 10
