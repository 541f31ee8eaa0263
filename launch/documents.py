"""The documents of text, .jsonl, .json and .parquet files, which may be compressed or large.

`read_chunks` divides the files into chunks of about a megabyte, which is quick: a chunk of text
files is their names, one of .jsonl a number of lines as bytes. `Chunk.documents` does the rest,
in another process where there are several. Memory is bounded by chunks and the longest document.
"""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launch.compressed import Damaged, is_compressed, plain_suffix, read_blocks
from launch.exit_codes import DataError
from launch.files import is_file, is_folder, parse_json

_CHUNK = 1 << 20
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_BOM = "\ufeff"
# An object per line: names that others have for .jsonl.
LINES = (".jsonl", ".jsonlines", ".ndjson")
# A .json file with a list is held in memory.
_LIST_LIMIT = 1 << 30


class Chunk(Protocol):
    """Consecutive documents of the input."""

    @property
    def size(self) -> int:
        """Bytes of the files that were read for it."""

    def documents(self, skipped: list[str]) -> Iterator[tuple[str, str]]:
        """Name and text of each document that is not empty. Names of those that are not UTF-8 are
        added to `skipped`.

        Raises:
            DataError: a file or row cannot be read; the message names it.
        """


@dataclass(frozen=True)
class TextFiles:
    """Text files, each of which is a document."""

    files: list[tuple[str, Path]]
    size: int

    def documents(self, skipped: list[str]) -> Iterator[tuple[str, str]]:
        for name, path in self.files:
            try:
                text = b"".join(block for block, _ in read_blocks(path)).decode("utf-8")
            except UnicodeDecodeError:
                skipped.append(name)
                continue
            except Damaged as error:
                raise DataError(f"input {path} cannot be read: {error}.") from None
            # As Python reads text.
            text = text.removeprefix(_BOM).replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield name, text


@dataclass(frozen=True)
class JsonLines:
    """Lines of a .jsonl file; line `first_row` is the first, counted from 1."""

    name: str
    path: Path
    field: str
    first_row: int
    lines: bytes
    size: int

    def documents(self, skipped: list[str]) -> Iterator[tuple[str, str]]:
        for row, line in enumerate(self.lines.split(b"\n"), self.first_row):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                skipped.append(f"{self.name}:{row}")
                continue
            text = text.removeprefix(_BOM) if row == 1 else text
            if text.strip() and (document := self._document(text, row)):
                yield f"{self.name}:{row}", document

    def _document(self, line: str, row: int) -> str:
        try:
            # Python writes NaN in other fields.
            content = parse_json(line, allow_nan=True)
        except ValueError:
            content = None
        return _text_of(content, self.field, f"{self.path}, line {row}")


@dataclass(frozen=True)
class ListItems:
    """The text of items of a .json file that holds a list; item `first_row` is the first."""

    name: str
    first_row: int
    texts: list[str]
    size: int

    def documents(self, skipped: list[str]) -> Iterator[tuple[str, str]]:
        for row, text in enumerate(self.texts, self.first_row):
            if text:
                yield f"{self.name}:{row}", text


def _text_of(content: Any, field: str, where: str) -> str:
    document = content.get(field) if isinstance(content, dict) else None
    if not isinstance(document, str):
        raise DataError(
            f'{where}: not a JSON object with a string "{field}" (--text-field names another '
            "field)."
        )
    try:
        document.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f'{where}: "{field}" holds half of a surrogate pair (\\ud800 to \\udfff alone), which '
            "is not a character: repair or remove it."
        ) from None
    return document


@dataclass(frozen=True)
class Rows:
    """The text column of rows of a .parquet file, as bytes; None: a null."""

    name: str
    path: Path
    field: str
    first_row: int
    texts: list[bytes | None]
    size: int

    def documents(self, skipped: list[str]) -> Iterator[tuple[str, str]]:
        for row, text in enumerate(self.texts, self.first_row):
            if text is None:
                raise DataError(f'{self.path}, row {row}: "{self.field}" is null, not text.')
            try:
                document = text.decode("utf-8")
            except UnicodeDecodeError:
                skipped.append(f"{self.name}:{row}")
                continue
            if document:
                yield f"{self.name}:{row}", document


