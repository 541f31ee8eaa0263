"""A simulation of exchanges, calls and training steps over many ranks.

Every event has a time per rank, kept in arrays: it is the latest of what the rank waits for, plus a
duration. Durations are measured or fitted (`benchmarks/projection.py`), nothing is random. So the
simulation gives what a queue of events would, for thousands of ranks in milliseconds.

An exchange takes the time at which each rank can send its state and returns the time at which each
has the state that enters it:

    ring, memory     cut-through: parts of a state follow each other, a hop adds only its latency
    ring, messages   a hop is a message of the whole state
    two-level        in memory inside a host, one message per border between hosts
    all_gather       starts when all ranks have joined, NCCL's ring: bytes and hosts add up
    doubling         ceil(log2 P) rounds, each a message of the whole state

A rank of the ring or of doubling waits for some ranks, not for all: it continues as soon as its own
state is there. So ranks run staggered, and the latency of a ring is paid once per pass, unless
something else makes the ranks wait for each other. FSDP does: the weights of a block are gathered
by all ranks, at most one block ahead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

__all__ = [
    "ETHERNET",
    "INFINIBAND",
    "METHODS",
    "AttentionWork",
    "Exchange",
    "ExchangeCost",
    "Link",
    "Network",
    "StepWork",
    "call",
    "fit",
    "seconds",
    "step",
    "steps_and_bytes",
]

# Methods that benchmarks/sequence_parallel.py measures on one host.
METHODS = ("ring, memory", "ring, messages", "all_gather", "doubling")
TWO_LEVEL = "two-level"
GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Link:
    """Seconds of an empty message, and bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, messages: float, size: float) -> float:
        return messages * self.latency + size / self.bandwidth


def steps_and_bytes(method: str, size: int, state_bytes: int, layout: str) -> tuple[int, int]:
    """Successive messages, and the bytes they carry, until the last rank has its state."""
    chunks = 2 if layout == "zigzag" else 1
    if method == "all_gather":
        return min(1, size - 1), (size - 1) * chunks * state_bytes
    steps = chunks * (size - 1)
    if method == "ring, memory":
        return steps, min(steps, chunks) * state_bytes
    if method == "doubling":
        # In zigzag a rank has two messages per round, one after the other.
        steps = chunks * math.ceil(math.log2(size * chunks)) if size > 1 else 0
    return steps, steps * state_bytes


def seconds(method: str, size: int, state_bytes: int, link: Link, layout: str = "contiguous"):
    """Time of one exchange over the `size` ranks of a host, by one latency and one bandwidth."""
    return link.seconds(*steps_and_bytes(method, size, state_bytes, layout))


def fit(samples: list[tuple[int, int, float]]) -> Link:
    """The link that fits (messages, bytes, seconds) best, by least squares of relative errors."""
    table = np.array([(m / t, s / t) for m, s, t in samples])
    latency, inverse = np.linalg.lstsq(table, np.ones(len(table)), rcond=None)[0]
    if latency < 0:
        latency, inverse = 0.0, table[:, 1].sum() / (table[:, 1] ** 2).sum()
    return Link(float(latency), float(1 / max(inverse, 1e-15)))


@dataclass(frozen=True)
class Network:
    """Between hosts: seconds that a message takes more than inside one, bytes per second and GPU.

    Each GPU has a card, or a share of one, of its own.
    """

    name: str
    latency: float
    bandwidth: float


# Assumed, not measured.
INFINIBAND = Network("InfiniBand, 400 Gbit/s per GPU, 10 us per message", 10e-6, 50e9)
ETHERNET = Network("Ethernet, 25 Gbit/s per GPU, 50 us per message", 50e-6, 3.125e9)


@dataclass(frozen=True)
class ExchangeCost:
    """Durations of an exchange inside a host, in seconds.

    Attributes:
        start: once per exchange.
        step: per hop, round, or (all_gather) per doubling of the ranks of the host.
        per_byte: for each state that follows the one before: once in `ring, memory`, per message in
            `ring, messages` and `doubling`, per remote state in `all_gather`.
    """

    start: float
    step: float
    per_byte: float

    def scaled(self, factor: float) -> ExchangeCost:
        return ExchangeCost(factor * self.start, factor * self.step, factor * self.per_byte)


