"""Documents of text, .jsonl and .parquet files, compressed or not, as people have them."""

import gzip
import json
import sys
import tracemalloc

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from launch import documents
from launch.documents import find_files, read_chunks
from launch.exit_codes import DataError

TEXTS = [f"text {number} é\n" for number in range(9)]


def read(path, field="text"):
    """(names, texts, skipped) of the documents of a file or folder."""
    skipped = []
    chunks = read_chunks(find_files([path]), field)
    found = [each for chunk in chunks for each in chunk.documents(skipped)]
    return [name for name, _ in found], [text for _, text in found], skipped


def json_lines(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def write_parquet(path, texts, kind=None, field="text", **options):
    column = pyarrow.array(texts, kind)
    parquet.write_table(pyarrow.table({"id": [1] * len(texts), field: column}), path, **options)


def frames(data):
    """Several zstandard frames, as parallel compressors write them."""
    return b"".join(zstandard.compress(data[i : i + 50]) for i in range(0, len(data), 50))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress), (".zst", frames)],
)
def test_compression_changes_no_document(tmp_path, suffix, compress):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(json_lines(TEXTS)))
    assert read(tmp_path / f"a.jsonl{suffix}")[1] == TEXTS
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(TEXTS[0].encode() * 9))
    assert read(tmp_path / f"a.txt{suffix}")[1] == [TEXTS[0] * 9]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_rows_of_parquet_are_documents(tmp_path, kind):
    texts = [*TEXTS, "", TEXTS[0]]
    if pyarrow.types.is_dictionary(kind):
        texts = pyarrow.array(texts).dictionary_encode()
        kind = None
    write_parquet(tmp_path / "a.parquet", texts, kind, row_group_size=4)
    names, found, skipped = read(tmp_path / "a.parquet")
    assert found == [*TEXTS, TEXTS[0]] and skipped == []
    # An empty row keeps its number.
    assert names == [f"a.parquet:{row}" for row in [*range(1, 10), 11]]


def test_a_folder_may_mix_all_kinds(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_parquet(folder / "a.parquet", TEXTS[:2])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[2:4])))
    (folder / "c.txt").write_text(TEXTS[4], encoding="utf-8")
    (folder / "d.txt.zst").write_bytes(zstandard.compress(TEXTS[5].encode()))
    # Not decompressed: what is inside is files.
    (folder / "e.tar.gz").write_bytes(gzip.compress(b"files"))
    names, texts, skipped = read(folder)
    assert texts == TEXTS[:6]
    assert names[1:5] == [
        f"mixed/{name}" for name in ["a.parquet:2", "b.jsonl.gz:1", "b.jsonl.gz:2", "c.txt"]
    ]
    assert skipped == ["mixed/e.tar.gz"]


def test_the_field_of_text_has_a_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS, "content"))
    write_parquet(tmp_path / "a.parquet", TEXTS, field="content")
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, "content")[1] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "texts", "skipped"),
    [
        ("a.txt", b"one\r\ntwo\rthree\n", ["one\ntwo\nthree\n"], []),
        ("a.txt", b"\xef\xbb\xbfmarked \xef\xbb\xbf", ["marked \ufeff"], []),
        ("a.txt", b"\xef\xbb\xbf", [], []),
        ("a.txt", b"", [], []),
        ("a.txt", b" \n", [" \n"], []),
        ("a.txt", b"nul \0 byte", ["nul \0 byte"], []),
        ("a.txt", "utf-16".encode("utf-16"), [], ["a.txt"]),
        ("a.txt", b"caf\xe9", [], ["a.txt"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\r\\n"}', ["a", "b\r\n"], []),
        ("a.jsonl", b'{"text": ""}\n{"text": "a\\u0000"}\n\n', ["a\0"], []),
        # One bad line costs no other.
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n{"text": "b"}', ["a", "b"], ["a.jsonl:2"]),
    ],
)
def test_text_as_people_have_it(tmp_path, name, content, texts, skipped):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name)[1:] == (texts, skipped)


def test_a_row_of_parquet_that_is_not_utf8_is_skipped(tmp_path):
    bad = pyarrow.array([b"a", b"\xe9", b"c"]).view(pyarrow.string())
    write_parquet(tmp_path / "a.parquet", bad)
    assert read(tmp_path / "a.parquet") == (
        ["a.parquet:1", "a.parquet:3"],
        ["a", "c"],
        ["a.parquet:2"],
    )