def read_chunks(files: Iterable[tuple[str, Path]], field: str = "text") -> Iterator[Chunk]:
    """The documents of all files, in order.

    Args:
        files: name and path of each.
        field: of .jsonl and .parquet files, that holds the text.

    Raises:
        DataError: a file is missing or damaged, or has no such field.
    """
    waiting: list[tuple[str, Path]] = []
    size = 0
    for name, path in files:
        if not has_rows(path):
            waiting.append((name, path))
            size += file_size(path)
            if size < _CHUNK:
                continue
        if waiting:
            yield TextFiles(waiting, size)
            waiting, size = [], 0
        if plain_suffix(path) in LINES:
            yield from _read_lines(name, path, field)
        elif plain_suffix(path) == ".json":
            yield from _read_json(name, path, field)
        elif has_rows(path):
            yield from _read_rows(name, path, field)
    if waiting:
        yield TextFiles(waiting, size)


def _read_lines(name: str, path: Path, field: str) -> Iterator[JsonLines]:
    """Chunks of whole lines. Lines end at newlines only, not where str.splitlines ends them: a JSON
    string may contain these characters."""
    row, before, done, held = 1, 0, 0, 0
    # Joined once per chunk: a line may be as long as the file.
    parts: list[bytes] = []
    try:
        for block, done in read_blocks(path):
            parts.append(block)
            held += len(block)
            end = block.rfind(b"\n") + 1
            if held >= _CHUNK and end:
                parts[-1] = block[:end]
                lines = b"".join(parts)
                yield JsonLines(name, path, field, row, lines[:-1], done - before)
                row, before = row + lines.count(b"\n"), done
                parts, held = [block[end:]], len(block) - end
    except Damaged as error:
        complete = row - 1 + sum(part.count(b"\n") for part in parts)
        raise DataError(f"{path}, after line {complete}: {error}.") from None
    if any(parts):
        yield JsonLines(name, path, field, row, b"".join(parts), done - before)


def _read_json(name: str, path: Path, field: str) -> Iterator[JsonLines | ListItems]:
    """A .json file holds a list of objects, or, as .jsonl, one per line."""
    start = b""
    try:
        for block, _ in read_blocks(path):
            start += block
            if start.removeprefix(_BOM.encode()).strip():
                break
        start = start.removeprefix(_BOM.encode()).lstrip()
        if start[:1] == b"[":
            yield from _read_list(name, path, field)
            return
    except Damaged as error:
        raise DataError(f"input {path} cannot be read: {error}.") from None
    try:
        line = start.partition(b"\n")[0]
        is_line = not start or isinstance(parse_json(line, allow_nan=True), dict)
    except ValueError:
        is_line = len(start) >= _CHUNK and b"\n" not in start
    if not is_line:
        raise DataError(
            f"{path} holds neither a list of objects nor one object per line: convert it to .jsonl,"
            " or name it .txt to train on its text as it is."
        )
    yield from _read_lines(name, path, field)


def _read_list(name: str, path: Path, field: str) -> Iterator[ListItems]:
    content = bytearray()
    for block, _ in read_blocks(path):
        content += block
        if len(content) > _LIST_LIMIT:
            raise DataError(
                f"{path} holds a list of more than {_LIST_LIMIT:,} bytes, which would have to be "
                "in memory: convert it to .jsonl, one object per line."
            )
    try:
        items = parse_json(content.decode("utf-8-sig"), allow_nan=True)
    except ValueError as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}.") from None
    row, held = 1, 0
    texts: list[str] = []
    for number, item in enumerate(items, 1):
        texts.append(_text_of(item, field, f"{path}, item {number}"))
        held += len(texts[-1])
        if held >= _CHUNK or number == len(items):
            size = file_size(path) * len(texts) // len(items)
            yield ListItems(name, row, texts, size)
            row, held, texts = number + 1, 0, []


