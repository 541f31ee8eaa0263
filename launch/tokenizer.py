"""Text to tokens and back: bytes, or a BPE trained on the data. Nothing is downloaded.

A tokenizer is described by a `spec`, plain JSON that is stored in the data's meta.json and in every
checkpoint, so that neither depends on another file.
"""

import json
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from launch.exit_codes import DataError

_END_OF_DOCUMENT = "<|end_of_document|>"
_PADDING = "<|padding|>"


class Tokenizer(Protocol):
    """What the launcher needs of a tokenizer.

    Attributes:
        vocab_size: number of tokens, including special ones.
        eod_id: ends every document.
        pad_id: padding, ignored as a label.
    """

    vocab_size: int
    eod_id: int
    pad_id: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, [n] int64, without special tokens."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; special tokens are dropped, invalid UTF-8 becomes U+FFFD."""

    def spec(self) -> dict[str, Any]:
        """JSON from which `tokenizer_from_spec` builds an equal tokenizer."""


class ByteTokenizer:
    """One token per byte of UTF-8; 256 ends a document, 257 is padding."""

    vocab_size = 258
    eod_id = 256
    pad_id = 257

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BPETokenizer:
    """Byte-level BPE, exact on any UTF-8 text."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        # Text that looks like a special token is encoded as text.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.eod_id = tokenizer.token_to_id(_END_OF_DOCUMENT)
        self.pad_id = tokenizer.token_to_id(_PADDING)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def spec(self) -> dict[str, Any]:
        return {"kind": "bpe", "tokenizer": json.loads(self._tokenizer.to_str())}


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
    kind = spec.get("kind") if isinstance(spec, dict) else spec
    if kind == "byte":
        return ByteTokenizer()
    if kind != "bpe":
        raise DataError(f"tokenizer kind {kind!r}: known are 'byte' and 'bpe'.")
    try:
        tokenizer = _Tokenizer.from_str(json.dumps(spec.get("tokenizer")))
    # The library raises nothing more specific.
    except Exception as error:
        raise DataError(f"the BPE tokenizer's description is damaged: {error}.") from None
    for special in (_END_OF_DOCUMENT, _PADDING):
        if tokenizer.token_to_id(special) is None:
            raise DataError(f"the BPE tokenizer has no token {special}: train it with this code.")
    return BPETokenizer(tokenizer)
