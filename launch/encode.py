"""Documents to tokens of both splits: the part of preparing data that every worker does."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launch.documents import Chunk
from launch.exit_codes import DataError
from launch.indexed_dataset import token_dtype
from launch.tokenizer import Tokenizer, tokenizer_from_spec

# Texts encoded by one call: of many short ones, the tokens of the library are never all held.
_CHARACTERS = 1 << 18


@dataclass
class HeldOut:
    """Which documents are held out for validation: those with a hash below `fraction`, but at least
    one, and not all.

    Whether the fraction gives that is known once all names were seen.
    """

    fraction: float
    count: int = 0
    count_below: int = 0
    lowest: list[float] = field(default_factory=list)
    highest: float = 0.0

    def see(self, hashes: list[float]) -> None:
        """Take note of some documents."""
        self.count += len(hashes)
        self.count_below += sum(each < self.fraction for each in hashes)
        self.lowest = sorted([*self.lowest, *hashes])[:2]
        self.highest = max([self.highest, *hashes])

    @property
    def threshold(self) -> float:
        """Documents whose hash is below this are held out. 0: there is one document, of which the
        end is held out."""
        if self.count == 1:
            return 0.0
        if 0 < self.count_below < self.count:
            return self.fraction
        return self.lowest[1] if self.count_below == 0 else self.highest


def split_document(text: str, fraction: float) -> tuple[str, str]:
    """A single document's training text, and its end, which is held out."""
    cut = max(1, round(len(text) * (1 - fraction)))
    return text[:cut], text[cut:]


def hash_of(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    # File names may not be UTF-8.
    encoded = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(encoded).digest()[:7], "big") / 2**56


@dataclass
class EncodedSplit:
    """Some documents of one split: tokens one after another, and where each document ends.

    Attributes:
        tokens: of the documents, each with its end-of-document token.
        lengths: tokens of each.
        num_bytes: of text, in UTF-8.
    """

    tokens: np.ndarray
    lengths: list[int]
    num_bytes: int


@dataclass
class Encoded:
    """A chunk of documents as tokens."""

    splits: dict[str, EncodedSplit]
    hashes: list[float]
    skipped: list[str]
    size: int


class Encoder:
    """Encodes chunks.

    Args:
        spec: of the tokenizer.
        threshold: of `HeldOut`.
        fraction: of a single document that is held out.
    """

    def __init__(self, spec: dict[str, Any], threshold: float, fraction: float) -> None:
        self._coder = tokenizer_from_spec(spec)
        self._threshold = threshold
        self._fraction = fraction

    def __call__(self, chunk: Chunk) -> Encoded:
        skipped: list[str] = []
        hashes: list[float] = []
        named: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
        for name, text in chunk.documents(skipped):
            hashes.append(hash_of(name))
            if self._threshold > 0:
                named["val" if hashes[-1] < self._threshold else "train"].append((name, text))
            else:
                train, val = split_document(text, self._fraction)
                named["train"].append((name, train))
                named["val"].append((name, val))
        splits = {split: encode(self._coder, texts) for split, texts in named.items()}
        return Encoded(splits, hashes, skipped, chunk.size)


def encode(coder: Tokenizer, named: list[tuple[str, str]]) -> EncodedSplit:
    """The tokens of documents, given as name and text.

    Raises:
        DataError: a document cannot be encoded, or is too long for the format; it is named.
    """
    dtype = token_dtype(coder.vocab_size)
    end = np.array([coder.eod_id], dtype)
    parts: list[np.ndarray] = []
    for group in _groups(named):
        for ids in _encode_group(coder, group, dtype):
            parts += [ids, end]
    lengths = [len(ids) + 1 for ids in parts[::2]]
    for (name, _), length in zip(named, lengths, strict=True):
        if length >= 1 << 31:
            raise DataError(
                f"document {name} has {length:,} tokens: the format holds at most 2^31 - 1 per "
                "document; divide it."
            )
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
    return EncodedSplit(tokens, lengths, sum(len(text.encode("utf-8")) for _, text in named))


def _groups(named: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    group: list[tuple[str, str]] = []
    size = 0
    for each in named:
        group.append(each)
        size += len(each[1])
        if size >= _CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_group(
    coder: Tokenizer, group: list[tuple[str, str]], dtype: np.dtype
) -> list[np.ndarray]:
    try:
        return coder.encode_batch([text for _, text in group], dtype)
    except DataError:
        # Once more one by one, to name the document.
        for name, text in group:
            try:
                coder.encode_batch([text], dtype)
            except DataError as error:
                raise DataError(f"document {name}: {error}") from None
        raise
