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

import os
import struct
import weakref
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from launch.data_digests import BlockHasher, FileDigests, damaged
from launch.exit_codes import DataError
from launch.files import is_file, open_regular

# Tokens. Of larger files without digests, only the index tells one from another.
HASH_AT_OPEN = 1 << 28

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
        self._hasher = BlockHasher()
        # Four bytes for each, where a list has 36: there may be hundreds of millions.
        self._lengths = array("i")

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, [n] integers that fit the dtype."""
        self.add_all(tokens, [len(tokens)])

    def add_all(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents of these lengths, whose tokens follow each other."""
        assert tokens.ndim == 1 and sum(lengths) == len(tokens)
        data = np.ascontiguousarray(tokens, self._dtype).data
        self._bin.write(data)
        self._hasher.update(data)
        self._lengths.extend(lengths)

    def close(self) -> dict[str, FileDigests]:
        """Flush the tokens and write the index; return the digests of both files by name."""
        self._bin.close()
        lengths = np.array(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        count = len(lengths)
        path, hasher = self._prefix.with_suffix(".idx"), BlockHasher()
        with path.open("xb") as index:
            for part in (
                _HEADER.pack(_MAGIC, 1, _CODES[self._dtype], count, count + 1),
                lengths.tobytes(),
                pointers.tobytes(),
                np.arange(count + 1, dtype=np.int64).tobytes(),
            ):
                index.write(part)
                hasher.update(part)
        return {Path(self._bin.name).name: self._hasher.digests(), path.name: hasher.digests()}


class IndexedTokens:
    """The tokens of a pair of files, with a checked index.

    Tokens are read when they are asked for, not mapped into memory: a file that another process
    truncates is an error with its name, where a map would end the process.

    Args:
        digests: by the name of the file; those of a missing one, if it is not too large, are
            computed here.

    Attributes:
        document_starts: token offset of each document, [documents] int64.
        content: what tells these tokens from others, as JSON: digests of index and tokens. That of
            the tokens is None where it is not known.

    Raises:
        DataError: a missing, empty or truncated file, an index that does not describe the tokens,
            or a file that is not that of its digests; the message names the file.
    """

    def __init__(self, prefix: Path, digests: Mapping[str, FileDigests] | None = None) -> None:
        self.path = prefix.with_suffix(".bin")
        index_path = prefix.with_suffix(".idx")
        for path in (self.path, index_path):
            if not is_file(path):
                raise DataError(f"{path} is missing: write it with launch/prepare_data.py.")
        digests = digests or {}
        index, index_digests = _read_checked(index_path, digests.get(index_path.name))
        self.dtype, lengths, pointers, documents = _read_index(index_path, index)
        self._file = self._open()
        size, itemsize = os.fstat(self._file).st_size, self.dtype.itemsize
        expected = int(lengths.sum(dtype=np.int64)) * itemsize
        if size == 0 or expected == 0:
            raise DataError(f"{self.path} holds no tokens.")
        if size != expected:
            raise DataError(
                f"{self.path} has {size} bytes but {index_path.name} describes {expected}: one of "
                "the two is truncated or from another run; prepare the data again."
            )
        ends = np.cumsum(lengths, dtype=np.int64) * itemsize
        if not np.array_equal(pointers, ends - lengths.astype(np.int64) * itemsize):
            raise DataError(f"{index_path}: the documents are not contiguous in .bin.")
        if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
            raise DataError(f"{index_path}: the document boundaries are not in order.")
        self._length = size // itemsize
        starts = pointers // itemsize
        self.document_starts = starts[documents[:-1][documents[:-1] < len(starts)]]
        self._digests = digests.get(self.path.name)
        if self._digests is None and len(self) <= HASH_AT_OPEN:
            self._digests = self._hash()
        if self._digests is not None and self._digests.size != size:
            raise damaged(self.path, f"has {size} bytes and had {self._digests.size}")
        # Blocks that were checked.
        self._checked = bytearray(len(self._digests.sha256) if self._digests else 0)
        self.content = {
            "index": index_digests.digest,
            "tokens": None if self._digests is None else self._digests.digest,
        }

    def _open(self) -> int:
        try:
            file = open_regular(self.path)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from None
        weakref.finalize(self, file.close)
        return file.fileno()

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, [n] of `dtype`, read into memory."""
        return self.read(0, len(self))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), of `dtype`; read-only.

        Raises:
            DataError: the file was truncated or has changed, or the disk failed.
        """
        first, last = start * self.dtype.itemsize, stop * self.dtype.itemsize
        self._check(first, last)
        return np.frombuffer(self._read_bytes(first, last), self.dtype)

    def _check(self, first: int, last: int) -> None:
        """Check the blocks of bytes [first, last) that have not been checked."""
        if self._digests is None:
            return
        block, size = self._digests.block, self._digests.size
        for number in range(first // block, -(-last // block)):
            if self._checked[number]:
                continue
            content = self._read_bytes(number * block, min((number + 1) * block, size))
            if not self._digests.matches(number, content):
                raise damaged(
                    self.path,
                    f"has changed between bytes {number * block} and "
                    f"{min((number + 1) * block, size)}",
                )
            self._checked[number] = 1

    def _read_bytes(self, first: int, last: int) -> bytes:
        parts, begin = [], first
        while begin < last:
            try:
                part = os.pread(self._file, last - begin, begin)
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error.strerror}.") from None
            if not part:
                raise damaged(
                    self.path,
                    f"ends at byte {os.fstat(self._file).st_size}, and did not when it was opened",
                )
            parts.append(part)
            begin += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _hash(self) -> FileDigests:
        hasher, size = BlockHasher(), len(self) * self.dtype.itemsize
        for first in range(0, size, 1 << 22):
            hasher.update(self._read_bytes(first, min(first + (1 << 22), size)))
        return hasher.digests()

    def check_vocabulary(self, vocab_size: int, start: int = 0, stop: int | None = None) -> None:
        """Raise DataError, with file and token offset, where a token is not in 0..vocab_size-1."""
        # In slices, because comparing the whole file at once needs memory.
        stop = len(self) if stop is None else stop
        for first in range(start, stop, 1 << 22):
            part = self.read(first, min(first + (1 << 22), stop))
            if part.min() >= 0 and part.max() < vocab_size:
                continue
            offset = int(np.argmax((part < 0) | (part >= vocab_size)))
            raise DataError(
                f"{self.path}: token {int(part[offset])} at token offset {first + offset} is "
                f"outside the vocabulary of {vocab_size}: the file was written with another "
                "tokenizer, or model.vocab_size is too small."
            )

    def check_all(self) -> None:
        """Check all blocks now. Raises DataError."""
        if self._digests is not None:
            self._check(0, self._digests.size)


def _read_checked(path: Path, expected: FileDigests | None) -> tuple[bytes, FileDigests]:
    """The content of a file and its digests, which are those that are expected."""
    try:
        with open_regular(path) as file:
            data = file.readall()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    hasher = BlockHasher()
    hasher.update(data)
    found = hasher.digests()
    # By their own blocks: those of another version may be larger.
    same = expected is None or (
        expected.size == len(data)
        and all(
            expected.matches(number, data[number * expected.block : (number + 1) * expected.block])
            for number in range(len(expected.sha256))
        )
    )
    if not same:
        raise damaged(path, "does not match its digest")
    return data, found


def _read_index(path: Path, data: bytes) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
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
