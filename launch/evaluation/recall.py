"""Associative recall: which value belongs to a key that was read many tokens ago?

    key value  key value  ...  filler filler filler ...  key -> value?
    |---- num_pairs ----|      |------- gap -------|

Keys, values and fillers are disjoint sets of token ids, drawn anew for every sequence; nothing is
downloaded. The state after the filler is the past of every query, so one pass over the longest gap
answers all queries at all shorter ones, and each query costs a single token.

Shapes: B sequences, P pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.data import IGNORE

# Tokens of filler that are read at a time.
_CHUNK = 2048


@dataclass(frozen=True)
class RecallTask:
    """The token ids that sequences are made of, int64 vectors, and the pairs of a sequence."""

    keys: Tensor
    values: Tensor
    fillers: Tensor
    num_pairs: int

    @classmethod
    def from_tokens(cls, tokens: Iterable[int], num_pairs: int, seed: int = 0) -> RecallTask:
        """A task that splits some token ids at random into thirds: keys, values and fillers.

        Raises:
            ValueError: too few ids for so many pairs of different keys and values.
        """
        ids = torch.tensor(list(tokens), dtype=torch.int64)
        third = len(ids) // 3
        if not 1 <= num_pairs <= third:
            raise ValueError(
                f"{num_pairs} pairs: there must be at least 1, and at most {third}, a third of the "
                f"{len(ids)} token ids."
            )
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        return cls(ids[:third], ids[third : 2 * third], ids[2 * third :], num_pairs)

    def pairs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Keys and values [B, P], without repetition within a sequence."""
        keys, values = (
            torch.stack(
                [
                    ids[torch.randperm(len(ids), generator=generator)[: self.num_pairs]]
                    for _ in range(batch_size)
                ]
            )
            for ids in (self.keys, self.values)
        )
        return keys, values

    def filler(self, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
        """Random filler [B, length]."""
        size = (batch_size, length)
        return self.fillers[torch.randint(len(self.fillers), size, generator=generator)]

    def sequences(
        self, batch_size: int, gap: int, generator: torch.Generator, *, rounds: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Sequences to train on: pairs, filler, then `rounds` times all pairs in a random order.

        Returns:
            (inputs, labels), each [B, 2 P (1 + rounds) + gap]. Only the values after the filler are
            labels, the others are IGNORE.
        """
        keys, values = self.pairs(batch_size, generator)
        order = torch.rand(rounds, *keys.shape, generator=generator).argsort(-1).unbind()
        asked = torch.cat([keys.gather(1, each) for each in order], dim=1)
        answers = torch.cat([values.gather(1, each) for each in order], dim=1)
        inputs = torch.cat(
            [
                torch.stack([keys, values], 2).flatten(1),
                self.filler(batch_size, gap, generator),
                torch.stack([asked, answers], 2).flatten(1),
            ],
            dim=1,
        )
        labels = torch.full_like(inputs, IGNORE)
        labels[:, 2 * self.num_pairs + gap :: 2] = answers
        return inputs, labels


def gaps_up_to(largest: int) -> list[int]:
    """0 and the powers of two up to `largest`."""
    return [0, *(1 << power for power in range(largest.bit_length()))][: largest.bit_length() + 1]


@dataclass
class RecallCounts:
    """Sums over the queries at one gap; `+` adds those of other sequences.

    Attributes:
        queries: their number.
        correct: the most likely token of the whole vocabulary is the value.
        correct_among_pairs: of the values in the sequence, the right one is the most likely.
        rank: sum of the ranks of the value in the vocabulary, 1 for the most likely token.
        loss: sum of the losses of the value, in nats.
    """

    queries: int = 0
    correct: int = 0
    correct_among_pairs: int = 0
    rank: int = 0
    loss: float = 0.0

    def __add__(self, other: RecallCounts) -> RecallCounts:
        return RecallCounts(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    @property
    def numbers(self) -> list[float]:
        """All fields, in order."""
        return [self.queries, self.correct, self.correct_among_pairs, self.rank, self.loss]

    def means(self) -> dict[str, float]:
        """What a result file holds."""
        count = max(self.queries, 1)
        return {
            "queries": int(self.queries),
            "accuracy": self.correct / count,
            "accuracy_among_pairs": self.correct_among_pairs / count,
            "rank": self.rank / count,
            "loss": self.loss / count,
        }


@torch.no_grad()
def recall_by_gap(
    model: nn.Module,
    task: RecallTask,
    gaps: Sequence[int],
    batch_size: int,
    generator: torch.Generator,
    after_chunk: Callable[[int], None] = lambda tokens: None,
) -> list[RecallCounts]:
    """How well a model recalls the pairs of some sequences, one entry per gap.

    Args:
        model: in evaluation mode; it takes and returns states, see `launch.build.ModelFamily`.
        gaps: tokens between the last pair and the query, ascending.
        batch_size: sequences.
        generator: of the sequences, on the CPU.
        after_chunk: called with the tokens of each sequence that were read.
    """
    device = model.head_weight.device
    keys, values = (each.to(device) for each in task.pairs(batch_size, generator))
    states, length = None, 0

    def read(tokens: Tensor) -> Any:
        _, after = model(tokens.to(device), states=states, return_states=True, return_hidden=True)
        after_chunk(tokens.shape[1])
        return after

    states = read(torch.stack([keys, values], 2).flatten(1))
    counts = []
    for gap in gaps:
        while length < gap:
            step = min(_CHUNK, gap - length)
            states = read(task.filler(batch_size, step, generator))
            length += step
        counts.append(_ask(model, states, keys, values))
    return counts


def _ask(model: nn.Module, states: Any, keys: Tensor, values: Tensor) -> RecallCounts:
    """Query every key [B, P], each right after the same past."""
    total = RecallCounts()
    for pair in range(keys.shape[1]):
        logits, _ = model(keys[:, pair : pair + 1], states=states, return_states=True)
        logits_BV = logits[:, 0].float()
        value_B1 = values[:, pair : pair + 1]
        score_B1 = logits_BV.gather(1, value_B1)
        # Ties count against the model, so that equal logits are not a success.
        rank_B = (logits_BV >= score_B1).sum(1)
        among_B = (logits_BV.gather(1, values) >= score_B1).sum(1)
        loss_B = torch.logsumexp(logits_BV, 1) - score_B1[:, 0]
        total += RecallCounts(
            len(keys),
            int((rank_B == 1).sum()),
            int((among_B == 1).sum()),
            int(rank_B.sum()),
            float(loss_B.double().sum()),
        )
    return total