def _read_rows(name: str, path: Path, field: str) -> Iterator[Rows]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path} needs the package pyarrow: pip install -e '.[parquet]' (or pip install "
            "pyarrow)."
        ) from None
    if is_compressed(path):
        raise DataError(
            f"{path} is compressed as a whole: decompress it, a .parquet file has its "
            "own compression."
        )
    size, row = file_size(path), 1
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            if columns.names.count(field) != 1:
                raise DataError(
                    f"{path} has no column {field!r}: it has {', '.join(columns.names)}; name one "
                    "with --text-field."
                )
            kind = columns.field(field).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if str(kind) not in ("string", "large_string", "string_view"):
                raise DataError(
                    f"{path}: column {field!r} is {kind}, not text; name another one with "
                    "--text-field."
                )
            total = file.metadata.num_rows
            for batch in file.iter_batches(_rows_per_chunk(file, field), columns=[field]):
                # As bytes: one that is not UTF-8 must not stop the others.
                texts = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                yield Rows(name, path, field, row, texts.to_pylist(), size * len(texts) // total)
                row += len(texts)
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path}, after row {row - 1}: damaged or not parquet ({why}).") from None


def _rows_per_chunk(file, field: str) -> int:
    """Rows with a megabyte of text, by the averages of the row groups."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    sizes = [each.total_uncompressed_size for each in columns if each.path_in_schema == field]
    average = sum(sizes) / max(1, file.metadata.num_rows)
    return int(min(4096, max(1, _CHUNK // max(1, average))))


def has_rows(path: Path) -> bool:
    """Whether a file may hold several documents."""
    return plain_suffix(path) in (*LINES, ".json", ".parquet")


def file_size(path: Path) -> int:
    """Bytes of a file. Raises DataError if it is missing."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"input {path} cannot be read: {error.strerror}.") from None


def standard_library() -> list[tuple[str, Path]]:
    """Name and path of the standard library's sources, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _library_files(root)
    if not files:
        raise DataError(f"{root} holds no .py files: pass --input with text of your own.")
    return [(path.relative_to(root).as_posix(), path) for path in files]


def find_files(inputs: list[Path]) -> list[tuple[str, Path]]:
    """Name and path of each file of the inputs, which are files and folders.

    Raises:
        DataError: an input is neither, or a folder holds something else than files and folders.
    """
    files: list[tuple[str, Path]] = []
    for path in inputs:
        if is_folder(path):
            inside = _all_files(path)
            files += [(f"{path.name}/{each.relative_to(path).as_posix()}", each) for each in inside]
        elif is_file(path):
            files.append((path.name, path))
        else:
            raise DataError(f"input {str(path)!r} is neither a file nor a folder.")
    for _, path in files:
        # A link that leads nowhere is left to the reader, which says so.
        if os.path.exists(path) and not is_file(path):
            raise DataError(f"input {path} is not a regular file: remove it from the folder.")
        if plain_suffix(path) == ".tar":
            raise DataError(f"input {path} is an archive: unpack it into a folder.")
    return _unique(files)


def _unique(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Number files of the same name, because the name decides a document's split."""
    seen: dict[str, int] = {}
    unique = []
    for name, path in files:
        seen[name] = seen.get(name, 0) + 1
        unique.append((name if seen[name] == 1 else f"{name}#{seen[name]}", path))
    return unique


def _library_files(root: Path) -> list[Path]:
    """The sources below the standard library's folder, without its tests."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _all_files(root: Path) -> list[Path]:
    """All files below a folder, those of linked folders too; a folder that is reached several times
    is read once, under its own name if it has one below the root.

    Raises:
        DataError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"input {error.filename} cannot be read: {error.strerror}.") from None

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    starts = [root]
    while starts:
        links: list[Path] = []
        for start in starts:
            for folder, folders, names in os.walk(start, onerror=fail):
                status = os.stat(folder)
                identity = status.st_dev, status.st_ino
                if identity in seen:
                    folders.clear()
                    continue
                seen.add(identity)
                inside = [Path(folder, name) for name in folders]
                links += [path for path in inside if path.is_symlink()]
                found += [Path(folder, name) for name in names]
        starts = sorted(links)
    return sorted(found)
