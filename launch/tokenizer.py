"""Text to tokens and back: bytes, a BPE trained on the data, or a tokenizer.json of any origin.
Nothing is downloaded.

A tokenizer is described by a `spec`, plain JSON that is stored in the data's meta.json and in every
checkpoint, so that neither depends on another file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from launch.exit_codes import DataError

_END_OF_DOCUMENT = "<|end_of_document|>"
_PADDING = "<|padding|>"
# Longer texts are encoded in parts where that gives the same tokens: the library needs about 120
# bytes per byte of text.
_PART = 1 << 18
# A single space or newline between two other characters. The patterns below never match across the
# position after the first alternative, before its space, or after the newline of the second.
_CUT = re.compile(r"\S(?= \S)|\S\n(?=\S)")
_SPLIT_PATTERNS = (
    # GPT-2's, which pre_tokenizers.ByteLevel has built in, then those of GPT-4 and Llama 3, Qwen 2.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Tokenizer(Protocol):
    """What the launcher needs of a tokenizer.

    Attributes:
        vocab_size: number of tokens, including special ones.
        eod_id: ends every document.
        pad_id: padding, ignored as a label; None if there is none.
    """

    vocab_size: int
    eod_id: int
    pad_id: int | None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, [n] int64, without special tokens."""

    def encode_batch(self, texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
        """Token ids of each text, as `dtype`; the same as those of `encode`.

        Raises:
            DataError: the tokenizer has no token for a part of a text.
        """

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; special tokens are dropped, invalid UTF-8 becomes U+FFFD."""

    def spec(self) -> dict[str, Any]:
        """JSON from which `tokenizer_from_spec` builds an equal tokenizer."""


class ByteTokenizer:
    """One token per byte of UTF-8; 256 ends a document, 257 is padding."""

    vocab_size = 258
    eod_id = 256
    pad_id: int | None = 257

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(dtype) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        return {"kind": "byte"}


class _LibraryTokenizer:
    """A tokenizer of the `tokenizers` package."""

    pad_id: int | None

    def __init__(self, tokenizer: _Tokenizer, eod_token: str, pad_token: str | None) -> None:
        # Text that looks like a special token is encoded as text.
        tokenizer.encode_special_tokens = True
        # Every text gives all of its tokens, and always the same ones.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        description = json.loads(tokenizer.to_str())
        self._can_cut = _cuts_are_exact(description)
        self._as_text = _special_tokens_as_text(tokenizer, description["model"])
        # Ids may have gaps.
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        eod_id = tokenizer.token_to_id(eod_token)
        assert eod_id is not None
        self.eod_id = eod_id
        self.pad_id = None if pad_token is None else tokenizer.token_to_id(pad_token)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text], np.dtype(np.int64))[0]

    def encode_batch(self, texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
        if self._can_cut and max(map(len, texts), default=0) > 2 * _PART:
            return [self._encode_parts(text, dtype) for text in texts]
        return self._encode(texts, dtype)

    def _encode_parts(self, text: str, dtype: np.dtype) -> np.ndarray:
        return np.concatenate([self._encode([part], dtype)[0] for part in _parts(text, _PART)])

    def _encode(self, texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
        try:
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        # The library raises nothing more specific.
        except Exception as error:
            raise DataError(f"the tokenizer cannot encode this text: {error}.") from None
        return [self._without_special(np.array(each.ids, dtype)) for each in encoded]

    def _without_special(self, ids: np.ndarray) -> np.ndarray:
        """`ids` with special tokens that the model itself made of text as other tokens."""
        for token, others in self._as_text.items():
            places = np.flatnonzero(ids == token)
            if len(places):
                parts = np.split(ids, places)
                new = np.array(others, ids.dtype)
                ids = np.concatenate(
                    [parts[0], *(x for part in parts[1:] for x in (new, part[1:]))]
                )
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(list(tokens))


class BPETokenizer(_LibraryTokenizer):
    """Byte-level BPE, exact on any UTF-8 text."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        super().__init__(tokenizer, _END_OF_DOCUMENT, _PADDING)

    def spec(self) -> dict[str, Any]:
        return {"kind": "bpe", "tokenizer": json.loads(self._tokenizer.to_str())}


class FileTokenizer(_LibraryTokenizer):
    """What a tokenizer.json describes, whatever its model. `launch.tokenizer_file` reads one.

    Args:
        description: the content of the file.
        eod_token: a special token of it, which ends documents.
        pad_token: another one for padding, or None.

    Raises:
        DataError: the description is damaged, or has no such special tokens.
    """

    def __init__(
        self, description: dict[str, Any], eod_token: str, pad_token: str | None = None
    ) -> None:
        tokenizer = library_tokenizer(json.dumps(description))
        special = special_tokens(tokenizer)
        for role, token in (("ends documents", eod_token), ("pads", pad_token)):
            # Any other token could also come from text.
            if token not in special and not (token is None and role == "pads"):
                raise DataError(
                    f"token {token!r}, which {role}, is not a special token of the tokenizer: its "
                    f"special tokens are {list_tokens(special)}."
                )
        if eod_token == pad_token:
            raise DataError(
                f"token {eod_token!r} ends documents and pads: padding is ignored as a label, so "
                "ends of documents would never be learned; choose another one, or none, to pad."
            )
        super().__init__(tokenizer, eod_token, pad_token)
        self.eod_token, self.pad_token = eod_token, pad_token

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "file",
            "tokenizer": json.loads(self._tokenizer.to_str()),
            "eod_token": self.eod_token,
            "pad_token": self.pad_token,
        }


