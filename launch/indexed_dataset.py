"""Tokens on disk in Megatron's indexed format: `name.bin` and `name.idx`.

`.bin` is the tokens of all documents one after another. `.idx` is, little-endian:

    9 bytes   magic "MMIDIDX", two zero bytes
    uint64    version 1
    uint8     dtype code of the tokens
    uint64    number of sequences S (here one sequence is one document)
    uint64    number of document indices (S + 1 here)
    int32[S]  tokens of each sequence
    int64[S]  byte offset of each sequence in `.bin`
    int64[.]  document boundaries, as indices into the sequences
"""

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch.exit_codes import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if the vocabulary fits, else int32: the two that Megatron writes."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.int32)


class IndexedWriter:
    """Writes documents one by one; the pair of files is complete after `close`."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._bin = prefix.with_suffix(".bin").open("xb")
        # Four bytes for each, where a list has 36: there may be hundreds of millions.
        self._lengths = array("i")

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, [n] integers that fit the dtype."""
        self.add_all(tokens, [len(tokens)])

    def add_all(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents of these lengths, whose tokens follow each other."""
        assert tokens.ndim == 1 and sum(lengths) == len(tokens)
        self._bin.write(np.ascontiguousarray(tokens, self._dtype).data)
        self._lengths.extend(lengths)

    def close(self) -> None:
        """Flush the tokens and write the index."""
        self._bin.close()
        lengths = np.array(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        count = len(lengths)
        with self._prefix.with_suffix(".idx").open("xb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, _CODES[self._dtype], count, count + 1))
            index.write(lengths.tobytes())
            index.write(pointers.tobytes())
            index.write(np.arange(count + 1, dtype=np.int64).tobytes())


class IndexedTokens:
    """The tokens of a pair of files as a memory map, with a checked index.

    Attributes:
        tokens: [n], the dtype of the file; read-only.
        document_starts: token offset of each document, [documents] int64.

    Raises:
        DataError: a missing, empty or truncated file, or an index that does not describe the
            tokens; the message names the file.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = prefix.with_suffix(".bin")
        index_path = prefix.with_suffix(".idx")
        for path in (self.path, index_path):
            if not path.is_file():
                raise DataError(f"{path} is missing: write it with launch/prepare_data.py.")
        dtype, lengths, pointers, documents = _read_index(index_path)
        size = self.path.stat().st_size
        expected = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
        if size == 0 or expected == 0:
            raise DataError(f"{self.path} holds no tokens.")
        if size != expected:
            raise DataError(
                f"{self.path} has {size} bytes but {index_path.name} describes {expected}: one of "
                "the two is truncated or from another run; prepare the data again."
            )
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        if not np.array_equal(pointers, ends - lengths.astype(np.int64) * dtype.itemsize):
            raise DataError(f"{index_path}: the documents are not contiguous in .bin.")
        if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
            raise DataError(f"{index_path}: the document boundaries are not in order.")
        self.tokens = np.memmap(self.path, dtype=dtype, mode="r")
        starts = pointers // dtype.itemsize
        self.document_starts = starts[documents[:-1][documents[:-1] < len(starts)]]

    def __len__(self) -> int:
        return len(self.tokens)

    def check_vocabulary(self, vocab_size: int, start: int = 0, stop: int | None = None) -> None:
        """Raise DataError, with file and token offset, where a token is not in 0..vocab_size-1."""
        # In slices, because comparing the whole file at once needs memory.
        stop = len(self) if stop is None else stop
        for first in range(start, stop, 1 << 22):
            part = self.tokens[first : min(first + (1 << 22), stop)]
            if part.min() >= 0 and part.max() < vocab_size:
                continue
            offset = first + int(np.argmax((part < 0) | (part >= vocab_size)))
            raise DataError(
                f"{self.path}: token {int(self.tokens[offset])} at token offset {offset} is "
                f"outside the vocabulary of {vocab_size}: the file was written with another "
                "tokenizer, or model.vocab_size is too small."
            )


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise DataError(f"{path} has {len(data)} bytes, less than its header.")
    magic, version, code, count, documents = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != 1:
        raise DataError(f"{path} is not an index of version 1 (magic {magic!r}, {version}).")
    if code not in _DTYPES:
        raise DataError(f"{path}: dtype code {code}; integers are {sorted(_DTYPES)}.")
    expected = _HEADER.size + 12 * count + 8 * documents
    if len(data) != expected or documents == 0:
        raise DataError(
            f"{path} has {len(data)} bytes, its header asks for {expected}: truncated; prepare "
            "the data again."
        )
    offset = _HEADER.size
    lengths = np.frombuffer(data, np.int32, count, offset)
    pointers = np.frombuffer(data, np.int64, count, offset + 4 * count)
    boundaries = np.frombuffer(data, np.int64, documents, offset + 12 * count)
    if (lengths < 0).any():
        raise DataError(f"{path}: document {int(np.argmax(lengths < 0))} has a negative length.")
    return np.dtype(_DTYPES[code]), lengths, pointers, boundaries
