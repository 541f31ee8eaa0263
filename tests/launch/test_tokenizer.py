"""Text to tokens and back, exactly."""

import pytest

from launch.exit_codes import DataError
from launch.tokenizer import ByteTokenizer, tokenizer_from_spec, train_bpe

TEXTS = ["def f(x):\n\treturn x\n", "na\u00efve \u4e16\u754c \U0001f600", " leading", "a\0b", ""]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([text * 5 for text in TEXTS], 280)


@pytest.mark.parametrize("text", [*TEXTS, "<|end_of_document|> is text"])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_round_trip(kind, text, bpe):
    tokenizer = ByteTokenizer() if kind == "byte" else bpe
    tokens = tokenizer.encode(text).tolist()
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.eod_id not in tokens and tokenizer.pad_id not in tokens
    assert tokenizer.eod_id != tokenizer.pad_id


@pytest.mark.parametrize("text", TEXTS)
def test_a_spec_makes_an_equal_tokenizer(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        again = tokenizer_from_spec(tokenizer.spec())
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert (again.vocab_size, again.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)


def test_bytes_that_are_not_text_are_replaced():
    assert ByteTokenizer().decode([0x61, 0xE9, 256, 300]) == "a\ufffd"


def test_unknown_kinds_and_small_vocabularies_are_refused():
    with pytest.raises(DataError, match="'word'"):
        tokenizer_from_spec({"kind": "word"})
    with pytest.raises(DataError, match="at least 258"):
        train_bpe(["a"], 100)