@dataclass(frozen=True)
class Exchange:
    """One method over `size` ranks, on hosts of `per_host`.

    Attributes:
        costs: by method; two-level needs those of both rings.
        network: between hosts; None if there is one host.
    """

    method: str
    size: int
    state_bytes: int
    costs: Mapping[str, ExchangeCost]
    network: Network | None = None
    layout: str = "contiguous"
    per_host: int = GPUS_PER_HOST

    def __post_init__(self) -> None:
        assert self.network is not None or self.size <= self.per_host
        assert self.method != "ring, memory" or self.network is None, "hosts share no memory"

    def arrived(self, ready: np.ndarray, reverse: bool = False) -> np.ndarray:
        """When each rank has the state that enters it, or at once if none does.

        Args:
            ready: [size], when each rank's own state is known.
            reverse: states go from the last rank to the first.
        """
        if self.size == 1:
            return ready
        if reverse:
            return self.arrived(ready[::-1])[::-1]
        if self.method == "all_gather":
            return np.full(self.size, ready.max() + self._all_gather_seconds())
        if self.method == "doubling":
            return self._doubling(ready)
        return self._chain(ready)

    def seconds(self) -> float:
        """From ranks that begin together until the last has its state."""
        return float(self.arrived(np.zeros(self.size)).max())

    def measured_to_take(self, seconds: float) -> Exchange:
        """The same with all durations scaled, so that it takes `seconds`."""
        factor = seconds / self.seconds()
        return replace(self, costs={name: c.scaled(factor) for name, c in self.costs.items()})

    def _is_border(self, ranks: np.ndarray, distance: int) -> np.ndarray:
        """Whether a message to `ranks` from `distance` ranks below crosses hosts."""
        return ranks // self.per_host != (ranks - distance) // self.per_host

    def _message_seconds(self, cost: ExchangeCost, far: np.ndarray) -> np.ndarray:
        near = cost.step + self.state_bytes * cost.per_byte
        if self.network is None:
            return np.full(len(far), near)
        slowest = max(cost.per_byte, 1 / self.network.bandwidth)
        across = cost.step + self.network.latency + self.state_bytes * slowest
        return np.where(far, across, near)

    def _chain(self, ready):
        ranks = np.arange(self.size)
        order = ranks
        if self.layout == "zigzag":
            order = np.concatenate((ranks, ranks[::-1]))
        border = self._is_border(order[1:], 1)
        if self.method == "ring, messages":
            cost = self.costs[self.method]
            hops, tails, start = self._message_seconds(cost, border), 0.0, cost.start
        else:
            cost = self.costs["ring, memory"]
            tail, start = self.state_bytes * cost.per_byte, cost.start
            hops, tails = np.full(len(border), cost.step), np.full(len(border), tail)
            if self.method == TWO_LEVEL:
                # The last rank of a host sends what it has received in full.
                message = self._message_seconds(self.costs["ring, messages"], border)
                hops, tails = np.where(border, tail + message, hops), np.where(border, 0.0, tails)
        if self.layout == "zigzag":
            # The turn is inside the last rank, which first needs the whole state, unless it came
            # in a message.
            turn, whole = self.size - 1, self.method == "ring, messages" or border[self.size - 2]
            hops[turn] = 0.0 if whole else tail
        # first[i] = max over j < i of ready[j] + the hops between: a running maximum.
        until = np.concatenate(([0.0], np.cumsum(hops)))
        latest = np.maximum.accumulate(ready[order] + start - until)
        arrived = ready.copy()
        np.maximum.at(arrived, order[1:], until[1:] + latest[:-1] + tails)
        return arrived

    def _doubling(self, ready):
        cost, ranks = self.costs["doubling"], np.arange(self.size)
        if self.layout == "zigzag":
            # Both chunks of a rank take part in every round, so that all ranks wait for all.
            steps, _ = steps_and_bytes("doubling", self.size, self.state_bytes, "zigzag")
            far = np.arange(steps) >= 2 * math.log2(self.per_host)
            messages = self._message_seconds(cost, far).sum()
            return np.full(self.size, ready.max() + cost.start + messages)
        now, distance = ready.copy(), 1
        while distance < self.size:
            message = self._message_seconds(cost, self._is_border(ranks, distance))[distance:]
            if distance == 1:
                # The first round is cheaper: it is posted before anything is waited for.
                message = np.maximum(message + cost.start, 0.0)
            later = now.copy()
            later[distance:] = np.maximum(now[distance:], now[:-distance]) + message
            now, distance = later, 2 * distance
        return now

    def _all_gather_seconds(self) -> float:
        cost = self.costs["all_gather"]
        chunks = 2 if self.layout == "zigzag" else 1
        per_byte = cost.per_byte
        latency = cost.start + cost.step * math.log2(min(self.size, self.per_host))
        if self.network is not None:
            # All cards of a host carry a part of every state.
            per_byte = max(per_byte, 1 / (self.network.bandwidth * self.per_host))
            latency += (math.ceil(self.size / self.per_host) - 1) * self.network.latency
        return latency + (self.size - 1) * chunks * self.state_bytes * per_byte


@dataclass(frozen=True)
class AttentionWork:
    """Seconds of a call on one rank, without a group.

    Attributes:
        local_state, scan: of the forward.
        local_grad, dq, dkdv: of the backward.
    """

    local_state: float
    scan: float
    local_grad: float
    dq: float
    dkdv: float