def library_tokenizer(text: str, name: str = "tokenizer") -> _Tokenizer:
    """The tokenizer of a tokenizer.json's text. Raises DataError, with `name`, if it is damaged."""
    try:
        return _Tokenizer.from_str(text)
    # The library raises nothing more specific.
    except Exception as error:
        raise DataError(f"the {name}'s description is damaged: {error}.") from None


def special_tokens(tokenizer: _Tokenizer) -> list[str]:
    """The special tokens, in the order of their ids."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return [token.content for _, token in added if token.special]


def list_tokens(tokens: list[str]) -> str:
    """For messages: the first of them, as there may be hundreds that are reserved."""
    if not tokens:
        return "none"
    more = f" and {len(tokens) - 20} more" if len(tokens) > 20 else ""
    return ", ".join(tokens[:20]) + more


def _special_tokens_as_text(tokenizer: _Tokenizer, model: dict[str, Any]) -> dict[int, list[int]]:
    """{special token that the model makes of the text that it looks like: ids of its characters}.

    `encode_special_tokens` does not prevent that where the model's own vocabulary has the token, as
    a Unigram has "</s>". A character without a token becomes the unknown one, if there is one.
    """
    vocabulary = model["vocab"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = vocabulary[model["unk_id"]][0]
    found: dict[int, list[int]] = {}
    for content in special_tokens(tokenizer):
        token = tokenizer.token_to_id(content)
        if content != unknown and token in _model_ids(tokenizer, content):
            found[token] = [id for character in content for id in _model_ids(tokenizer, character)]
    return found


def _model_ids(tokenizer: _Tokenizer, text: str) -> list[int]:
    try:
        return [each.id for each in tokenizer.model.tokenize(text)]
    # A model without an unknown token has none for this text.
    except Exception:
        return []


def _cuts_are_exact(description: dict[str, Any]) -> bool:
    """True if a text may be cut at `_CUT` without any change of its tokens."""
    if description["normalizer"] is not None:
        return False
    if any(not token["special"] for token in description["added_tokens"]):
        return False
    before = description["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    *splits, last = [(each.get("type"), each) for each in steps] or [("", {})]
    if last[0] != "ByteLevel" or last[1]["add_prefix_space"]:
        return False
    if not splits:
        return last[1]["use_regex"]
    [(kind, split), *others] = splits
    if others or kind != "Split" or last[1]["use_regex"]:
        return False
    is_known = split["pattern"].get("Regex") in _SPLIT_PATTERNS
    return is_known and split["behavior"] == "Isolated" and not split["invert"]


def _parts(text: str, length: int) -> Iterator[str]:
    """The text in parts of about `length` characters, cut at `_CUT`."""
    start = 0
    while len(text) - start > 2 * length:
        found = _CUT.search(text, start + length)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens, which must be at least 258."""
    if vocab_size < 258:
        raise DataError(f"vocab_size is {vocab_size}: a byte-level BPE needs at least 258.")
    tokenizer = _Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_DOCUMENT, _PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer)


def tokenizer_from_spec(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `spec` describes. Raises DataError for an unknown or damaged spec."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "byte":
        return ByteTokenizer()
    if kind == "file":
        if not {"tokenizer", "eod_token"} <= set(spec):
            raise DataError("the tokenizer's description has no tokenizer, or no eod_token.")
        return FileTokenizer(spec["tokenizer"], spec["eod_token"], spec.get("pad_token"))
    if kind != "bpe":
        raise DataError(f"tokenizer kind {kind!r}: known are 'byte', 'bpe' and 'file'.")
    tokenizer = library_tokenizer(json.dumps(spec.get("tokenizer")), "BPE tokenizer")
    for special in (_END_OF_DOCUMENT, _PADDING):
        if tokenizer.token_to_id(special) is None:
            raise DataError(f"the BPE tokenizer has no token {special}: train it with this code.")
    return BPETokenizer(tokenizer)
