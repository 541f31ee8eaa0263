"""Text to tokens: what is read, how it is split, and that nothing is left incomplete."""

import functools
import json
import os

import numpy as np
import pytest

from launch import prepare_data
from launch.data import DataFolder
from launch.documents import standard_library
from launch.encode import HeldOut, hash_of
from launch.exit_codes import DataError
from launch.indexed_dataset import IndexedTokens, IndexedWriter
from launch.prepare_data import prepare
from launch.workers import map_in_order


def documents(folder, split):
    """The texts of a split, by its end-of-document tokens."""
    tokenizer = DataFolder(folder).tokenizer
    tokens = IndexedTokens(folder / split).tokens.astype(np.int64)
    texts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eod_id) + 1)
    assert len(texts[-1]) == 0
    return [tokenizer.decode(text.tolist()) for text in texts[:-1]]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number in range(30):
        (folder / "deep" / f"{number}.txt").write_text(f"text {number} \u00e9\n", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    return folder


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_every_document_is_in_one_split_and_reads_back(texts, tmp_path, tokenizer):
    folder = prepare(
        tmp_path / "out", [texts], tokenizer=tokenizer, vocab_size=300, val_fraction=0.2
    )
    train, val = documents(folder.folder, "train"), documents(folder.folder, "val")
    assert sorted(train + val) == sorted(f"text {number} \u00e9\n" for number in range(30))
    assert 1 <= len(val) <= 15
    assert folder.meta["skipped"] == ["texts/latin.txt"]
    about = folder.meta["train"]
    assert about["documents"] == len(train)
    assert about["bytes"] == sum(len(text.encode()) for text in train)
    assert about["tokens"] == len(IndexedTokens(folder.folder / "train"))


def test_the_split_depends_on_names_alone(texts, tmp_path):
    before = prepare(tmp_path / "a", [texts], val_fraction=0.2)
    (texts / "another.txt").write_text("one more")
    after = prepare(tmp_path / "b", [texts], val_fraction=0.2)
    held_out = set(documents(before.folder, "val"))
    assert held_out <= set(documents(after.folder, "val")) <= held_out | {"one more"}


def test_jsonl_lines_are_documents(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {n}"}) + "\n\n" for n in range(9)))
    folder = prepare(tmp_path / "out", [path], val_fraction=0.3)
    everything = documents(folder.folder, "train") + documents(folder.folder, "val")
    assert sorted(everything) == [f"number {n}" for n in range(9)]


def test_lines_of_jsonl_end_at_newlines_only(tmp_path):
    texts = ["a\u2028b", "c\u2029d", "e\x85f", "g\x0ch"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "text.jsonl").write_bytes("\r\n".join(lines).encode())
    folder = prepare(tmp_path / "out", [tmp_path / "text.jsonl"], val_fraction=0.3).folder
    assert sorted(documents(folder, "train") + documents(folder, "val")) == texts


def test_files_of_one_name_are_documents_of_their_own(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "text.txt").write_text(f"text {number}")
    inputs = [tmp_path / "0" / "text.txt", tmp_path / "1" / "text.txt"]
    folder = prepare(tmp_path / "out", inputs).folder
    split = [documents(folder, "train"), documents(folder, "val")]
    assert sorted(split) == [["text 0"], ["text 1"]]


def test_one_document_alone_gives_its_end_to_validation(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    folder = prepare(tmp_path / "out", [tmp_path / "one.txt"], val_fraction=0.1)
    assert documents(folder.folder, "train") == ["0123456789" * 9]
    assert documents(folder.folder, "val") == ["0123456789"]


def test_the_standard_library_is_there_without_its_tests():
    files = standard_library()
    names, paths = [name for name, _ in files], [path for _, path in files]
    assert "json/decoder.py" in names
    assert not [name for name in names if "/test" in name or "site-packages" in name]
    assert paths == sorted(paths)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: [path / "none"], "neither a file nor a folder"),
        (lambda path: [path / "bad.jsonl"], r"bad.jsonl, line 2: not a JSON object"),
        (lambda path: [path / "empty.txt"], "holds no text"),
        (lambda path: [path / "one.txt"], "val would hold no text"),
        (lambda path: [path / "half.jsonl"], r"half.jsonl, line 2: .* half of a surrogate pair"),
        (lambda path: [path / "folder"], "folder/dangling.txt cannot be read: No such file"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, make, sentence):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("1")
    (tmp_path / "half.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dangling.txt").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=sentence):
        prepare(tmp_path / "out", make(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_failure_while_writing_leaves_nothing(texts, tmp_path, monkeypatch):
    def fail(self, tokens, lengths):
        raise OSError("disk full")

    monkeypatch.setattr(IndexedWriter, "add_all", fail)
    with pytest.raises(DataError, match="out cannot be written: disk full"):
        prepare(tmp_path / "out", [texts])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_an_existing_folder_is_not_touched(texts, tmp_path):
    prepare(tmp_path / "out", [texts])
    with pytest.raises(DataError, match="exists already"):
        prepare(tmp_path / "out", [texts])


def test_an_output_that_cannot_be_made_is_named(texts, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="link exists already"):
        prepare(tmp_path / "link", [texts])
    with pytest.raises(DataError, match="latin.txt/out cannot be written"):
        prepare(texts / "latin.txt" / "out", [texts])


def test_names_that_are_not_utf8_are_names(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / os.fsdecode(b"caf\xe9%d" % number)).write_text(f"{number}")
    folder = prepare(tmp_path / "out", [texts]).folder
    assert len(documents(folder, "train")) + len(documents(folder, "val")) == 4
    (texts / os.fsdecode(b"\xe9")).write_bytes(b"\xe9")
    assert prepare_data.main(["--output", str(tmp_path / "more"), "--input", str(texts)]) == 0
    assert "skipped, not UTF-8: texts/\\udce9" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_the_output_does_not_depend_on_the_workers(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(prepare_data, "_BYTES_PER_WORKER", 1)
    monkeypatch.setattr("launch.documents._CHUNK", 500)
    lines = [json.dumps({"text": f"document {n} " * (n % 40)}) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    outputs = []
    for workers in (1, 3):
        output = tmp_path / f"{workers}"
        prepare(output, inputs, tokenizer=tokenizer, vocab_size=300, workers=workers)
        outputs.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert len(outputs[0]) == 5 and outputs[0] == outputs[1]


def test_results_of_workers_come_in_order_and_errors_reach_the_caller():
    # The functions are the standard library's: a worker that imports this file imports torch.
    start = functools.partial
    assert list(map_in_order(start, (pow, 2), range(20), 2)) == [2**n for n in range(20)]
    taken = []
    items = (taken.append(n) or 7 - n for n in range(1000))
    with pytest.raises(ZeroDivisionError):
        for _ in map_in_order(start, (divmod, 1), items, 2):
            pass
    # Bounded: six are under way, of which the eighth fails.
    assert len(taken) <= 8 + 6
    with pytest.raises(DataError, match="a worker process was killed, .* fewer --workers"):
        list(map_in_order(start, (os._exit,), range(9), 2))


@pytest.mark.parametrize("count", [1, 2, 3, 30])
@pytest.mark.parametrize("fraction", [1e-9, 0.2, 1 - 1e-9])
def test_some_documents_are_held_out_and_not_all(count, fraction):
    hashes = [hash_of(f"{number}") for number in range(count)]
    held_out = HeldOut(fraction)
    for each in hashes:
        held_out.see([each])
    chosen = [each for each in hashes if each < held_out.threshold]
    if count == 1:
        assert held_out.threshold == 0
        return
    expected = [each for each in hashes if each < fraction]
    # Where the fraction gives nothing: the lowest; where it gives all: all but the highest.
    expected = expected or [min(hashes)]
    if len(expected) == count:
        expected.remove(max(hashes))
    assert chosen == expected


@pytest.mark.parametrize(("name", "passes"), [("a.txt", 1), ("a.jsonl", 2)])
def test_a_pass_is_repeated_only_for_another_threshold(tmp_path, monkeypatch, name, passes):
    (tmp_path / name).write_text('{"text": "the only document"}')
    made, real = [], prepare_data.Encoder
    monkeypatch.setattr(prepare_data, "Encoder", lambda *args: made.append(args[1]) or real(*args))
    folder = prepare(tmp_path / "out", [tmp_path / name]).folder
    assert documents(folder, "train") and documents(folder, "val")
    assert len(made) == passes and made[-1] == 0


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_bpe_of_a_single_document_does_not_see_its_end(tmp_path, monkeypatch, name):
    text, seen, real = "A" * 900 + "Z" * 100, [], prepare_data.train_bpe

    def train_bpe(texts, vocab_size):
        seen[:] = texts
        return real(iter(seen), vocab_size)

    monkeypatch.setattr(prepare_data, "train_bpe", train_bpe)
    (tmp_path / name).write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    options = dict(tokenizer="bpe", vocab_size=300, val_fraction=0.1)
    folder = prepare(tmp_path / "out", [tmp_path / name], **options).folder
    assert seen == documents(folder, "train") == ["A" * 900]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_long_document_is_one_document(tmp_path, monkeypatch, tokenizer):
    """Encoded in parts, read in many blocks; as a file and as a line of a .jsonl."""
    monkeypatch.setattr("launch.tokenizer._PART", 1000)
    monkeypatch.setattr("launch.compressed._BLOCK", 1000)
    monkeypatch.setattr("launch.documents._CHUNK", 1000)
    long = "".join(f"{number} and\n" for number in range(3000))
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": long}))
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    folder = prepare(tmp_path / "out", inputs, tokenizer=tokenizer, vocab_size=300).folder
    assert documents(folder, "train") == documents(folder, "val") == [long]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(tokenizer="bytes"),
            "tokenizer bytes cannot be read .*give byte, bpe, a",
        ),
        (dict(eod_token="</s>"), "are for a tokenizer.json: tokenizer byte has its own"),
        (dict(tokenizer="bpe", pad_token="</s>"), "tokenizer bpe has its own"),
        (dict(workers=0), "workers is 0: it must be at least 1"),
        (dict(val_fraction=1.0), "val_fraction is 1.0"),
        (dict(tokenizer="bpe", vocab_size=10), "vocab_size is 10"),
    ],
)
def test_options_that_make_no_sense_are_refused(texts, tmp_path, options, sentence):
    with pytest.raises(DataError, match=sentence):
        prepare(tmp_path / "out", [texts], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_skipped_documents_are_listed(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' * 2 + b"\xff\n" * 30)
    line = ["--output", str(tmp_path / "out"), "--input", str(tmp_path / "a.jsonl")]
    assert prepare_data.main(line) == 0
    printed = capsys.readouterr().out
    assert "skipped, not UTF-8: a.jsonl:3, a.jsonl:4, " in printed
    assert printed.endswith("a.jsonl:22 and 10 more (all are in meta.json)\n")
    assert len(DataFolder(tmp_path / "out").meta["skipped"]) == 30


def test_command_line(texts, tmp_path, capsys):
    output = str(tmp_path / "out")
    assert prepare_data.main(["--output", output, "--input", str(texts)]) == 0
    assert "documents" in capsys.readouterr().out
    assert prepare_data.main(["--output", output, "--input", str(texts)]) == 73
    assert "exists already" in capsys.readouterr().err
