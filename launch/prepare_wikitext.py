"""Turn Wikitext-103 into tokens on disk, with its own splits.

    python launch/prepare_wikitext.py --input wikitext-103-raw --output data/wikitext103

The folder holds the raw files as their authors distribute them, wiki.{train,valid,test}.raw or
.tokens; no package registry has them. An article is a document. Besides train and val, the output
has the split "test" (launch/evaluate.py --split test), and the number of words of each split, for
the perplexity per word: words are what spaces separate, and the end of a line counts as one, as is
usual for Wikitext. Any text in these files and this form will do.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.command_line import parse
from launch.config import check_path
from launch.encode import encode
from launch.exit_codes import DataError, UserError
from launch.indexed_dataset import IndexedWriter, token_dtype
from launch.prepare_data import write_data_folder
from launch.progress import progress
from launch.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from launch.tokenizer_file import read_tokenizer

if TYPE_CHECKING:
    from launch.data import DataFolder

# Split -> its name in the files.
_SPLITS = {"train": "train", "val": "valid", "test": "test"}
_SUFFIXES = ("raw", "tokens")
# The heading of an article; those of its sections have more signs.
_TITLE = re.compile(r" = [^=].*[^=] = \n?")
# Articles that are encoded at a time.
_GROUP = 64


@dataclass(kw_only=True)
class Arguments:
    """Turn Wikitext-103 into tokens on disk."""

    input: Path
    """Folder with wiki.train.raw, wiki.valid.raw and wiki.test.raw (or .tokens)."""
    output: Path
    """Folder to create; it must not exist."""
    tokenizer: str = "bpe"
    """bpe, trained on the training split; byte; or a tokenizer.json, such as GPT-2's, or its
    folder."""
    vocab_size: int = 50264
    """Size of the bpe; the papers' GPT-2 vocabulary has as many."""
    eod_token: str | None = None
    """Special token of a tokenizer.json that ends documents. None: found by its name."""


def prepare_wikitext(
    folder: Path,
    output: Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 50264,
    eod_token: str | None = None,
) -> DataFolder:
    """Write `output`/{train,val,test}.{bin,idx} and meta.json; nothing is left if it fails.

    Arguments are those of the command line.

    Raises:
        DataError: files are missing, empty or not UTF-8, `output` exists or cannot be written, or
            the tokenizer cannot be used.
    """
    if os.path.lexists(output):
        raise DataError(f"{output} exists already: choose another output folder or remove it.")
    files = find_splits(folder)
    if tokenizer == "byte":
        coder: Tokenizer = ByteTokenizer()
    elif tokenizer == "bpe":
        articles = _with_progress(files["train"], "training the tokenizer")
        coder = train_bpe((text for _, text in articles), vocab_size)
    else:
        coder = read_tokenizer(Path(tokenizer), eod_token)

    def write(staging: Path) -> dict[str, Any]:
        staging.mkdir(parents=True)
        about: dict[str, Any] = {"skipped": [], "files": {}}
        for split, path in files.items():
            about[split], digests = _write(staging / split, path, coder)
            about["files"] |= digests
        return about

    return write_data_folder(output, coder, write)


def find_splits(folder: Path) -> dict[str, Path]:
    """Split -> its file. Raises DataError, which says what to put where, if one is missing."""
    found = {}
    for split, name in _SPLITS.items():
        paths = [folder / f"wiki.{name}.{suffix}" for suffix in _SUFFIXES]
        existing = [path for path in paths if path.is_file()]
        if not existing:
            raise DataError(
                f"{folder} has no wiki.{name}.raw (or .tokens): put the three files of the raw "
                "Wikitext-103 there, wiki.train.raw, wiki.valid.raw and wiki.test.raw, unpacked "
                "from their authors' wikitext-103-raw-v1.zip."
            )
        found[split] = existing[0]
    return found


def read_articles(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each article. Raises DataError for a file that is not UTF-8 or empty."""
    lines: list[str] = []
    count = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                if _TITLE.fullmatch(line) and any(map(str.strip, lines)):
                    yield f"{path.name}:{count}", "".join(lines)
                    lines, count = [], count + 1
                lines.append(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): unpack it again.") from None
    if not any(map(str.strip, lines)):
        raise DataError(f"{path} holds no text: unpack it again.")
    yield f"{path.name}:{count}", "".join(lines)


def _with_progress(path: Path, name: str) -> Iterator[tuple[str, str]]:
    def size(article: tuple[str, str]) -> int:
        return len(article[1].encode())

    return progress(read_articles(path), name, total=path.stat().st_size, size=size)


def count_words(text: str) -> int:
    """Words between spaces, and one for the end of each line."""
    return len(text.split()) + text.count("\n")


def _write(
    prefix: Path, path: Path, coder: Tokenizer
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Write a split; return what meta.json says of it, and the digests of its files."""
    writer = IndexedWriter(prefix, token_dtype(coder.vocab_size))
    about = dict(documents=0, tokens=0, bytes=0, words=0)
    group: list[tuple[str, str]] = []

    def write() -> None:
        part = encode(coder, group)
        writer.add_all(part.tokens, part.lengths)
        about["documents"] += len(part.lengths)
        about["tokens"] += len(part.tokens)
        about["bytes"] += part.num_bytes
        about["words"] += sum(count_words(text) for _, text in group)
        group.clear()

    for article in _with_progress(path, f"writing {path.name}"):
        group.append(article)
        if len(group) == _GROUP:
            write()
    if group:
        write()
    return about, {name: digests.to_json() for name, digests in writer.close().items()}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    try:
        arguments = parse(Arguments, argv, "launch/prepare_wikitext.py")
        for name in ("input", "output", "tokenizer"):
            check_path(f"--{name}", getattr(arguments, name))
        folder = prepare_wikitext(
            arguments.input,
            arguments.output,
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
            eod_token=arguments.eod_token,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for split in _SPLITS:
        about = folder.meta[split]
        print(
            f"{folder.folder / split}.bin: {about['tokens']:,} tokens, {about['words']:,} words, "
            f"{about['documents']:,} articles"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
