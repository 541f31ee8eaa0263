"""Digests of data files, and the identity of a run's data.

Prepared data has them in its meta.json:

    "files": {"train.bin": {"bytes": 9000000, "block": 4194304, "sha256": [one per block]}, ...}
    "digest": sha256 of all else in meta.json

A block is checked when it is first read, so what has changed on the disk is found before a step
uses it, however large the file is.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.exit_codes import DataError
from launch.tokenizer import Tokenizer

# The first read of a token reads and hashes its block: some milliseconds for a block of this size.
# A file of a terabyte has 250,000 of them, 17 MB of meta.json.
BLOCK = 1 << 22
_SHA256_DIGITS = 64


@dataclass(frozen=True)
class FileDigests:
    """What a file should hold.

    Attributes:
        size: bytes.
        block: bytes of each block but the last.
        sha256: of each block, in hexadecimal digits.
    """

    size: int
    block: int
    sha256: tuple[str, ...]

    @classmethod
    def from_json(cls, value: Any) -> "FileDigests":
        """Raises ValueError for anything but what `to_json` returns."""
        if not isinstance(value, dict):
            raise ValueError(f"digests are {value!r}")
        size, block, sha256 = (value.get(name) for name in ("bytes", "block", "sha256"))
        numbers = type(size) is int and type(block) is int and size >= 0 and block > 0
        if not numbers or not isinstance(sha256, list) or len(sha256) != -(-size // block):
            raise ValueError("digests do not cover their file")
        if not all(isinstance(each, str) and len(each) == _SHA256_DIGITS for each in sha256):
            raise ValueError("digests are not those of sha256")
        return cls(size, block, tuple(sha256))

    def to_json(self) -> dict[str, Any]:
        """As in meta.json."""
        return {"bytes": self.size, "block": self.block, "sha256": list(self.sha256)}

    @property
    def digest(self) -> str:
        """One for all of the file."""
        return digest_of(self.to_json())[:32]

    def matches(self, number: int, content: bytes) -> bool:
        """Whether `content` is block `number`."""
        return hashlib.sha256(content).hexdigest() == self.sha256[number]


class BlockHasher:
    """The digests of a file whose bytes come in any portions."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._size = 0
        self._done: list[str] = []

    def update(self, data: Any) -> None:
        """Add the next bytes: anything with a contiguous buffer."""
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        while view:
            part = view[: BLOCK - self._size % BLOCK]
            self._hash.update(part)
            self._size += len(part)
            view = view[len(part) :]
            if not self._size % BLOCK:
                self._done.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()

    def digests(self) -> FileDigests:
        """Of all bytes so far."""
        last = [self._hash.hexdigest()] if self._size % BLOCK else []
        return FileDigests(self._size, BLOCK, (*self._done, *last))


def digest_of(value: Any) -> str:
    """sha256, in hexadecimal digits, of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of meta.json with its own digest."""
    return {**meta, "digest": digest_of(meta)}


def check_meta(meta: Any) -> dict[str, FileDigests]:
    """The digests of the files by name; none in a meta.json of format 1, which has no digest.

    Raises:
        ValueError: it is not what was written.
    """
    if not isinstance(meta, dict):
        raise ValueError("it is not a JSON object")
    version = meta.get("format", 1)
    if type(version) is not int or version not in (1, 2):
        raise ValueError(f"its format is {version!r}, this code reads 1 and 2")
    if version == 1 and "digest" not in meta:
        return {}
    rest = {key: value for key, value in meta.items() if key != "digest"}
    if meta.get("digest") != digest_of(rest):
        raise ValueError("its content does not match its digest")
    files = meta.get("files")
    if not isinstance(files, dict):
        raise ValueError("it has no digests of files")
    return {name: FileDigests.from_json(value) for name, value in files.items()}


def data_identity(tokenizer: Tokenizer | None, train: Any, val: Any) -> dict[str, Any]:
    """What the data of a run is, as JSON, wherever it lies: equal if and only if tokenizer, tokens
    and document boundaries are.

    Args:
        train, val: sources of launch/data.py; `val` may be None.

    Returns:
        "tokenizer": of `describe_tokenizer`. "train", "val": the `content` of the source, or None.
    """
    return {
        "tokenizer": describe_tokenizer(tokenizer),
        "train": train.content,
        "val": None if val is None else val.content,
    }


def describe_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """Kind, size and digest of a tokenizer, as JSON."""
    if tokenizer is None:
        return None
    spec = tokenizer.spec()
    content: Any = spec["kind"]
    if "tokenizer" in spec:
        # What it would add around a text is left out wherever text is encoded.
        content = {**spec["tokenizer"], "post_processor": None}
    return {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "pad_id": tokenizer.pad_id,
        "digest": digest_of(content)[:32],
    }


def damaged(path: Any, what: str) -> DataError:
    """The error of a data file that is not what was written."""
    return DataError(
        f"{path} {what}: it is not what was prepared; copy it again, or prepare the data again."
    )
