"""Tokenizers from a tokenizer.json: which tokens end documents and pad; text stays text."""

import json

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from launch import tokenizer as launch_tokenizer
from launch.data_digests import describe_tokenizer
from launch.exit_codes import DataError
from launch.hf_folder import _read_tokenizer
from launch.mixture import open_mixture
from launch.prepare_data import prepare
from launch.tokenizer import FileTokenizer, tokenizer_from_spec
from launch.tokenizer_file import read_tokenizer

TEXTS = [
    "def f(x):\n\n\treturn  x\n",
    "naïve 世界 😀\nnext。\n世界",
    " leading <|endoftext|> </s> <pad> it's",
    "a\0b 12345 \r\n",
]


def byte_level(*special, split=None):
    """A byte-level BPE, as of GPT-2, or with another pattern as of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text * 3 for text in TEXTS], trainer)
    return tokenizer


def sentence_piece():
    """As of Llama 2 and T5: a normalizer, spaces as letters, tokens around every text."""
    characters = sorted(set("".join(TEXTS)) | {"▁"})
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocab += [(each, -5.0) for each in characters] + [("▁def", -4.0), ("return", -4.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", None, [("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    return tokenizer


def words():
    """One token per word, with a gap in the ids, and a special token that is added."""
    tokenizer = Tokenizer(models.WordLevel({"def": 0, "return": 9}, unk_token="def"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


KINDS = {
    "byte_level": lambda: byte_level("<|endoftext|>", "<|padding|>"),
    "sentence_piece": sentence_piece,
    "words": words,
}


def save(folder, tokenizer, **config):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("kind", "eod", "pad"),
    [
        ("byte_level", "<|endoftext|>", "<|padding|>"),
        ("sentence_piece", "</s>", "<pad>"),
        ("words", "<eos>", None),
    ],
)
def test_any_tokenizer_gives_the_tokens_of_the_text_alone(tmp_path, kind, eod, pad):
    tokenizer = read_tokenizer(save(tmp_path, KINDS[kind]()))
    assert (tokenizer.eod_token, tokenizer.pad_token) == (eod, pad)
    plain = KINDS[kind]()
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    for text in TEXTS:
        tokens = tokenizer.encode(text).tolist()
        # This model would make special tokens of text: it has them itself.
        if kind != "sentence_piece" or "</s>" not in text:
            assert tokens == plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.eod_id not in tokens and tokenizer.pad_id not in tokens
        batch = tokenizer.encode_batch([text, text], np.dtype(np.uint16))
        assert [each.tolist() for each in batch] == [tokens] * 2
        if kind != "words":
            # Metaspace itself loses a space at the start.
            assert tokenizer.decode([*tokens, tokenizer.eod_id]).lstrip() == text.lstrip()
    assert max(tokenizer.eod_id, *plain.get_vocab().values()) + 1 == tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_makes_an_equal_tokenizer(tmp_path, kind):
    tokenizer = read_tokenizer(save(tmp_path, KINDS[kind]()))
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec())))
    assert again.spec() == tokenizer.spec()
    for name in ("vocab_size", "eod_id", "pad_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in TEXTS:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    ("special", "config", "flags", "eod", "pad"),
    [
        (["<|end_of_text|>"], {}, {}, "<|end_of_text|>", None),
        (["<x>", "</s>", "[PAD]"], {}, {}, "</s>", "[PAD]"),
        # What a name suggests gives way to the file beside, and that to a flag.
        (["<x>", "</s>"], {"eos_token": "<x>"}, {}, "<x>", None),
        (["<x>", "</s>"], {"eos_token": {"content": "<x>"}}, {}, "<x>", None),
        (["<x>", "</s>"], {"eos_token": "<x>"}, {"eod_token": "</s>"}, "</s>", None),
        (["<x>", "</s>", "<pad>"], {"pad_token": "<x>"}, {}, "</s>", "<x>"),
        (["</s>", "<pad>"], {}, {"eod_token": "<pad>", "pad_token": "</s>"}, "<pad>", "</s>"),
        # Padding is no label: an end of document must not be padding too.
        (["<|endoftext|>"], {"pad_token": "<|endoftext|>"}, {}, "<|endoftext|>", None),
        (["</s>", "<pad>"], {"pad_token": "</s>"}, {}, "</s>", "<pad>"),
        (["</s>"], {"eos_token": None, "pad_token": "<gone>"}, {}, "</s>", None),
    ],
)
def test_which_tokens_end_documents_and_pad(tmp_path, special, config, flags, eod, pad):
    path = save(tmp_path, byte_level(*special), **config)
    for given in (path, tmp_path):
        tokenizer = read_tokenizer(given, **flags)
        assert (tokenizer.eod_token, tokenizer.pad_token) == (eod, pad)


@pytest.mark.parametrize(
    ("special", "config", "flags", "sentence"),
    [
        (
            ["<a>", "<b>"],
            {},
            {},
            "which token ends a document: .* <a>, <b>; name .* --eod-token",
        ),
        (["<eos>", "</s>"], {}, {}, "does not say which token ends a document: .* <eos>, </s>"),
        (["<eos>"], {}, {"eod_token": "<end>"}, "no special token '<end>', which ends .* <eos>;"),
        # A letter is a token, but text has it too.
        (["<eos>"], {}, {"eod_token": "a"}, "no special token 'a', which ends a document"),
        (["<eos>"], {"eos_token": "<end>"}, {}, "no special token '<end>', which ends a document"),
        (["<eos>"], {}, {"pad_token": "<p>"}, "no special token '<p>', which pads.*--pad-token"),
        (["<eos>"], {}, {"pad_token": "<eos>"}, "'<eos>' ends documents and pads"),
        ([], {}, {}, "has no special token, and one has to end documents: add one"),
        ([f"<{n}>" for n in range(99)], {}, {}, "<18>, <19> and 79 more"),
    ],
)
def test_tokens_that_are_not_clear_are_asked_for(tmp_path, special, config, flags, sentence):
    path = save(tmp_path, byte_level(*special), **config)
    with pytest.raises(DataError, match=sentence) as caught:
        read_tokenizer(path, **flags)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a tokenizer.json of the tokenizers package"),
        (b"\xff\xfe", "not a tokenizer.json"),
        (b"{}", "not a tokenizer.json"),
        (b"[1, 2]", "not a tokenizer.json"),
        (b'{"version": "1.0", "model": {"type": "New"}}', "not a tokenizer.json"),
        (None, "tokenizer.json cannot be read"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        read_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_and_a_damaged_config_are_named(tmp_path):
    path = save(tmp_path, byte_level("</s>"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json is damaged"):
        read_tokenizer(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="is not a tokenizer.json"):
        read_tokenizer(path)


def test_a_damaged_spec_is_refused():
    spec = FileTokenizer(json.loads(byte_level("</s>").to_str()), "</s>").spec()
    for change in ({"tokenizer": None}, {"tokenizer": {}}, {"eod_token": None}, {"eod_token": "a"}):
        with pytest.raises(DataError):
            tokenizer_from_spec(spec | change)


def test_what_the_tokenizer_cannot_encode_names_the_document(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"fine": 0}, unk_token="none"))
    tokenizer.add_special_tokens(["</s>"])
    path = save(tmp_path, tokenizer)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": "odd"}\n')
    with pytest.raises(DataError, match="document a.jsonl:3: the tokenizer cannot encode"):
        prepare(tmp_path / "out", [tmp_path / "a.jsonl"], tokenizer=str(path))


def test_dropout_of_training_is_off(tmp_path):
    tokenizer = byte_level("</s>")
    tokenizer.model.dropout = 0.5
    read = read_tokenizer(save(tmp_path, tokenizer))
    assert len({tuple(read.encode(TEXTS[0] * 9).tolist()) for _ in range(5)}) == 1


@pytest.mark.parametrize("split", [None, *launch_tokenizer._SPLIT_PATTERNS])
def test_long_texts_in_parts_give_the_same_tokens(monkeypatch, split):
    library = byte_level("</s>", split=split)
    library.encode_special_tokens = True
    tokenizer = FileTokenizer(json.loads(library.to_str()), "</s>")
    words = [*TEXTS, "\n\n ", "  a", "?!\n\n", "\n", " ", "12", "don't", "。\n", "\x1c", "\x85 b"]
    random = np.random.default_rng(0)
    text = "".join(random.choice(words, 4000))
    expected = library.encode(text).ids
    for length in (20, 300):
        monkeypatch.setattr(launch_tokenizer, "_PART", length)
        parts = list(launch_tokenizer._parts(text, length))
        assert len(parts) > len(text) / length / 4 and "".join(parts) == text
        assert tokenizer.encode(text).tolist() == expected


@pytest.mark.parametrize("change", ["normalizer", "prefix", "added token", "pattern", "model"])
def test_texts_are_not_cut_where_that_may_change_tokens(change):
    library = byte_level("</s>", split="[a-z ]+" if change == "pattern" else None)
    if change == "normalizer":
        library.normalizer = normalizers.Strip()
    elif change == "prefix":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "added token":
        library.add_tokens([AddedToken("a b")])
    elif change == "model":
        library = sentence_piece()
    assert not FileTokenizer(json.loads(library.to_str()), "</s>")._can_cut


def test_a_prepared_folder_lends_its_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("one " * 50)
    (tmp_path / "b.txt").write_text("two " * 50)
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    first = prepare(tmp_path / "first", inputs, tokenizer="bpe", vocab_size=300)
    again = prepare(tmp_path / "again", inputs[::-1] * 2, tokenizer=str(first.folder))
    assert again.meta["tokenizer"] == first.meta["tokenizer"]
    with pytest.raises(DataError, match="says already which tokens end documents"):
        prepare(tmp_path / "x", inputs, tokenizer=str(first.folder), eod_token="</s>")
    (first.folder / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="meta.json is damaged .*prepare that data again"):
        prepare(tmp_path / "x", inputs, tokenizer=str(first.folder))


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        {"eos_token": "<|endoftext|>", "pad_token": "no such token"},
    ],
)
def test_prepared_and_imported_tokenizers_are_the_same(tmp_path, config):
    """Data and weights from the same published folder fit each other."""
    tokenizer = byte_level("<|endoftext|>", "<|pad|>")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    prepared = read_tokenizer(tmp_path)
    imported = tokenizer_from_spec(_read_tokenizer(tmp_path, 1000))
    assert describe_tokenizer(imported) == describe_tokenizer(prepared)
    assert tokenizer.id_to_token(imported.pad_id) == "<|pad|>"
    # One of them has a post-processor, which is of no effect here.
    (tmp_path / "text.txt").write_text("".join(TEXTS) * 50)
    folders = []
    for name, coder in (("a", prepared), ("b", imported)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(coder.spec()["tokenizer"]))
        folders.append(tmp_path / f"data_{name}")
        prepare(folders[-1], inputs=[tmp_path / "text.txt"], tokenizer=str(folder))
    mixture = open_mixture([(folder, 1) for folder in folders])
    assert describe_tokenizer(mixture.tokenizer) == describe_tokenizer(prepared)
