"""Which tokens each rank reads at each step.

A source is a stream of tokens cut into samples of seq_len + 1 tokens that overlap by one: inputs
are the first seq_len, labels the last, so the shift happens before any cut over ranks. Samples
come in an order that depends on the seed alone. All there is to resume is the number of samples
consumed, whatever the number of ranks before and after.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from launch.errors import DataError
from launch.indexed import IndexedTokens
from launch.tokenizer import tokenizer_from_spec

if TYPE_CHECKING:
    from torch import Tensor

    from lasp import SequenceShard
    from launch.tokenizer import Tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "DataFolder",
    "RandomSource",
    "TokenSource",
    "read_batch",
    "sample_order",
    "step_samples",
]

IGNORE = -100
# Above this, the vocabulary is checked as batches are read and not at the start.
_SCAN_AT_OPEN = 1 << 28


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        inputs: [B, T] int64, T tokens of this rank's shard.
        labels: [B, T] int64, the token after each input, or IGNORE.
        boundaries: starts of documents within the whole sequence, for varlen: (0, ..., its tokens);
            None: off.
    """

    inputs: Tensor
    labels: Tensor
    boundaries: tuple[int, ...] | None = None


class TokenSource(Protocol):
    """Samples by index."""

    num_samples: int
    bytes_per_token: float | None

    def sample(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop + 1) of sample `index`: the inputs of a shard and one more."""

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Offsets in 1 .. seq_len of sample `index` (the last is a label only) that start one."""


class IndexedSource:
    """Samples of a pair of `.bin`/`.idx` files."""

    def __init__(
        self, prefix: Path, seq_len: int, vocab_size: int, bytes_per_token: float | None = None
    ) -> None:
        self._file = IndexedTokens(prefix)
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self.bytes_per_token = bytes_per_token
        self.num_samples = (len(self._file) - 1) // seq_len
        if self.num_samples < 1:
            # A few per cent of the text: long sequences meet this one first.
            spare = ", or --validation.no_enable" if prefix.name == "val" else ""
            raise DataError(
                f"{self._file.path} has {len(self._file)} tokens: one sequence needs "
                f"training.seq_len + 1 = {seq_len + 1}; add data or lower training.seq_len{spare}."
            )
        if len(self._file) <= _SCAN_AT_OPEN:
            self._file.check_vocabulary(vocab_size)

    def sample(self, index: int, start: int, stop: int) -> np.ndarray:
        origin = index * self._seq_len
        first, last = origin + start, origin + stop + 1
        if len(self._file) > _SCAN_AT_OPEN:
            self._file.check_vocabulary(self._vocab_size, first, last)
        return self._file.tokens[first:last].astype(np.int64)

    def document_starts(self, index: int) -> tuple[int, ...]:
        origin = index * self._seq_len
        starts = self._file.document_starts
        low, high = np.searchsorted(starts, [origin + 1, origin + self._seq_len + 1])
        return tuple(np.unique(starts[low:high] - origin).tolist())


class RandomSource:
    """Uniformly random tokens, a fixed function of seed and index: for measuring speed."""

    num_samples = 1 << 40
    bytes_per_token = None

    def __init__(self, seq_len: int, vocab_size: int, seed: int) -> None:
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self._seed = seed

    def sample(self, index: int, start: int, stop: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, index])
        tokens = generator.integers(0, self._vocab_size, self._seq_len + 1, dtype=np.int64)
        return tokens[start : stop + 1]

    def document_starts(self, index: int) -> tuple[int, ...]:
        return ()


class DataFolder:
    """A folder that prepare_data wrote: train and val files, and meta.json about them.

    meta.json may be missing (files written by Megatron's tools); then there is no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = {}
        path = folder / "meta.json"
        if not folder.is_dir():
            raise DataError(f"data.folder {folder} is missing: run launch/prepare_data.py.")
        if path.is_file():
            try:
                self.meta = json.loads(path.read_text(encoding="utf-8"))
                # A DataError of the tokenizer is a ValueError, too: it joins the file's name.
                self.tokenizer: Tokenizer | None = tokenizer_from_spec(self.meta["tokenizer"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
                raise DataError(f"{path} is damaged ({why}): prepare the data again.") from None
        else:
            self.tokenizer = None

    def source(self, split: str, seq_len: int, vocab_size: int) -> IndexedSource:
        """The samples of "train" or "val"."""
        about = self.meta.get(split, {})
        try:
            # Without these numbers there is only no bits per byte.
            known = about.get("bytes") and about.get("tokens")
            ratio = about["bytes"] / about["tokens"] if known else None
        except (AttributeError, TypeError):
            raise DataError(
                f"{self.folder / 'meta.json'} is damaged ({split!r} is {about!r}): prepare the "
                "data again."
            ) from None
        return IndexedSource(self.folder / split, seq_len, vocab_size, ratio)


def sample_order(consumed: int, count: int, num_samples: int, seed: int) -> list[int]:
    """Sample indices number consumed .. consumed + count - 1 of an endless seeded shuffle.

    Each pass over the samples is a permutation of its own. A pass too large to permute in memory
    is a random source, whose samples need no shuffle.
    """
    if num_samples > 1 << 32:
        return [position % num_samples for position in range(consumed, consumed + count)]
    indices: list[int] = []
    while len(indices) < count:
        epoch, first = divmod(consumed + len(indices), num_samples)
        order = _order_of_pass(seed, epoch, num_samples)
        indices += order[first : first + count - len(indices)].tolist()
    return indices


# A pass is as long as the data: it is permuted once and not at every step, and one is kept.
@functools.lru_cache(maxsize=1)
def _order_of_pass(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    # Half the memory for what is kept; see sample_order for the largest number.
    return np.random.default_rng([seed, epoch]).permutation(num_samples).astype(np.uint32)


def step_samples(
    indices: list[int], *, local_batch_size: int, dp_rank: int, dp: int
) -> list[list[int]]:
    """This data-parallel rank's part of one step's samples: a list of micro-batches.

    Micro-batch m is samples m * (B * dp) .. (m + 1) * (B * dp), of which each rank takes B
    neighbours; over all ranks and micro-batches a step is `indices`, whatever dp is.
    """
    stride = local_batch_size * dp
    assert len(indices) % stride == 0
    offset = dp_rank * local_batch_size
    return [
        indices[first + offset : first + offset + local_batch_size]
        for first in range(0, len(indices), stride)
    ]


def read_batch(
    source: TokenSource,
    indices: list[int],
    shard: SequenceShard,
    *,
    pad_id: int | None = None,
    varlen: bool = False,
) -> Batch:
    """The shard's tokens of some samples. Labels equal to `pad_id` are IGNOREd."""
    parts = [
        np.stack([source.sample(index, start, stop) for index in indices])
        for start, stop in shard.ranges
    ]
    # Shifted part by part: in zigzag another token follows than the one that is next here.
    inputs = torch.from_numpy(np.concatenate([part[:, :-1] for part in parts], axis=1))
    labels = torch.from_numpy(np.concatenate([part[:, 1:] for part in parts], axis=1))
    if pad_id is not None:
        labels[labels == pad_id] = IGNORE
    boundaries = None
    if varlen:
        assert len(indices) == 1
        starts = source.document_starts(indices[0])
        # What follows a document is another one: its first token cannot be predicted.
        positions = np.concatenate([np.arange(*each) for each in shard.ranges])
        labels[0, np.isin(positions + 1, starts)] = IGNORE
        boundaries = (0, *(start for start in starts if start < shard.total), shard.total)
    return Batch(inputs, labels, boundaries)
