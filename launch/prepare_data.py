"""Turn text into tokens on disk: `python launch/prepare_data.py --output data --input texts/`.

Without --input, the text is the sources of the Python standard library, which every machine that
can run this has. Each text file, line of a .jsonl file and row of a .parquet file is a document,
followed by an end-of-document token. A hash of the document's name decides whether it is held out
for validation. The output does not depend on the number of workers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.command_line import parse
from launch.config import STANDARD_LIBRARY_FOLDER, check_path
from launch.data_digests import seal_meta
from launch.documents import file_size, find_files, has_rows, read_chunks, standard_library
from launch.encode import Encoder, HeldOut, hash_of, split_document
from launch.exit_codes import DataError, UserError
from launch.files import remove_leftovers, staging_folder
from launch.indexed_dataset import IndexedWriter, token_dtype
from launch.progress import progress
from launch.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from launch.tokenizer_file import read_tokenizer
from launch.workers import available_cores, map_in_order

if TYPE_CHECKING:
    from launch.data import DataFolder

# With less text for each, starting more workers takes longer than what they save.
_BYTES_PER_WORKER = 16 << 20
# Of the names that are printed.
_MOST_SKIPPED = 20


@dataclass(kw_only=True)
class Arguments:
    """Turn text into tokens on disk."""

    output: Path = Path(STANDARD_LIBRARY_FOLDER)
    """Folder to create; it must not exist."""
    input: tuple[Path, ...] = ()
    """Text files, .jsonl, .json and .parquet files with a field of text, or folders of them. All
    but .parquet may be compressed (.gz, .zst). None: the standard library of this Python."""
    text_field: str = "text"
    """The field of .jsonl and column of .parquet files that holds the text."""
    tokenizer: str = "byte"
    """byte; bpe; a tokenizer.json of the tokenizers package, or a folder with one; or a folder of
    prepared data, for the same tokenizer."""
    vocab_size: int = 8192
    """Size of the bpe, which is trained on the training documents."""
    eod_token: str | None = None
    """Special token of a tokenizer.json that ends documents. None: found by tokenizer_config.json
    or by its name."""
    pad_token: str | None = None
    """Likewise for padding, which a tokenizer need not have."""
    val_fraction: float = 0.05
    """Fraction of the documents held out for validation."""
    workers: int | None = None
    """Processes that tokenize. None: one per core, for enough text."""


def prepare(
    output: Path,
    inputs: list[Path] | None = None,
    *,
    tokenizer: str = "byte",
    vocab_size: int = 8192,
    val_fraction: float = 0.05,
    text_field: str = "text",
    eod_token: str | None = None,
    pad_token: str | None = None,
    workers: int = 1,
) -> DataFolder:
    """Write `output`/{train,val}.{bin,idx} and meta.json; nothing is left if it fails.

    Arguments are those of the command line. With several workers, the calling script needs the
    usual `if __name__ == "__main__":`.

    Raises:
        DataError: `output` exists or cannot be written, an input is missing or cannot be read,
            there is no text for one of the splits, or the tokenizer cannot be used.
    """
    # True for a dangling link too: nothing could be renamed onto it.
    if os.path.lexists(output):
        raise DataError(f"{output} exists already: choose another output folder or remove it.")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}: it must lie between 0 and 1.")
    if workers < 1:
        raise DataError(f"workers is {workers}: it must be at least 1.")
    if tokenizer in ("byte", "bpe") and (eod_token, pad_token) != (None, None):
        raise DataError(
            f"eod_token and pad_token are for a tokenizer.json: tokenizer {tokenizer} has its own."
        )
    work = _Preparation(
        files=standard_library() if not inputs else find_files(inputs),
        text_field=text_field,
        val_fraction=val_fraction,
        workers=workers,
    )
    if tokenizer == "byte":
        coder: Tokenizer = ByteTokenizer()
    elif tokenizer == "bpe":
        coder = work.train_bpe(vocab_size)
    else:
        coder = read_tokenizer(Path(tokenizer), eod_token, pad_token)
    return write_data_folder(output, coder, lambda staging: work.write(staging, coder))


def write_data_folder(
    output: Path, coder: Tokenizer, write: Callable[[Path], dict[str, Any]]
) -> DataFolder:
    """Make a data folder that appears at once; nothing is left if it fails.

    Args:
        coder: the tokenizer of its tokens.
        write: write(folder) makes the folder and the files of tokens in it, and returns what
            meta.json has of them.

    Raises:
        DataError: `output` cannot be written, and what `write` raises.
    """
    staging = staging_folder(output)
    remove_leftovers(output)
    try:
        about = write(staging)
        meta: dict[str, Any] = {
            "format": 2,
            "tokenizer": coder.spec(),
            "vocab_size": coder.vocab_size,
            "eod_id": coder.eod_id,
            "pad_id": coder.pad_id,
            **about,
        }
        (staging / "meta.json").write_text(json.dumps(seal_meta(meta)), encoding="utf-8")
        os.rename(staging, output)
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error}.") from None
    finally:
        # Does nothing after the rename.
        shutil.rmtree(staging, ignore_errors=True)
    # Imported here: worker processes import this module too, and torch takes seconds.
    from launch.data import DataFolder

    return DataFolder(output)


@dataclass
class _Preparation:
    """The passes over the input.

    The threshold of hashes that are held out is val_fraction, unless all hashes lie on one side of
    it, as those of a handful of documents may. No pass is spent on finding out. The first one takes
    what the names of text files give, or val_fraction; one that has seen the names of all documents
    and finds another threshold starts again.
    """

    files: list[tuple[str, Path]]
    text_field: str
    val_fraction: float
    workers: int
    threshold: float = 0.0

    def __post_init__(self) -> None:
        self.threshold = self.val_fraction
        if self.files and not any(has_rows(path) for _, path in self.files):
            seen = HeldOut(self.val_fraction)
            seen.see([hash_of(name) for name, _ in self.files])
            self.threshold = seen.threshold
        self._num_bytes = sum(file_size(path) for _, path in self.files)

    def train_bpe(self, vocab_size: int) -> Tokenizer:
        """A BPE of the training documents."""
        while True:
            seen = HeldOut(self.val_fraction)
            coder = train_bpe(self._training_texts(seen), vocab_size)
            if self._is_right(seen):
                return coder

    def _training_texts(self, seen: HeldOut):
        chunks = read_chunks(self.files, self.text_field)
        for chunk in self._progress(chunks, "training the tokenizer"):
            for name, text in chunk.documents([]):
                hashed = hash_of(name)
                seen.see([hashed])
                if self.threshold == 0:
                    yield split_document(text, self.val_fraction)[0]
                elif hashed >= self.threshold:
                    yield text

    def write(self, folder: Path, coder: Tokenizer) -> dict[str, Any]:
        """Write both splits into a new folder; return what meta.json says about them."""
        while True:
            seen = HeldOut(self.val_fraction)
            folder.mkdir(parents=True)
            about = self._write(folder, coder, seen)
            if self._is_right(seen):
                break
            shutil.rmtree(folder)
        for split in ("train", "val"):
            if not about[split]["bytes"]:
                raise DataError(f"{split} would hold no text: give more documents, or longer ones.")
        return about

    def _write(self, folder: Path, coder: Tokenizer, seen: HeldOut) -> dict[str, Any]:
        dtype = token_dtype(coder.vocab_size)
        writers = {split: IndexedWriter(folder / split, dtype) for split in ("train", "val")}
        skipped: list[str] = []
        about: dict[str, Any] = {split: dict(documents=0, tokens=0, bytes=0) for split in writers}
        arguments = (coder.spec(), self.threshold, self.val_fraction)
        workers = min(self.workers, 1 + self._num_bytes // _BYTES_PER_WORKER)
        chunks = read_chunks(self.files, self.text_field)
        encoded = map_in_order(Encoder, arguments, chunks, workers)
        for chunk in self._progress(encoded, "writing tokens"):
            seen.see(chunk.hashes)
            skipped += chunk.skipped
            for split, part in chunk.splits.items():
                writers[split].add_all(part.tokens, part.lengths)
                about[split]["documents"] += len(part.lengths)
                about[split]["tokens"] += len(part.tokens)
                about[split]["bytes"] += part.num_bytes
        files = {
            name: digests.to_json()
            for writer in writers.values()
            for name, digests in writer.close().items()
        }
        return {"skipped": skipped, **about, "files": files}

    def _is_right(self, seen: HeldOut) -> bool:
        """Whether the pass that has `seen` all names had the right threshold; sets it."""
        if not seen.count:
            raise DataError("the input holds no text: no file of it is UTF-8 and not empty.")
        used, self.threshold = self.threshold, seen.threshold
        return used == self.threshold

    def _progress(self, chunks, name: str):
        return progress(chunks, name, total=self._num_bytes, size=lambda chunk: chunk.size)


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    try:
        arguments = parse(Arguments, argv, "launch/prepare_data.py")
        if arguments == Arguments() and arguments.output.exists():
            print(f"{arguments.output} exists already")
            return 0
        for name in ("output", "tokenizer"):
            check_path(f"--{name}", getattr(arguments, name))
        folder = prepare(
            arguments.output,
            list(arguments.input),
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
            val_fraction=arguments.val_fraction,
            text_field=arguments.text_field,
            eod_token=arguments.eod_token,
            pad_token=arguments.pad_token,
            workers=available_cores() if arguments.workers is None else arguments.workers,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for split in ("train", "val"):
        print(f"{folder.folder / split}.bin: {describe(folder, split)}")
    if skipped := folder.meta["skipped"]:
        names = ", ".join(skipped[:_MOST_SKIPPED])
        # The name itself may not be UTF-8.
        names = names.encode("utf-8", "backslashreplace").decode("utf-8")
        more = len(skipped) - _MOST_SKIPPED
        rest = f" and {more:,} more (all are in meta.json)" if more > 0 else ""
        print(f"skipped, not UTF-8: {names}{rest}")
    return 0


def describe(folder: DataFolder, split: str) -> str:
    """The size of a split in words."""
    about = folder.meta[split]
    return f"{about['tokens']:,} tokens, {about['documents']:,} documents, {about['bytes']:,} bytes"


if __name__ == "__main__":
    raise SystemExit(main())
