"""The simulation of exchanges and steps, and what it makes of the measurements."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lasp import exchange


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        import cost_model
        import projection
        import projection_report

        yield cost_model, projection, projection_report


@pytest.fixture(scope="module")
def simulator(modules):
    return modules[1].load()


@pytest.fixture
def cost_model(modules):
    return modules[0]


@pytest.fixture
def costs(cost_model):
    """Numbers without common factors, so that no two sums of them are equal."""
    return {
        "ring, memory": cost_model.ExchangeCost(2e-6, 3e-6, 7e-12),
        "ring, messages": cost_model.ExchangeCost(1e-6, 11e-6, 5e-12),
        "all_gather": cost_model.ExchangeCost(17e-6, 8e-6, 4e-12),
        "doubling": cost_model.ExchangeCost(-13e-6, 31e-6, 6e-12),
    }


def one_by_one(cost_model, method, ready, costs, network, data, per_host):
    """Arrival of states, rank by rank and message by message."""
    size, doubling = len(ready), costs["doubling"]

    def message(cost, source, target):
        if source // per_host == target // per_host:
            return cost.step + data * cost.per_byte
        per_byte = max(cost.per_byte, 1 / network.bandwidth)
        return cost.step + network.latency + data * per_byte

    if method == "doubling":
        now, distance = list(ready), 1
        while distance < size:
            sent = list(now)
            for rank in range(distance, size):
                first = doubling.start if distance == 1 else 0.0
                took = message(doubling, rank - distance, rank) + first
                now[rank] = max(sent[rank], sent[rank - distance]) + took
            distance *= 2
        return now
    memory, messages = costs["ring, memory"], costs["ring, messages"]
    start = (messages if method == "ring, messages" else memory).start
    arrived, head = [ready[0]], None
    for rank in range(1, size):
        known = ready[rank - 1] + start
        head = known if head is None else max(head, known)
        if method == "ring, messages":
            head += message(messages, rank - 1, rank)
            whole = head
        elif rank % per_host == 0:
            # The first part of the state, its last part, then a message.
            head = head + data * memory.per_byte + message(messages, rank - 1, rank)
            whole = head
        else:
            head += memory.step
            whole = head + data * memory.per_byte
        arrived.append(max(ready[rank], whole))
    return arrived


@pytest.mark.parametrize("method", ["ring, messages", "two-level", "doubling"])
@pytest.mark.parametrize("size", [9, 16, 37])
def test_states_arrive_as_message_by_message(cost_model, costs, method, size):
    ready = np.random.default_rng(size).uniform(0, 200e-6, size)
    args = (size, 2**20, costs, cost_model.INFINIBAND)
    found = cost_model.Exchange(method, *args, per_host=4).arrived(ready)
    expected = one_by_one(cost_model, method, ready, costs, cost_model.INFINIBAND, 2**20, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_gradients_arrive_in_reverse(cost_model, costs):
    ready = np.arange(6) * 1e-6
    ring = cost_model.Exchange("ring, messages", 6, 2**20, costs)
    found = ring.arrived(ready, reverse=True)
    assert found[5] == ready[5]
    np.testing.assert_allclose(found[::-1], ring.arrived(ready[::-1]))


def test_zigzag_returns_to_the_first_rank(cost_model, costs):
    ring = cost_model.Exchange("ring, messages", 4, 2**20, costs, layout="zigzag")
    hop = 11e-6 + 2**20 * 5e-12
    arrived = ring.arrived(np.zeros(4))
    np.testing.assert_allclose(arrived, 1e-6 + hop * np.array([6, 5, 4, 3]))


def test_a_fit_finds_the_link_that_made_the_times(cost_model):
    link = cost_model.Link(latency=10e-6, bandwidth=100e9)
    found = cost_model.fit([(m, s, link.seconds(m, s)) for m in (1, 2) for s in (2**18, 2**22)])
    assert found.latency == pytest.approx(link.latency)
    assert found.bandwidth == pytest.approx(link.bandwidth)


def test_a_fit_finds_the_costs_that_made_the_times(modules, costs):
    cost_model, projection, _ = modules
    reports = [
        {
            "ranks": size,
            "exchanges": [
                {
                    "method": method,
                    "layout": "contiguous",
                    "bytes": data,
                    "ms": 1e3 * cost_model.Exchange(method, size, data, costs).seconds(),
                }
                for method in cost_model.METHODS
                for data in (2**18, 2**20, 2**22)
            ],
        }
        for size in (2, 4, 8)
    ]
    for method, found in projection.exchange_costs(reports).items():
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(costs[method]))


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
def test_messages_and_bytes_on_eight_ranks(cost_model, method, layout, steps, states):
    assert cost_model.steps_and_bytes(method, 8, 1000, layout) == (steps, states * 1000)


def work(cost_model, layers, seconds):
    """A step of equal parts, each `seconds` long."""
    attention = cost_model.AttentionWork(*[seconds] * 5)
    return cost_model.StepWork(layers, attention, seconds, seconds, 0.0, 0.0, 0.0, 0.0)


def test_a_step_on_one_rank_is_its_local_work(cost_model, costs):
    alone = work(cost_model, 5, 1e-3)
    ring = cost_model.Exchange("ring, memory", 1, 2**20, costs)
    near = cost_model.Link(20e-6, 250e9)
    for engine in ("ddp", "fsdp"):
        assert cost_model.step(alone, ring, engine, near) == pytest.approx(alone.local_seconds())


def test_the_ring_is_paid_once_per_pass_and_doubling_per_layer(cost_model, costs):
    layers, alone = 10, work(cost_model, 10, 1e-3)
    near, hop = cost_model.Link(0.0, 1e15), 11e-6 + 2**20 * 5e-12
    ring = cost_model.Exchange("ring, messages", 8, 2**20, costs)
    found = cost_model.step(alone, ring, "ddp", near, hides=False) - alone.local_seconds()
    # Its start is paid by every rank that waits for nothing else.
    assert 14 * hop <= found <= 14 * hop + 4 * layers * 1e-6
    doubling = cost_model.Exchange("doubling", 8, 2**20, costs)
    found = cost_model.step(alone, doubling, "ddp", near, hides=False) - alone.local_seconds()
    assert found == pytest.approx(2 * layers * doubling.seconds())


def test_fsdp_makes_a_long_ring_pay_in_every_block(cost_model, costs):
    layers, near = 10, cost_model.Link(0.0, 1e15)
    ring = cost_model.Exchange("ring, messages", 512, 2**20, costs, cost_model.INFINIBAND)
    once = ring.seconds()
    lost = {}
    for part in (once / 100, once):
        alone = work(cost_model, layers, part)
        for engine in ("ddp", "fsdp"):
            seconds = cost_model.step(alone, ring, engine, near, hides=False)
            lost[engine, part] = (seconds - alone.local_seconds()) / once
    # Blocks longer than the chain: as with DDP. Shorter ones: the first rank may be one block
    # ahead, so that two blocks, of twenty, share a chain.
    assert lost["fsdp", once] == pytest.approx(lost["ddp", once], rel=0.02)
    assert lost["ddp", once / 100] == pytest.approx(2, rel=0.05)
    assert lost["fsdp", once / 100] == pytest.approx(layers, rel=0.1)


def test_measured_rows_are_met_but_those_named_in_the_report(modules, simulator):
    _, projection, report = modules
    calls = projection.call_rows(simulator.many, simulator.costs, simulator.calibration)
    rows = [*calls, *simulator.training_rows()]
    assert len(rows) > 100
    missed = {(r.name, r.ranks, r.tokens) for r in rows if abs(r.error) > report.BAR}
    assert missed == set(report.REASONS)


def test_rows_left_out_do_not_enter_their_own_prediction(modules, simulator):
    *others, last = simulator.many
    rows = [{**r, "both_ms": 1.5 * r["both_ms"]} if "no group" not in r["name"] else r
            for r in last["rows"]]  # fmt: skip
    changed = dataclasses.replace(simulator, many=[*others, {**last, "rows": rows}])
    before = [r.simulated for r in simulator.left_out(training=False) if r.ranks == last["ranks"]]
    after = [r.simulated for r in changed.left_out(training=False) if r.ranks == last["ranks"]]
    assert after == pytest.approx(before)


def test_auto_chooses_by_the_simulation(modules, simulator):
    cost_model, projection, _ = modules
    assert projection.ring_limit(simulator) == exchange._RING_UP_TO
    # One limit serves both rings.
    assert projection.ring_limit(simulator, cost_model.TWO_LEVEL) == exchange._RING_UP_TO
    assert projection.gather_limit(simulator) == exchange._ALL_GATHER_UP_TO
