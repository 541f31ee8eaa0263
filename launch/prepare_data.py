"""Turn text into tokens on disk: `python launch/prepare_data.py --output data --input texts/`.

Without --input, the text is the sources of the Python standard library, which every machine that
can run this has. Each file (of a .jsonl, the "text" of each line) is a document, followed by an
end-of-document token. A hash of the document's name decides whether it is held out for validation.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from launch.config import STANDARD_LIBRARY_FOLDER
from launch.data import DataFolder
from launch.exit_codes import DataError, UserError
from launch.indexed_dataset import IndexedWriter, token_dtype
from launch.progress import progress
from launch.tokenizer import ByteTokenizer, Tokenizer, train_bpe

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(kw_only=True)
class Arguments:
    """Turn text into tokens on disk."""

    output: Path = Path(STANDARD_LIBRARY_FOLDER)
    """Folder to create; it must not exist."""
    input: tuple[Path, ...] = ()
    """Text files, .jsonl files with a "text" field, or folders of them. None: the standard library
    of this Python."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    vocab_size: int = 8192
    """Size of the BPE, which is trained on the training documents."""
    val_fraction: float = 0.05
    """Fraction of the documents held out for validation."""


def prepare(
    output: Path,
    inputs: list[Path] | None = None,
    *,
    tokenizer: str = "byte",
    vocab_size: int = 8192,
    val_fraction: float = 0.05,
) -> DataFolder:
    """Write `output`/{train,val}.{bin,idx} and meta.json; nothing is left if it fails.

    Raises:
        DataError: `output` exists or cannot be written, an input is missing or cannot be read, or
            there is no text for one of the splits.
    """
    # True for a dangling link too: nothing could be renamed onto it.
    if os.path.lexists(output):
        raise DataError(f"{output} exists already: choose another output folder or remove it.")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}: it must lie between 0 and 1.")
    files = standard_library() if not inputs else _find(inputs)
    skipped: list[str] = []
    names = [name for name, _ in read_documents(progress(files, "reading files"), skipped)]
    if not names:
        raise DataError("the input holds no text: no file of it is UTF-8 and not empty.")
    threshold = _threshold(names, val_fraction)
    if tokenizer == "byte":
        coder: Tokenizer = ByteTokenizer()
    else:
        documents = progress(read_documents(files), "training the tokenizer", total=len(names))
        coder = train_bpe(
            (text for name, text in documents if _hash(name) >= threshold), vocab_size
        )
    staging = output.parent / f".{output.name}-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        documents = progress(read_documents(files), "writing tokens", total=len(names))
        about = _write(staging, documents, threshold, coder, val_fraction)
        meta: dict[str, Any] = {
            "format": 1,
            "tokenizer": coder.spec(),
            "vocab_size": coder.vocab_size,
            "eod_id": coder.eod_id,
            "pad_id": coder.pad_id,
            "skipped": skipped,
            **about,
        }
        (staging / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        os.rename(staging, output)
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error}.") from None
    finally:
        # Does nothing after the rename.
        shutil.rmtree(staging, ignore_errors=True)
    return DataFolder(output)


def standard_library() -> list[tuple[str, Path]]:
    """Name and path of the standard library's sources, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, (".py",))
    if not files:
        raise DataError(f"{root} holds no .py files: pass --input with text of your own.")
    return [(path.relative_to(root).as_posix(), path) for path in files]


def read_documents(
    files: Iterable[tuple[str, Path]], skipped: list[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Name and text of each document; names of files that are not UTF-8 are added to `skipped`."""
    for name, path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            if skipped is not None:
                skipped.append(name)
            continue
        except OSError as error:
            raise DataError(f"input {path} cannot be read: {error.strerror}.") from None
        if path.suffix != ".jsonl":
            if text:
                yield name, text
            continue
        # Not splitlines(): it also splits at characters that a JSON string may contain.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise DataError(f'{path}, line {number}: not a JSON object with a string "text".')
            try:
                document.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(
                    f'{path}, line {number}: "text" holds half of a surrogate pair (\\ud800 to '
                    "\\udfff alone), which is not a character: repair or remove it."
                ) from None
            if document:
                yield f"{name}:{number}", document


def _find(inputs: list[Path]) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    for path in inputs:
        if path.is_dir():
            inside = _walk(path, None)
            files += [(f"{path.name}/{each.relative_to(path).as_posix()}", each) for each in inside]
        elif path.is_file():
            files.append((path.name, path))
        else:
            raise DataError(f"input {path} is neither a file nor a folder.")
    return _unique(files)


def _unique(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Number files of the same name, because the name decides a document's split."""
    seen: dict[str, int] = {}
    unique = []
    for name, path in files:
        seen[name] = seen.get(name, 0) + 1
        unique.append((name if seen[name] == 1 else f"{name}#{seen[name]}", path))
    return unique


def _walk(root: Path, suffixes: tuple[str, ...] | None) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        # Folders given by the user are read in full; the library is read without its tests.
        if suffixes is not None:
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [
            Path(folder, name) for name in names if suffixes is None or name.endswith(suffixes)
        ]
    return sorted(found)


def _threshold(names: list[str], val_fraction: float) -> float:
    """Documents whose hash is below this are held out: val_fraction of them, but at least one."""
    hashes = sorted(map(_hash, names))
    if len(hashes) == 1:
        return 0.0
    held_out = sum(each < val_fraction for each in hashes)
    if 0 < held_out < len(hashes):
        return val_fraction
    return hashes[1] if held_out == 0 else hashes[-1]


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    # File names may not be UTF-8.
    encoded = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(encoded).digest()[:7], "big") / 2**56


def _write(
    folder: Path,
    documents: Iterator[tuple[str, str]],
    threshold: float,
    coder: Tokenizer,
    val_fraction: float,
) -> dict[str, dict[str, int]]:
    """Write both splits document by document; return their entries of meta.json."""
    dtype = token_dtype(coder.vocab_size)
    writers = {split: IndexedWriter(folder / split, dtype) for split in ("train", "val")}
    about = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in writers}

    def add(split: str, text: str) -> None:
        ids = coder.encode(text)
        writers[split].add(np.append(ids, coder.eod_id))
        about[split]["documents"] += 1
        about[split]["tokens"] += len(ids) + 1
        about[split]["bytes"] += len(text.encode("utf-8"))

    for name, text in documents:
        if threshold > 0:
            add("val" if _hash(name) < threshold else "train", text)
        else:
            # A single document: its end is held out.
            cut = max(1, round(len(text) * (1 - val_fraction)))
            add("train", text[:cut])
            add("val", text[cut:])
    for split, writer in writers.items():
        if not about[split]["bytes"]:
            raise DataError(f"{split} would hold no text: give more documents, or longer ones.")
        writer.close()
    return about


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="launch/prepare_data.py")
    if arguments == Arguments() and arguments.output.exists():
        print(f"{arguments.output} exists already")
        return 0
    try:
        folder = prepare(
            arguments.output,
            list(arguments.input),
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
            val_fraction=arguments.val_fraction,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for split in ("train", "val"):
        print(f"{folder.folder / split}.bin: {describe(folder, split)}")
    if folder.meta["skipped"]:
        print(f"skipped, not UTF-8: {', '.join(folder.meta['skipped'])}")
    return 0


def describe(folder: DataFolder, split: str) -> str:
    """The size of a split in words."""
    about = folder.meta[split]
    return f"{about['tokens']:,} tokens, {about['documents']:,} documents, {about['bytes']:,} bytes"


if __name__ == "__main__":
    raise SystemExit(main())
