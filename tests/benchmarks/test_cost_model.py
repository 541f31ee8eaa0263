"""The formulas of the cost model, and what it makes of measurements."""

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import Link

LINK = Link(latency=10e-6, bandwidth=100e9)


def test_a_fit_finds_the_link_that_made_the_times():
    samples = [(m, s, LINK.seconds(m, s)) for m in (1, 2) for s in (2**18, 2**22)]
    found = cost_model.fit(samples)
    assert found.latency == pytest.approx(LINK.latency)
    assert found.bandwidth == pytest.approx(LINK.bandwidth)


@pytest.mark.parametrize(
    "method, layout, steps, states",
    [
        ("ring, memory", "contiguous", 7, 1),
        ("ring, memory", "zigzag", 14, 2),
        ("ring, messages", "contiguous", 7, 7),
        ("ring, messages", "zigzag", 14, 14),
        ("all_gather", "contiguous", 1, 7),
        ("all_gather", "zigzag", 1, 14),
        ("doubling", "contiguous", 3, 3),
        ("doubling", "zigzag", 8, 8),
    ],
)
def test_messages_and_bytes_on_eight_ranks(method, layout, steps, states):
    assert cost_model.steps_and_bytes(method, 8, 1000, layout) == (steps, states * 1000)
    expected = LINK.seconds(steps, states * 1000)
    assert cost_model.seconds(method, 8, 1000, LINK, layout) == pytest.approx(expected)


@pytest.mark.parametrize("method", cost_model.METHODS[1:])
def test_hosts_apart_cost_more(method):
    inside = LINK.seconds(*cost_model.steps_and_bytes(method, 64, 2**20, "contiguous"))
    assert cost_model.seconds(method, 64, 2**20, LINK) > inside
    assert cost_model.seconds(method, 1, 2**20, LINK) == 0


def test_the_ring_is_paid_once_per_pass_and_a_collective_per_layer():
    hop = LINK.seconds(1, 2**20)
    layers, work = 10, 1e-3
    for method, exchanges in (("ring, messages", 3 * hop), ("doubling", layers * 2 * hop)):
        whole = cost_model.pipelined(method, 4, layers, work / 2, work / 2, 2**20, LINK)
        assert whole == pytest.approx(layers * work + exchanges)
