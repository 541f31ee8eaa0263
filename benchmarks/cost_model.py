"""A cost model of the exchange of states, its fit to measurements, and a projection.

P ranks, a state of S bytes, a link that takes `latency` seconds for an empty message and moves
`bandwidth` bytes per second each way:

    | exchange       | contiguous                         | zigzag                                |
    |----------------|------------------------------------|---------------------------------------|
    | ring, memory   | (P-1) latency + S/bandwidth        | (2P-2) latency + 2S/bandwidth         |
    | ring, messages | (P-1) (latency + S/bandwidth)      | (2P-2) (latency + S/bandwidth)        |
    | all_gather     | latency + (P-1) S/bandwidth        | latency + (P-1) 2S/bandwidth          |
    | doubling       | ceil(log2 P) (latency + S/bandw.)  | 2 ceil(log2 2P) (latency + S/bandw.)  |

The table gives the time until the last rank has its state. In peer memory a state moves in small
parts, which follow each other down the ring.

A model pays less, with the ring much less: a rank continues as soon as its own state has arrived,
so the ranks run staggered, and the latency of P - 1 hops is incurred once per pass, not per layer.
`pipelined` simulates this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Link", "fit", "pipelined", "projection", "seconds", "steps_and_bytes"]

METHODS = ("ring, memory", "ring, messages", "all_gather", "doubling")
# NVLink joins the GPUs of a host, one network card per GPU joins hosts. The network is assumed, not
# measured: 400 Gbit/s, and 10 us more per message.
GPUS_PER_HOST = 8
NETWORK_LATENCY, NETWORK_BANDWIDTH = 10e-6, 50e9


@dataclass(frozen=True)
class Link:
    """Seconds of an empty message, and bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, messages: float, size: float) -> float:
        return messages * self.latency + size / self.bandwidth

    def between_hosts(self) -> Link:
        slower = min(self.bandwidth, NETWORK_BANDWIDTH)
        return Link(self.latency + NETWORK_LATENCY, slower)


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
    """Time of one exchange over `size` ranks, on hosts of GPUS_PER_HOST each."""
    steps, data = steps_and_bytes(method, size, state_bytes, layout)
    hosts = -(-size // GPUS_PER_HOST)
    if hosts == 1:
        return link.seconds(steps, data)
    far = link.between_hosts()
    assert method != "ring, memory", "hosts share no memory"
    if method == "ring, messages":
        crossings = (2 if layout == "zigzag" else 1) * (hosts - 1)
        near = link.seconds(steps - crossings, (steps - crossings) * state_bytes)
        return near + far.seconds(crossings, crossings * state_bytes)
    if method == "doubling":
        # Rounds over a distance of GPUS_PER_HOST or more leave the host.
        near_steps = min(steps, (2 if layout == "zigzag" else 1) * int(math.log2(GPUS_PER_HOST)))
        near = link.seconds(near_steps, near_steps * state_bytes)
        return near + far.seconds(steps - near_steps, (steps - near_steps) * state_bytes)
    # States of other hosts arrive over all network cards, then spread inside the host.
    from_far = data * (size - GPUS_PER_HOST) / (size - 1) / GPUS_PER_HOST
    return far.seconds(1, from_far) + link.seconds(1, data)


def fit(samples: list[tuple[int, int, float]]) -> Link:
    """The link that fits (messages, bytes, seconds) best, by least squares of relative errors."""
    # seconds = messages * latency + bytes / bandwidth, each sample divided by its seconds.
    a11 = sum((m / t) ** 2 for m, _, t in samples)
    a12 = sum(m * s / t**2 for m, s, t in samples)
    a22 = sum((s / t) ** 2 for _, s, t in samples)
    b1, b2 = sum(m / t for m, _, t in samples), sum(s / t for _, s, t in samples)
    determinant = a11 * a22 - a12**2
    latency = max((b1 * a22 - b2 * a12) / determinant, 0.0)
    inverse = (b2 - a12 * latency) / a22
    return Link(latency, 1 / max(inverse, 1e-15))


def pipelined(
    method: str, size: int, layers: int, before: float, after: float, state_bytes: int, link: Link
) -> float:
    """Seconds of a pass over `layers`. In each, a rank computes for `before` seconds until it can
    send its state, and for `after` seconds once the incoming one has arrived. Ranks wait for each
    other's states only; a collective starts when all have joined."""
    now = [0.0] * size
    exchange = seconds(method, size, state_bytes, link)
    far = link.between_hosts().seconds(1, state_bytes)
    near = link.seconds(1, state_bytes)
    for _ in range(layers):
        ready = [t + before for t in now]
        if method.startswith("ring"):
            arrived = [ready[0]]
            for rank in range(1, size):
                hop = far if rank % GPUS_PER_HOST == 0 else near
                arrived.append(max(ready[rank], max(arrived[-1], ready[rank - 1]) + hop))
        else:
            arrived = [max(ready) + exchange] * size
        now = [t + after for t in arrived]
    return max(now)


def projection(
    links: dict[str, Link], state_bytes: int, layers: int, before: float, after: float
) -> str:
    """A table in Markdown for 2 to 256 ranks."""
    local = layers * (before + after)
    lines = [
        f"State of {state_bytes / 2**20:g} MiB: us until the last rank has its state, and in "
        f"brackets the speed of a forward pass of {layers} layers of {1e3 * (before + after):.2f} "
        "ms relative to no exchange.",
        "",
        "| ranks | " + " | ".join(METHODS) + " |",
        "|---|" + "---|" * len(METHODS),
    ]
    for size in (2, 4, 8, 64, 256):
        cells = []
        for method in METHODS:
            if method == "ring, memory" and size > GPUS_PER_HOST:
                cells.append("")
                continue
            once = seconds(method, size, state_bytes, links[method])
            full = pipelined(method, size, layers, before, after, state_bytes, links[method])
            cells.append(f"{1e6 * once:.0f} ({local / full:.1%})")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)
