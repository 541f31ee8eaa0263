"""Turn text into tokens on disk: `python launch/prepare_data.py --output data --input texts/`.

Without --input, the text is the sources of the Python standard library, which is on every machine
that can run this. Each file (each line of a .jsonl, its "text") is a document, ended by an
end-of-document token. A hash of the document's name decides whether it is trained on or held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from launch.config import STANDARD_LIBRARY_FOLDER
from launch.data import DataFolder
from launch.errors import DataError, UserError
from launch.indexed import IndexedWriter, token_dtype
from launch.tokenizer import ByteTokenizer, Tokenizer, train_bpe

__all__ = ["prepare", "read_documents", "standard_library"]

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(kw_only=True)
class Arguments:
    """Turn text into tokens on disk."""

    output: Path = Path(STANDARD_LIBRARY_FOLDER)
    """Folder to make; it must not exist."""
    input: tuple[Path, ...] = ()
    """Text files, .jsonl files with a "text" field, or folders of them. None: the standard library
    of this Python."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    vocab_size: int = 8192
    """Of the BPE, which is trained on the training documents."""
    val_fraction: float = 0.05
    """Part of the documents held out for validation."""


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
    # A link that points nowhere is there, too: nothing could be renamed onto it.
    if os.path.lexists(output):
        raise DataError(f"{output} exists already: choose another output folder or remove it.")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}: it must lie between 0 and 1.")
    files = standard_library() if not inputs else _find(inputs)
    skipped: list[str] = []
    names = [name for name, _ in read_documents(files, skipped)]
    if not names:
        raise DataError("the input holds no text: no file of it is UTF-8 and not empty.")
    border = _border(names, val_fraction)
    if tokenizer == "byte":
        coder: Tokenizer = ByteTokenizer()
    else:
        coder = train_bpe(
            (text for name, text in read_documents(files) if _hash(name) >= border), vocab_size
        )
    staging = output.parent / f".{output.name}-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        about = _write(staging, read_documents(files), border, coder, val_fraction)
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
        # Gone already where all went well.
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
    files: list[tuple[str, Path]], skipped: list[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Name and text of each document; the names of files that are not UTF-8 go to `skipped`."""
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
        # Not splitlines(): it also splits at characters that may stand in a JSON string.
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
                    "\\udfff alone), which is no character: mend or remove it."
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
    """Number the files whose name was there before: a name decides where a document goes."""
    seen: dict[str, int] = {}
    unique = []
    for name, path in files:
        seen[name] = seen.get(name, 0) + 1
        unique.append((name if seen[name] == 1 else f"{name}#{seen[name]}", path))
    return unique


def _walk(root: Path, suffixes: tuple[str, ...] | None) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        # The folders a user names are taken whole; the library comes without its tests.
        if suffixes is not None:
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [
            Path(folder, name) for name in names if suffixes is None or name.endswith(suffixes)
        ]
    return sorted(found)


def _border(names: list[str], val_fraction: float) -> float:
    """Documents that hash below this are held out: val_fraction of them, but at least one."""
    hashes = sorted(map(_hash, names))
    if len(hashes) == 1:
        return 0.0
    held_out = sum(each < val_fraction for each in hashes)
    if 0 < held_out < len(hashes):
        return val_fraction
    return hashes[1] if held_out == 0 else hashes[-1]


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    # A file's name need not be UTF-8.
    encoded = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(encoded).digest()[:7], "big") / 2**56


def _write(
    folder: Path,
    documents: Iterator[tuple[str, str]],
    border: float,
    coder: Tokenizer,
    val_fraction: float,
) -> dict[str, dict[str, int]]:
    """Write both splits document by document; what meta.json says about them."""
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
        if border > 0:
            add("val" if _hash(name) < border else "train", text)
        else:
            # One document alone: its end is held out.
            cut = max(1, round(len(text) * (1 - val_fraction)))
            add("train", text[:cut])
            add("val", text[cut:])
    for split, writer in writers.items():
        if not about[split]["bytes"]:
            raise DataError(f"{split} would hold no text: give more documents, or longer ones.")
        writer.close()
    return about


def main(argv: list[str] | None = None) -> int:
    """Prepare data as the command line says; the exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="launch/prepare_data.py")
    if arguments == Arguments() and arguments.output.exists():
        print(f"{arguments.output} is there already")
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
    """One phrase about a split."""
    about = folder.meta[split]
    return f"{about['tokens']:,} tokens, {about['documents']:,} documents, {about['bytes']:,} bytes"


if __name__ == "__main__":
    raise SystemExit(main())
