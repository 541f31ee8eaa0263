"""A tokenizer from a `tokenizer.json` of the tokenizers package, and which of its special tokens
ends a document and which one pads."""

from pathlib import Path
from typing import Any

from launch.data_digests import check_meta
from launch.exit_codes import DataError
from launch.files import is_file, is_folder, parse_json, read_json, read_text
from launch.tokenizer import (
    FileTokenizer,
    Tokenizer,
    library_tokenizer,
    list_tokens,
    special_tokens,
    tokenizer_from_spec,
)

# What these tokens are called in released tokenizers.
_EOD_NAMES = (
    "<|end_of_document|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
)
_PAD_NAMES = (
    "<|padding|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<｜▁pad▁｜>",
    "<|finetune_right_pad_id|>",
)


def read_tokenizer(
    path: Path, eod_token: str | None = None, pad_token: str | None = None
) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of the folder that holds one, or of prepared data.

    Args:
        eod_token: ends documents. None: the eos_token of a tokenizer_config.json beside the file,
            else the special token with a name that is known for it.
        pad_token: pads. None: found likewise; there may be none.

    Raises:
        DataError: the file is missing or damaged, has no such special tokens, or it is not clear
            which one ends documents.
    """
    if is_file(path / "meta.json"):
        return _prepared(path / "meta.json", eod_token, pad_token)
    file = path / "tokenizer.json" if is_folder(path) else path
    try:
        text = read_text(file)
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read ({error.strerror}): give byte, bpe, a "
            "tokenizer.json, or a folder of prepared data."
        ) from None
    except UnicodeDecodeError:
        text = ""
    try:
        tokenizer = library_tokenizer(text)
    except DataError as error:
        raise DataError(
            f"{file} is not a tokenizer.json of the tokenizers package: {error}"
        ) from None
    special = special_tokens(tokenizer)
    beside = _config(file.parent / "tokenizer_config.json")
    if eod_token is None:
        eod_token = beside.get("eos_token") or _known(special, _EOD_NAMES)
    if eod_token is None or eod_token not in special:
        raise DataError(_explain(file, eod_token, "ends a document", "--eod-token", special))
    if pad_token is None:
        pad_token = beside.get("pad_token")
        # Many use the end of a document to pad. Here that would hide it as a label.
        if pad_token not in special or pad_token == eod_token:
            pad_token = _known([token for token in special if token != eod_token], _PAD_NAMES)
    elif pad_token not in special:
        raise DataError(_explain(file, pad_token, "pads", "--pad-token", special))
    try:
        return FileTokenizer(parse_json(text), eod_token, pad_token)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except ValueError as error:
        raise DataError(f"{file} is not JSON that this code reads: {error}.") from None


def _prepared(path: Path, eod_token: str | None, pad_token: str | None) -> Tokenizer:
    if eod_token is not None or pad_token is not None:
        raise DataError(
            f"{path} says already which tokens end documents and pad: leave out --eod-token and "
            "--pad-token."
        )
    try:
        meta = read_json(path)
        check_meta(meta)
        return tokenizer_from_spec(meta["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is damaged ({why}): prepare that data again.") from None


def _config(path: Path) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names; nothing if there is no such file."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): repair or remove it.") from None
    found = {}
    for name in ("eos_token", "pad_token"):
        value: Any = content.get(name) if isinstance(content, dict) else None
        # Older files have the token's flags too.
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _known(special: list[str], names: tuple[str, ...]) -> str | None:
    """The one special token with a known name; None if there are several, or none."""
    known = [token for token in special if token in names]
    return known[0] if len(known) == 1 else None


def _explain(file: Path, token: str | None, does: str, flag: str, special: list[str]) -> str:
    listed = f"its special tokens are {list_tokens(special)}"
    if not special:
        return (
            f"{file} has no special token, and one has to end documents: add one with the "
            "tokenizers package (add_special_tokens) and save the file again."
        )
    if token is None:
        return f"{file} does not say which token {does}: {listed}; name one with {flag}."
    return f"{file} has no special token {token!r}, which {does}: {listed}; name one with {flag}."
