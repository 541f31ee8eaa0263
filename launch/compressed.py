"""Files block by block, decompressed if they are .gz or .zst."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from launch.exit_codes import DataError
from launch.files import open_regular

_BLOCK = 1 << 20


class Damaged(Exception):  # noqa: N818 (the caller says where, and raises a DataError)
    """A file cannot be read on; the message says why."""


def is_compressed(path: Path) -> bool:
    """By its name. Archives are not: what is inside is files."""
    return _suffix(path) in (".gz", ".zst") and _suffix(Path(path.stem)) != ".tar"


def plain_suffix(path: Path) -> str:
    """The suffix without that of the compression, in lower case: .jsonl of TEXT.JSONL.gz."""
    return _suffix(Path(path.stem) if is_compressed(path) else path)


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Blocks of content, none empty, and how many bytes of the file are read with each.

    Raises:
        Damaged: the file cannot be opened or read, or its compressed data is damaged or ends early.
        DataError: it is .zst, and the package to read it is not installed.
    """
    try:
        with open_regular(path) as file:
            if not is_compressed(path):
                blocks = iter(lambda: file.read(_BLOCK), b"")
            elif _suffix(path) == ".gz":
                blocks = _gzip_blocks(file)
            else:
                blocks = _zstandard_blocks(file, path)
            for block in blocks:
                if block:
                    yield block, file.tell()
    except EOFError:
        raise Damaged("the compressed data ends early, the file is truncated") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(f"the compressed data is damaged ({error})") from None
    except OSError as error:
        raise Damaged(str(error.strerror or error)) from None


def _gzip_blocks(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as content:
        # As much as there is, so that all that precedes damage is seen.
        while block := content.read1(_BLOCK):
            yield block


def _zstandard_blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{path} needs the package zstandard: pip install -e '.[zstd]' (or pip install "
            "zstandard)."
        ) from None
    # The package's own file reader takes a truncated file for a complete one, and one with several
    # frames for its first. Windows of 2 GiB are what `zstd --long=31` writes.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while block := file.read(_BLOCK >> 4):
        while block:
            frame = decompressor.decompressobj() if frame is None else frame
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise Damaged(f"the compressed data is damaged ({error})") from None
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError
