"""Tokens on disk, and which rank reads which of them."""

import struct

import numpy as np
import pytest
import torch

from lasp import SequenceShard
from launch.data import (
    IGNORE,
    DataFolder,
    IndexedSource,
    RandomSource,
    SegmentedBatch,
    Segments,
    read_batch,
    sample_order,
    step_samples,
)
from launch.exit_codes import DataError
from launch.indexed_dataset import IndexedTokens, IndexedWriter, token_dtype
from tests.launch.runs import write_tokens

DOCUMENTS = [np.arange(10), np.arange(10, 13), np.array([], dtype=np.int64), np.arange(13, 40)]


@pytest.fixture
def prefix(tmp_path):
    writer = IndexedWriter(tmp_path / "train", np.dtype(np.uint16))
    for document in DOCUMENTS:
        writer.add(document)
    writer.close()
    return tmp_path / "train"


def test_files_are_megatrons(prefix):
    """Field by field, as Megatron's own reader expects them."""
    data = prefix.with_suffix(".idx").read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<QBQQ", data[9:34]) == (1, 8, 4, 5)
    assert np.frombuffer(data, np.int32, 4, 34).tolist() == [10, 3, 0, 27]
    assert np.frombuffer(data, np.int64, 4, 50).tolist() == [0, 20, 26, 26]
    assert np.frombuffer(data, np.int64, 5, 82).tolist() == [0, 1, 2, 3, 4]
    assert len(data) == 122
    tokens = np.fromfile(prefix.with_suffix(".bin"), np.uint16)
    assert tokens.tolist() == list(range(40))


def test_written_files_read_back(prefix):
    file = IndexedTokens(prefix)
    assert file.tokens.tolist() == list(range(40))
    assert file.document_starts.tolist() == [0, 10, 13, 13]


def test_dtype_holds_the_vocabulary():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.int32


def damage(prefix, suffix, change):
    path = prefix.with_suffix(suffix)
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("suffix", "change", "sentence"),
    [
        (".bin", lambda data: b"", "train.bin holds no tokens"),
        (".bin", lambda data: data[:-2], "train.bin has 78 bytes but train.idx describes 80"),
        (".bin", lambda data: data + b"\0", "train.bin has 81 bytes"),
        (".idx", lambda data: b"", "train.idx has 0 bytes"),
        (".idx", lambda data: data[:-1], "train.idx has 121 bytes, its header asks for 122"),
        (".idx", lambda data: b"X" + data[1:], "train.idx is not an index"),
        (".idx", lambda data: data[:9] + b"\2" + data[10:], "train.idx is not an index"),
        (".idx", lambda data: data[:17] + b"\7" + data[18:], "dtype code 7"),
        (".idx", lambda data: data[:34] + b"\xff" * 4 + data[38:], "negative length"),
        (".idx", lambda data: data[:50] + b"\1" + data[51:], "not contiguous in .bin"),
        (".idx", lambda data: data[:82] + b"\1" + data[83:], "boundaries are not in order"),
    ],
)
def test_damaged_files_are_refused_by_name(prefix, suffix, change, sentence):
    damage(prefix, suffix, change)
    with pytest.raises(DataError, match=sentence):
        IndexedTokens(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_files_are_named(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=f"train{suffix} is missing"):
        IndexedTokens(prefix)


def test_token_outside_the_vocabulary_is_named_with_its_offset(prefix):
    with pytest.raises(DataError, match=r"train.bin: token 30 at token offset 30 is outside"):
        IndexedSource(prefix, 8, vocab_size=30)


def test_large_files_are_checked_where_they_are_read(prefix, monkeypatch):
    monkeypatch.setattr("launch.data.SCAN_AT_OPEN", 10)
    source = IndexedSource(prefix, 8, vocab_size=30)
    assert source.sample(2, 0, 8)[-1] == 24
    with pytest.raises(DataError, match="token 30 at token offset 30"):
        source.sample(3, 0, 8)


def test_too_few_tokens_for_one_sequence(prefix):
    assert IndexedSource(prefix, 39, vocab_size=40).num_samples == 1
    with pytest.raises(DataError, match=r"has 40 tokens: one sequence needs .* = 41") as caught:
        IndexedSource(prefix, 40, vocab_size=40)
    assert "validation" not in str(caught.value)


def test_too_few_tokens_to_validate_on_need_not_end_a_run(tmp_path):
    write_tokens(tmp_path / "data", [range(50)])
    with pytest.raises(DataError, match=r"val.bin has .*, or --validation.no_enable"):
        IndexedSource(tmp_path / "data" / "val", 500, vocab_size=50)


def test_missing_folder_and_damaged_meta(tmp_path):
    with pytest.raises(DataError, match="is missing"):
        DataFolder(tmp_path / "none")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta.json is damaged"):
        DataFolder(tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_labels_are_shifted_before_sharding(prefix, ranks):
    """The last label of a shard is the first input of the next."""
    source = IndexedSource(prefix, 13, vocab_size=40)
    whole = read_batch(source, [1, 2], SequenceShard.whole(13))
    assert whole.inputs.tolist() == [list(range(13, 26)), list(range(26, 39))]
    assert torch.equal(whole.labels, whole.inputs + 1)
    ends = [13 * rank // ranks for rank in range(ranks + 1)]
    parts = [
        read_batch(source, [1, 2], FakeShard((start, stop)))
        for start, stop in zip(ends, ends[1:], strict=False)
    ]
    assert torch.equal(torch.cat([part.inputs for part in parts], 1), whole.inputs)
    assert torch.equal(torch.cat([part.labels for part in parts], 1), whole.labels)


def test_both_chunks_of_a_zigzag_shard_are_shifted(prefix):
    source = IndexedSource(prefix, 13, vocab_size=40)
    part = read_batch(source, [1], FakeShard((2, 4), (9, 11)))
    assert part.inputs.tolist() == [[15, 16, 22, 23]]
    assert part.labels.tolist() == [[16, 17, 23, 24]]


class FakeShard:
    """Ranges without a process group."""

    def __init__(self, *ranges, total=None):
        self.ranges, self.total = ranges, total


def test_padding_is_ignored_as_a_label(prefix):
    source = IndexedSource(prefix, 8, vocab_size=40)
    batch = read_batch(source, [0], SequenceShard.whole(8), pad_id=3)
    assert batch.labels.tolist() == [[1, 2, IGNORE, 4, 5, 6, 7, 8]]
    assert batch.inputs.tolist() == [list(range(8))]


def test_documents_of_a_packed_sequence(prefix):
    source = IndexedSource(prefix, 15, vocab_size=40)
    batch = read_batch(source, [0], SequenceShard.whole(15), varlen=True)
    assert batch.cu_seqlens == (0, 10, 13, 15)
    # The last token of a document does not predict the next document.
    assert [i for i, label in enumerate(batch.labels[0].tolist()) if label == IGNORE] == [9, 12]
    assert source.document_starts(0, 10, 13).tolist() == [10, 13]
    assert source.document_starts(1, 0, 15).size == 0


def test_segments_of_a_packed_sequence(prefix):
    source = IndexedSource(prefix, 15, vocab_size=40)
    whole = read_batch(source, [0], SequenceShard.whole(15), varlen=True)
    parts = [
        read_batch(source, [0], SequenceShard.whole(length), first=first, varlen=True)
        for first, length in ((0, 4), (4, 6), (10, 5))
    ]
    assert [part.cu_seqlens for part in parts] == [(0, 4), (0, 6), (0, 3, 5)]
    # The third segment begins with a document.
    assert [part.continues for part in parts[1:]] == [True, False]
    for name in ("inputs", "labels"):
        joined = torch.cat([getattr(part, name) for part in parts], 1)
        assert torch.equal(joined, getattr(whole, name))


def test_a_segmented_batch_is_read_segment_by_segment(prefix):
    source, reads = IndexedSource(prefix, 13, vocab_size=40), []
    segments = Segments(13, 5, SequenceShard.whole)
    assert segments.count == 3 and segments.shard(0).total == 5 and segments.shard(2).total == 3
    assert segments.first(2).seq_len == 10 and segments.first(7).seq_len == 13

    def read(index):
        reads.append(index)
        shard = segments.shard(index)
        return read_batch(source, [1], shard, first=segments.start(index), pad_id=20)

    batch = SegmentedBatch(read, segments.count).with_labels_counted()
    assert reads == [0, 1, 2] and batch.num_labels == 12
    assert [batch.read(i).inputs.tolist()[0] for i in range(3)] == [
        list(range(13, 18)),
        list(range(18, 23)),
        list(range(23, 26)),
    ]
    assert batch.without_labels().num_labels == 0
    assert batch.without_labels().read(1).num_labels == 0


def test_documents_of_a_packed_sequence_over_ranks(prefix):
    source = IndexedSource(prefix, 15, vocab_size=40)
    whole = read_batch(source, [0], SequenceShard.whole(15), varlen=True)
    # A shard ends with a document, another begins inside one.
    parts = [
        read_batch(source, [0], FakeShard(*cut, total=15), varlen=True)
        for cut in (((0, 10),), ((10, 11),), ((11, 15),), ((0, 10), (12, 15)))
    ]
    assert [part.cu_seqlens for part in parts] == [(0, 10, 13, 15)] * 4
    assert torch.equal(torch.cat([part.labels for part in parts[:3]], dim=1), whole.labels)
    there = [*range(10), *range(12, 15)]
    assert torch.equal(parts[3].labels, whole.labels[:, there])


def test_a_document_that_starts_at_a_samples_end_is_no_label_of_it(prefix):
    source = IndexedSource(prefix, 13, vocab_size=40)
    batch = read_batch(source, [0], SequenceShard.whole(13), varlen=True)
    assert batch.cu_seqlens == (0, 10, 13)
    assert [i for i, label in enumerate(batch.labels[0].tolist()) if label == IGNORE] == [9, 12]


def test_every_pass_is_a_new_permutation():
    order = sample_order(0, 30, 10, seed=1)
    passes = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert order != sample_order(0, 30, 10, seed=2)


def test_a_pass_is_permuted_once(monkeypatch):
    made, real = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    for step in range(12):
        sample_order(2 * step, 2, 8, seed=7)
    assert made == [[7, 0], [7, 1], [7, 2]]


@pytest.mark.parametrize("consumed", [0, 1, 9, 10, 17])
def test_the_order_can_be_resumed_anywhere(consumed):
    assert sample_order(consumed, 12, 10, seed=1) == sample_order(0, 29, 10, seed=1)[consumed:][:12]


@pytest.mark.parametrize(("dp", "local"), [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1), (2, 4)])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(dp, local):
    indices = sample_order(16, 8, 100, seed=0)
    parts = [
        step_samples(indices, local_batch_size=local, dp_rank=rank, dp=dp) for rank in range(dp)
    ]
    seen = sorted(index for part in parts for micro in part for index in micro)
    assert seen == sorted(indices)
    assert all(len(micro) == local for part in parts for micro in part)


def test_random_tokens_are_a_function_of_seed_and_index():
    source = RandomSource(7, seed=1)
    whole = source.sample(3, 0, 50)
    assert whole.shape == (51,) and whole.min() >= 0 and whole.max() < 7
    assert source.sample(3, 20, 30).tolist() == whole[20:31].tolist()
    assert source.sample(4, 0, 50).tolist() != whole.tolist()
    assert RandomSource(7, seed=2).sample(3, 0, 50).tolist() != whole.tolist()
    assert sample_order(5, 3, source.num_samples, seed=0) == [5, 6, 7]
    # Over the borders of the blocks in which tokens are drawn.
    long = source.sample(3, 0, 200_000)
    assert long[:51].tolist() == whole.tolist()
    assert source.sample(3, 65_530, 131_080).tolist() == long[65_530:131_081].tolist()
