"""Which tokens each rank reads at each step.

A source is a stream of tokens divided into samples of seq_len + 1 tokens that overlap by one:
inputs are the first seq_len, labels the last, so labels are shifted before a sequence is sharded.
The order of samples depends on the seed alone. To resume, the number of samples consumed is enough,
whatever the number of ranks before and after.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lasp import SequenceShard
from launch.data_digests import FileDigests, check_meta
from launch.exit_codes import DataError
from launch.files import is_folder, read_json
from launch.indexed_dataset import IndexedTokens
from launch.tokenizer import Tokenizer, tokenizer_from_spec

IGNORE = -100
# Larger files are checked against vocabulary and digests as batches are read, not at the start.
SCAN_AT_OPEN = 1 << 28
# Random tokens are drawn in blocks, so that a segment of a long sample can be drawn by itself.
_RANDOM_BLOCK = 1 << 16
# Of a large file, that are compared between ranks.
_BLOCKS = 64


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        inputs: [B, T] int64, T tokens of this rank's shard.
        labels: [B, T] int64, the token after each input, or IGNORE.
        shard: which tokens of the sequence (or of a segment of it) these are.
        cu_seqlens: document boundaries in the sequence (segment), (0, ..., tokens); None without
            varlen.
        continues: the first token does not start a document; True without varlen.
        dropout_seeds: int64 [B], for a model with dropout in training.
    """

    inputs: Tensor
    labels: Tensor
    shard: SequenceShard
    cu_seqlens: tuple[int, ...] | None = None
    continues: bool = True
    dropout_seeds: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Labels that are not IGNORE."""
        return int((self.labels != IGNORE).sum())

    def without_labels(self) -> "Batch":
        """The batch with every label ignored."""
        return dataclasses.replace(self, labels=torch.full_like(self.labels, IGNORE))

    def arguments(self, device: torch.device) -> tuple[Any, ...]:
        """The arguments of `LossModel.forward`, the tokens on `device`."""
        inputs, labels = (x.to(device, non_blocking=True) for x in (self.inputs, self.labels))
        return inputs, labels, self.shard, self.cu_seqlens

    def options(self, device: torch.device) -> dict[str, Any]:
        """Further ones, by name."""
        if self.dropout_seeds is None:
            return {}
        return {"dropout_seeds": self.dropout_seeds.to(device, non_blocking=True)}


class Segments:
    """Consecutive parts of a sequence, each sharded over the ranks by itself.

    Args:
        seq_len: tokens of the sequence.
        segment_len: tokens of a segment; the last one may be shorter.
        split: tokens -> this rank's shard of them.
    """

    def __init__(
        self, seq_len: int, segment_len: int, split: Callable[[int], SequenceShard]
    ) -> None:
        self.seq_len = seq_len
        self.segment_len = min(segment_len, seq_len)
        self.count = -(-seq_len // self.segment_len)
        last = seq_len - (self.count - 1) * self.segment_len
        self._split = split
        self._shard, self._last_shard = split(self.segment_len), split(last)

    def first(self, count: int) -> "Segments":
        """The first `count` segments only."""
        length = min(count * self.segment_len, self.seq_len)
        return Segments(length, self.segment_len, self._split)

    def start(self, index: int) -> int:
        """The first token of a segment."""
        return index * self.segment_len

    def shard(self, index: int) -> SequenceShard:
        """This rank's tokens of a segment, counted from its first one."""
        return self._last_shard if index == self.count - 1 else self._shard


@dataclass(frozen=True)
class SegmentedBatch:
    """One micro-batch of one rank, read segment by segment: never held in memory as a whole.

    Attributes:
        read: segment -> its `Batch`.
        num_segments: of the sequence.
        num_labels: labels that are not IGNORE; None until they are counted.
    """

    read: Callable[[int], Batch]
    num_segments: int
    num_labels: int | None = None

    def with_labels_counted(self) -> "SegmentedBatch":
        """Read all segments once, to count their labels and to find bad data before a step."""
        count = sum(self.read(index).num_labels for index in range(self.num_segments))
        return dataclasses.replace(self, num_labels=count)

    def without_labels(self) -> "SegmentedBatch":
        """The batch with every label ignored."""
        return SegmentedBatch(lambda i: self.read(i).without_labels(), self.num_segments, 0)


