"""The relay kernel under Triton's interpreter; interpreter.py says why in a process of its own.

The interpreter runs one rank after the other, in the order in which the state comes to them.
"""

import torch

from lasp.ops.triton.relay import CHUNK, relay
from tests.lasp.ops import interpreter


class Line:
    """Ranks in a row, and the memory that they share."""

    def __init__(self, ranks, shape):
        n = shape[0] * shape[1] * shape[2] * shape[3]
        self.shape = shape
        counters = torch.zeros(n // 1024 + 3, dtype=torch.int32)
        # What nobody has written has never come.
        self.boxes = [(torch.zeros(n, dtype=torch.int64), counters.clone()) for _ in range(ranks)]

    def exchange(self, lengths, passes=True, linked=None, programs=3):
        """Random states through the line, and back as (entering states, what they should be)."""
        ranks = len(self.boxes)
        linked = linked or [True] * (ranks - 1)
        log_decay = -torch.rand(self.shape[1]) * 0.1
        found, wanted, state = [], [], None
        for rank, length in enumerate(lengths):
            local = torch.randn(self.shape)
            receives = rank > 0 and linked[rank - 1]
            sends = rank < ranks - 1 and linked[rank]
            entering = torch.full(self.shape, float("nan")) if receives else None
            relay(
                *(local, log_decay, length, entering, self.boxes[rank]),
                self.boxes[rank - 1] if receives else None,
                self.boxes[rank + 1] if sends else None,
                passes=passes,
                programs=programs,
            )
            if receives:
                found.append(entering)
                wanted.append(state)
            state = local.double()
            if receives and passes:
                state += torch.exp(log_decay.double() * length)[:, None, None] * wanted[-1]
        return found, wanted


def check(ranks=4, shape=(1, 3, 80, 100), exchanges=3, **options):
    line = Line(ranks, shape)
    for i in range(exchanges):
        lengths = [7 * i + rank for rank in range(ranks)]
        for found, wanted in zip(*line.exchange(lengths, **options), strict=True):
            assert (found.double() - wanted).norm() < 1e-6 * wanted.norm()


def check_counters():
    """Every chunk is counted once per exchange, on both sides."""
    line = Line(3, (1, 2, 64, 100))
    chunks = -(-12800 // CHUNK)
    line.exchange([1, 2, 3])
    line.exchange([1, 2, 3], linked=[True, False])
    received, sent, consumed = (
        [counters[i * chunks : (i + 1) * chunks].tolist() for _, counters in line.boxes]
        for i in range(3)
    )
    assert received == [[0] * chunks, [2] * chunks, [1] * chunks]
    assert sent == consumed == [[2] * chunks, [1] * chunks, [0] * chunks]


CASES = {
    "several chunks, the last one short": check,
    "less than a chunk": lambda: check(shape=(2, 1, 5, 7)),
    "whole chunks, one program": lambda: check(shape=(1, 2, 64, 64), programs=1),
    "two ranks": lambda: check(ranks=2),
    "nothing passes": lambda: check(passes=False),
    "documents end at borders": lambda: check(linked=[True, False, True]),
    "counters": check_counters,
}


if __name__ == "__main__":
    interpreter.report(CASES)