def damaged(data):
    """Bytes in the middle changed."""
    middle = len(data) // 2
    return (
        data[:middle]
        + bytes(255 - byte for byte in data[middle : middle + 40])
        + data[middle + 40 :]
    )


LONG = json_lines([f"{number**9} " * 40 for number in range(3000)])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl.gz", gzip.compress(LONG)[:-400], r"a.jsonl.gz, after line 2[0-9]+: .*ends early"),
        (
            "a.jsonl.gz",
            damaged(gzip.compress(LONG)),
            r"a.jsonl.gz, after line [12][0-9]+: .*damaged",
        ),
        ("a.jsonl.gz", b'{"text": "not compressed"}', r"after line 0: .*damaged \(Not a gzipped"),
        ("a.jsonl.zst", zstandard.compress(LONG)[:-400], r"after line [12][0-9]+: .*ends early"),
        ("a.jsonl.zst", damaged(zstandard.compress(LONG)), r"after line [0-9]+: .*damaged"),
        ("a.txt.gz", gzip.compress(LONG)[:-4], "input .*a.txt.gz cannot be read: .*ends early"),
        ("a.txt.zst", b"not compressed", "input .*a.txt.zst cannot be read: .*damaged"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"words": 1}',
            r'line 2: not a JSON object with a string "text"',
        ),
        ("a.jsonl", b"[" * 100_000, "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": null}', "line 1: not a JSON object"),
        ("a.parquet", b"not parquet", "a.parquet, after row 0: damaged or not parquet"),
        ("a.parquet", b"", "a.parquet, after row 0: damaged or not parquet"),
        ("a.parquet.gz", b"", "a.parquet.gz is compressed as a whole"),
    ],
)
def test_damaged_files_are_named_with_the_last_good_row(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ({"words": ["a"]}, "has no column 'text': it has words; name one with --text-field"),
        ({"text": [1]}, "column 'text' is int64, not text"),
        ({"text": ["a", None]}, 'row 2: "text" is null'),
    ],
)
def test_parquet_without_text_is_refused(tmp_path, column, sentence):
    parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=sentence):
        read(tmp_path / "a.parquet")


def test_damage_inside_parquet_names_the_rows_before(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"{number} " * 400 for number in range(4000)], row_group_size=500)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet, after row [12]\d\d\d: damaged"):
        read(path)


@pytest.mark.parametrize(
    ("package", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"needs the package {package}: pip install -e '.\["):
        read(tmp_path / name)


def test_a_chunk_holds_whole_lines_and_its_share_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK", 1000)
    monkeypatch.setattr("launch.compressed._BLOCK", 512)
    (tmp_path / "a.jsonl").write_bytes(LONG)
    chunks = list(read_chunks(find_files([tmp_path / "a.jsonl"])))
    assert len(chunks) > 500
    assert sum(chunk.size for chunk in chunks) == len(LONG)
    texts = [text for chunk in chunks for _, text in chunk.documents([])]
    assert json_lines(texts) == LONG


def test_memory_does_not_grow_with_the_file(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(8):
            file.write(LONG)
    tracemalloc.start()
    try:
        skipped = []
        chunks = read_chunks(find_files([tmp_path / "a.jsonl.gz"]))
        num_bytes = sum(len(text) for chunk in chunks for _, text in chunk.documents(skipped))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes > 2 * peak and peak < 12e6


def test_linked_folders_are_read_once(tmp_path):
    root, other = tmp_path / "in", tmp_path / "other"
    for folder in (root / "b", root / "c", other / "deep"):
        folder.mkdir(parents=True)
    for path in (root / "x.txt", root / "b" / "y.txt", other / "deep" / "z.txt"):
        path.write_text("text")
    # To a folder elsewhere, to one that has a name of its own, and to those that are read already.
    (root / "a").symlink_to(other, target_is_directory=True)
    (root / "again").symlink_to(root / "b", target_is_directory=True)
    (root / "c" / "up").symlink_to(root, target_is_directory=True)
    (other / "deep" / "loop").symlink_to(other, target_is_directory=True)
    names = [name for name, _ in find_files([root])]
    assert names == ["in/a/deep/z.txt", "in/b/y.txt", "in/x.txt"]


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = documents.os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(documents.os, "scandir", refuse)
    with pytest.raises(DataError, match="input .*/sub cannot be read: Permission denied"):
        find_files([tmp_path])
