"""What is remembered of device tensors; without a GPU, the part that finds it."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lasp.ops import host_values


@pytest.fixture
def values_of(monkeypatch):
    monkeypatch.setattr(host_values, "_of_views", {})
    return host_values._values_of_view


def test_another_tensor_of_the_same_view_finds_the_values(values_of):
    tensor = torch.zeros(8)
    values_of(tensor)["values"] = 1
    # A compiled backward gets such a tensor.
    assert values_of(tensor.detach()) == {"values": 1}
    assert values_of(tensor[:4]) == values_of(tensor[4:]) == values_of(torch.zeros(8)) == {}


def test_a_tensor_that_was_changed_in_place_has_no_values(values_of):
    tensor = torch.zeros(8)
    alias = tensor.detach()
    values_of(tensor)["values"] = 1
    tensor.sub_(1)
    assert values_of(alias) == {}
    values_of(tensor)["values"] = 2
    assert values_of(alias) == {"values": 2}


def test_freed_memory_is_forgotten(values_of):
    for _ in range(5):
        values_of(torch.zeros(8))["values"] = 1
    kept = torch.zeros(8)
    assert values_of(kept) == {} and len(host_values._of_views) == 1


def test_views_of_one_tensor_do_not_fill_the_memory(values_of, monkeypatch):
    monkeypatch.setattr(host_values, "_MAX_VIEWS", 4)
    boundaries = torch.zeros(100, 8)
    for step in boundaries:
        values_of(step)["values"] = 1
        assert values_of(step) == {"values": 1} and len(host_values._of_views) <= 4


def test_threads_may_remember_tensors_at_once(values_of, monkeypatch):
    tensors = [torch.zeros(8) for _ in range(4)]
    values_of(tensors[0])

    def expired(storage):
        # Here another thread takes over.
        with monkeypatch.context() as other:
            other.setattr(StorageWeakRef, "expired", lambda storage: False)
            values_of(tensors[2])["values"] = 2
        return False

    monkeypatch.setattr(StorageWeakRef, "expired", expired)
    assert values_of(tensors[1]) == {} and values_of(tensors[2]) == {"values": 2}