class TokenSource(Protocol):
    """Samples by index."""

    num_samples: int
    bytes_per_token: float | None
    words_per_token: float | None

    def sample(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop + 1) of sample `index`: a shard's inputs and one more token."""

    def document_starts(self, index: int, start: int, stop: int) -> np.ndarray:
        """Offsets in start..stop (both included) of sample `index` at which a document starts."""

    def order(self, consumed: int, count: int, seed: int) -> list[int]:
        """Sample indices at positions consumed..consumed + count - 1 of training."""

    def first(self, count: int) -> list[int]:
        """At most `count` sample indices to validate on."""

    @property
    def identity(self) -> list[Any]:
        """What `order` depends on besides its arguments, as JSON."""

    @property
    def content(self) -> list[dict[str, Any]]:
        """What tells the tokens of each folder from others, as JSON; wherever the folder lies."""


class _SingleSource:
    """The order of samples that are all alike."""

    num_samples: int
    words_per_token: float | None = None

    def order(self, consumed: int, count: int, seed: int) -> list[int]:
        return sample_order(consumed, count, self.num_samples, seed)

    def first(self, count: int) -> list[int]:
        return list(range(min(count, self.num_samples)))

    @property
    def identity(self) -> list[Any]:
        return [self.num_samples]


class IndexedSource(_SingleSource):
    """Samples from a pair of `.bin`/`.idx` files.

    Args:
        flag: what the program calls seq_len, for its error message.
        digests: of the files, by name.
        verify: check all of a large file now; one of up to 2^28 tokens always is.
    """

    def __init__(
        self,
        prefix: Path,
        seq_len: int,
        vocab_size: int,
        bytes_per_token: float | None = None,
        flag: str = "training.seq_len",
        digests: Mapping[str, FileDigests] | None = None,
        verify: bool = False,
    ) -> None:
        self._file = IndexedTokens(prefix, digests)
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self.bytes_per_token = bytes_per_token
        self.num_samples = (len(self._file) - 1) // seq_len
        if self.num_samples < 1:
            # The validation split is small: a seq_len that is too long fails here first.
            trains = flag == "training.seq_len"
            spare = ", or --validation.no_enable" if trains and prefix.name == "val" else ""
            raise DataError(
                f"{self._file.path} has {len(self._file)} tokens: one sequence needs "
                f"{flag} + 1 = {seq_len + 1}; add data or lower {flag}{spare}."
            )
        # Reading checks the digests.
        if len(self._file) <= SCAN_AT_OPEN:
            self._file.check_vocabulary(vocab_size)
        elif verify:
            self._file.check_all()

    def sample(self, index: int, start: int, stop: int) -> np.ndarray:
        origin = index * self._seq_len
        first, last = origin + start, origin + stop + 1
        if len(self._file) > SCAN_AT_OPEN:
            self._file.check_vocabulary(self._vocab_size, first, last)
        return self._file.read(first, last).astype(np.int64)

    @property
    def content(self) -> list[dict[str, Any]]:
        return [self._file.content]

    def document_starts(self, index: int, start: int, stop: int) -> np.ndarray:
        origin = index * self._seq_len
        starts = self._file.document_starts
        low, high = np.searchsorted(starts, [origin + start, origin + stop + 1])
        return np.unique(starts[low:high] - origin)


class RandomSource(_SingleSource):
    """Uniformly random tokens, a function of seed, index and position, to measure speed."""

    num_samples = 1 << 40
    bytes_per_token = None

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._seed = seed

    def sample(self, index: int, start: int, stop: int) -> np.ndarray:
        first, last = start // _RANDOM_BLOCK, stop // _RANDOM_BLOCK
        blocks = [self._block(index, block) for block in range(first, last + 1)]
        origin = first * _RANDOM_BLOCK
        return np.concatenate(blocks)[start - origin : stop + 1 - origin]

    def _block(self, index: int, block: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, index, block])
        return generator.integers(0, self._vocab_size, _RANDOM_BLOCK, dtype=np.int64)

    def document_starts(self, index: int, start: int, stop: int) -> np.ndarray:
        return np.empty(0, np.int64)

    @property
    def content(self) -> list[dict[str, Any]]:
        return [{"random": [self._vocab_size, self._seed]}]