# Parts of a forward and of a backward, from profiles and tests of kernels on (1, 131072, 16, 128):
# state passes 0.18 and 0.25 ms, scan 0.51, dq 0.52, dk and dv 0.80 (benchmarks/DIARY.md, rows 10,
# 22 and 96).
_FORWARD_PARTS, _BACKWARD_PARTS = (0.26, 0.74), (0.16, 0.33, 0.51)


def attention_work(forward: float, both: float) -> AttentionWork:
    """The parts of a measured call: `forward` seconds, and `both` with its backward."""
    backward = both - forward
    return AttentionWork(
        *(part * forward for part in _FORWARD_PARTS), *(part * backward for part in _BACKWARD_PARTS)
    )


def call(work: AttentionWork, exchange: Exchange, hides: bool) -> tuple[float, float]:
    """Seconds of a forward, and of a forward and backward, of the slowest rank.

    Args:
        hides: dq is computed while gradients travel; else after.
    """
    arrived = exchange.arrived(np.full(exchange.size, work.local_state))
    forward = arrived + work.scan
    ready = forward + work.local_grad
    return float(forward.max()), float(_backward(work, exchange, ready, hides).max())


def _backward(work, exchange, ready, hides):
    arrived = exchange.arrived(ready, reverse=True)
    dq = np.maximum(arrived, ready + work.dq) if hides else arrived + work.dq
    return dq + work.dkdv


@dataclass(frozen=True)
class StepWork:
    """Seconds of a training step on one rank, without a group, all blocks recomputed.

    Attributes:
        attention: of one layer.
        before, after: of the rest of a layer's forward, before and after attention. Their backward
            takes twice as long.
        head: forward and backward of the head and loss.
        fixed: per step: optimizer and what the host adds.
        weight_bytes, grad_bytes: of a block, as gathered and as reduced.
    """

    layers: int
    attention: AttentionWork
    before: float
    after: float
    head: float
    fixed: float
    weight_bytes: float
    grad_bytes: float

    def local_seconds(self) -> float:
        """Of the step on a rank that waits for no other."""
        a = self.attention
        forward = self.before + a.local_state + a.scan + self.after
        backward = 2 * (self.before + self.after) + a.local_grad + a.dq + a.dkdv
        return self.layers * (2 * forward + backward) + self.head + self.fixed


def step(
    work: StepWork,
    exchange: Exchange,
    engine: str,
    near: Link,
    *,
    hides: bool = True,
    sequences: int = 1,
) -> float:
    """Seconds of a training step.

    Args:
        engine: "fsdp": weights are cut over all ranks, and a block's are gathered while the one
            before computes. "ddp": gradients are summed during the backward.
        near: NCCL's collectives inside a host: latency, and bytes per second and GPU.
        hides: dq is computed while gradients travel; else after.
        sequences: each is cut over the ranks of an exchange of its own; weights are shared.
    """
    sharded, a = engine == "fsdp", work.attention
    gather, reduce = _collectives(work, exchange, engine, near, sequences)
    now = np.zeros(exchange.size)
    # When the queue of collectives is idle, and when the next block's weights are there.
    queue = gathered = gather
    for _ in range(work.layers):
        if sharded:
            now = np.maximum(now, gathered)
            # All ranks have begun this block before the next one's weights are complete.
            queue = gathered = max(queue, now.max()) + gather
        ready = now + work.before + a.local_state
        now = exchange.arrived(ready) + a.scan + work.after
    now = now + work.head
    forward = work.before + a.local_state + a.scan + work.after
    for _ in range(work.layers):
        if sharded:
            now = np.maximum(now, gathered)
            queue = gathered = max(queue, now.max()) + gather
        # The recomputed forward exchanges nothing.
        ready = now + forward + 2 * work.after + a.local_grad
        now = _backward(a, exchange, ready, hides) + 2 * work.before
        queue = max(queue, now.max()) + reduce
    return float(max(queue, now.max()) + work.fixed)


def _collectives(work, exchange, engine, near, sequences):
    """Seconds to gather a block's weights, and to reduce its gradients."""
    size, network = exchange.size * sequences, exchange.network
    if size == 1:
        return 0.0, 0.0
    per_byte, latency = 1 / near.bandwidth, near.latency
    if network is not None:
        # Inside a host at the near bandwidth; all cards of the host carry parts across.
        per_byte = max(per_byte, 1 / (network.bandwidth * exchange.per_host))
        latency += math.ceil(math.log2(size / exchange.per_host)) * network.latency
    part = (size - 1) / size
    if engine == "ddp":
        return 0.0, 2 * (latency + part * work.grad_bytes * per_byte)
    assert engine == "fsdp", engine
    gather = latency + part * work.weight_bytes * per_byte
    return gather, latency + part * work.grad_bytes * per_byte