class DataFolder:
    """The output of prepare_data: train and val files, and meta.json.

    Without meta.json (files written by Megatron's tools) there is no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = {}
        self._digests: dict[str, FileDigests] = {}
        path = folder / "meta.json"
        if not is_folder(folder):
            raise DataError(f"data.folder {folder} is missing: run launch/prepare_data.py.")
        if os.path.lexists(path):
            try:
                self.meta = read_json(path)
                self._digests = check_meta(self.meta)
                # Catches the tokenizer's DataError too, and adds the file's name.
                self.tokenizer: Tokenizer | None = tokenizer_from_spec(self.meta["tokenizer"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
                raise DataError(f"{path} is damaged ({why}): prepare the data again.") from None
        else:
            self.tokenizer = None

    def source(
        self,
        split: str,
        seq_len: int,
        vocab_size: int,
        *,
        flag: str = "training.seq_len",
        verify: bool = False,
    ) -> IndexedSource:
        """The samples of "train" or "val", or of another split that the folder has; see
        `IndexedSource`."""
        about = self.meta.get(split, {})
        try:
            # Without these numbers, bits per byte are left out.
            known = about.get("bytes") and about.get("tokens")
            ratio = about["bytes"] / about["tokens"] if known else None
        except (AttributeError, TypeError, ArithmeticError):
            raise DataError(
                f"{self.folder / 'meta.json'} is damaged ({split!r} is {about!r}): prepare the "
                "data again."
            ) from None
        prefix = self.folder / split
        source = IndexedSource(prefix, seq_len, vocab_size, ratio, flag, self._digests, verify)
        if known and about.get("words"):
            source.words_per_token = about["words"] / about["tokens"]
        return source


def data_facts(
    folders: Sequence[tuple[Path, float]], sources: Mapping[str, TokenSource]
) -> dict[str, Any]:
    """What tells the data of a run from other data, by name, without paths.

    Opening a source has found the digests of its files, but not of large ones that were prepared
    without: of these, _BLOCKS blocks from the first byte to the last count.

    Args:
        folders: with their weights.
        sources: of all folders, by split.

    Raises:
        DataError: a file cannot be read.
    """
    facts: dict[str, Any] = {}
    for number, (folder, weight) in enumerate(folders):
        of = f"of the data, folder {number + 1}" if len(folders) > 1 else "of the data"
        facts[f"weight {of}"] = weight
        if (folder / "meta.json").is_file():
            facts[f"meta.json {of}"] = _digest(folder / "meta.json")
        for split, source in sources.items():
            content = source.content[number]
            facts[f"{split}.idx {of}"] = content["index"]
            facts[f"{split}.bin {of}"] = content["tokens"] or _digest(folder / f"{split}.bin")
    return facts


def _digest(path: Path) -> str:
    """The size of a file and a digest of it, or of blocks of a large one, for a message."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= SCAN_AT_OPEN:
                digest = hashlib.file_digest(file, "sha256")
            else:
                block = SCAN_AT_OPEN // _BLOCKS
                for index in range(_BLOCKS):
                    file.seek(index * (size - block) // (_BLOCKS - 1))
                    digest.update(file.read(block))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return f"{size} bytes, sha256 {digest.hexdigest()[:16]}"


def dropout_seeds(indices: Sequence[int], step: int, seed: int) -> Tensor:
    """A seed for each sample of a step, int64: the same on whichever rank it is read."""
    entropy = (np.random.SeedSequence([seed, step, index]) for index in indices)
    return torch.tensor([int(each.generate_state(1, np.uint64)[0] >> 1) for each in entropy])


def sample_order(consumed: int, count: int, num_samples: int, seed: int) -> list[int]:
    """Sample indices at positions consumed..consumed + count - 1 of an endless seeded shuffle.

    Each pass over the samples is a new permutation. Only a random source is too large to permute in
    memory, and its samples need no shuffle.
    """
    if num_samples > 1 << 32:
        return [position % num_samples for position in range(consumed, consumed + count)]
    indices: list[int] = []
    while len(indices) < count:
        epoch, first = divmod(consumed + len(indices), num_samples)
        order = _order_of_pass(seed, epoch, num_samples)
        indices += order[first : first + count - len(indices)].tolist()
    return indices


def stream_order(consumed: int, count: int, num_samples: int) -> list[int]:
    """Sample indices of a step that reads on where the step before stopped.

    The samples are divided into `count` streams of consecutive ones, one per sequence of a step.
    After the last sample of the streams they start again, and up to count - 1 samples are left out.
    """
    length = stream_length(count, num_samples)
    offset = stream_offset(consumed, count, num_samples)
    return [stream * length + offset for stream in range(count)]


def stream_offset(consumed: int, count: int, num_samples: int) -> int:
    """The samples of each of `count` streams that were read since their beginning."""
    return consumed // count % stream_length(count, num_samples)


def stream_length(count: int, num_samples: int) -> int:
    """Samples of each of `count` streams.

    Raises:
        DataError: there are fewer samples than streams.
    """
    if num_samples < count:
        raise DataError(
            f"training.carry_state reads {count} streams (training.global_batch_size), and the "
            f"data has {num_samples} samples: use a smaller batch or a shorter training.seq_len."
        )
    return num_samples // count


def order_of_pass(seed: int, epoch: int, num_samples: int, source: int = 0) -> np.ndarray:
    """The permutation of the samples in one pass over source number `source`."""
    entropy = [seed, epoch, source] if source else [seed, epoch]
    # uint32 halves the memory; sample_order keeps larger numbers away.
    return np.random.default_rng(entropy).permutation(num_samples).astype(np.uint32)


# Cached, because a permutation is as long as the data.
_order_of_pass = functools.lru_cache(maxsize=1)(order_of_pass)


def step_samples(
    indices: list[int], *, local_batch_size: int, dp_rank: int, dp: int
) -> list[list[int]]:
    """A data-parallel rank's samples of one step, as a list of micro-batches.

    Micro-batch m is samples m * (B * dp) .. (m + 1) * (B * dp), of which each rank takes B in a
    row. Together, all ranks and micro-batches are `indices`, whatever dp is.
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
    first: int = 0,
    pad_id: int | None = None,
    varlen: bool = False,
) -> Batch:
    """A shard of some samples, or of a segment of each. Labels equal to `pad_id` become IGNORE.

    Args:
        shard: of the `shard.total` tokens from token `first` of a sample on.
    """
    ranges = [(first + start, first + stop) for start, stop in shard.ranges]
    chunks = [
        np.stack([source.sample(index, start, stop) for index in indices]) for start, stop in ranges
    ]
    # Shifted chunk by chunk: in zigzag, the token after a chunk is not the next one in this shard.
    inputs = torch.from_numpy(np.concatenate([chunk[:, :-1] for chunk in chunks], axis=1))
    labels = torch.from_numpy(np.concatenate([chunk[:, 1:] for chunk in chunks], axis=1))
    if pad_id is not None:
        labels[labels == pad_id] = IGNORE
    cu_seqlens, continues = None, True
    if varlen:
        assert len(indices) == 1
        end = first + shard.total
        starts = source.document_starts(indices[0], first, end)
        # The first token of the next document cannot be predicted.
        positions = np.concatenate([np.arange(*each) for each in ranges])
        labels[0, np.isin(positions + 1, starts)] = IGNORE
        inside = starts[(starts > first) & (starts < end)] - first
        cu_seqlens = (0, *inside.tolist(), shard.total)
        continues = first not in starts
    return Batch(inputs, labels, shard, cu_seqlens, continues)
