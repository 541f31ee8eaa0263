"""Damage of prepared data: found before a step uses it."""

import json
import os

import numpy as np
import pytest

from launch.data import DataFolder
from launch.exit_codes import DataError
from launch.prepare_data import prepare
from tests.faults.cases import (
    place,
)

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three documents, in blocks of 256 bytes."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.data_digests.BLOCK", 256)
        for number in range(4):
            place(folder, f"{number}.txt", "some text of a document, " * 20)
        texts = [folder / f"{number}.txt" for number in range(4)]
        return prepare(folder / "data", texts, val_fraction=0.3).folder


def flips(content):
    for position in range(len(content)):
        for bit in range(8):
            yield (
                content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
            )


def copy_of(small, folder):
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.faults
def test_every_bit_of_meta_json_is_found_or_without_effect(small, tmp_path):
    folder = copy_of(small, tmp_path / "data")
    intact, found = DataFolder(folder).meta, 0
    content = (folder / "meta.json").read_bytes()
    for changed in flips(content):
        (folder / "meta.json").write_bytes(changed)
        try:
            assert DataFolder(folder).meta == intact
        except DataError:
            found += 1
    # Of 8 bits of each byte: spaces and upper-case hexadecimal digits may say the same.
    assert found >= 0.99 * 8 * len(content)


@pytest.mark.faults
def test_every_bit_of_an_index_is_found(small, tmp_path):
    folder = copy_of(small, tmp_path / "data")
    for changed in flips((folder / "train.idx").read_bytes()):
        (folder / "train.idx").write_bytes(changed)
        with pytest.raises(DataError, match=r"train.idx"):
            DataFolder(folder).source("train", 64, 258)


def damages(content, count):
    generator = np.random.default_rng(0)
    for number in range(count):
        data = bytearray(content)
        first = int(generator.integers(0, len(data) - 8))
        length = int(generator.integers(1, 64))
        if number % 4 == 0:
            data[first] ^= 1 << int(generator.integers(0, 8))
        elif number % 4 == 1:
            data[first : first + length] = bytes(len(data[first : first + length]))
        elif number % 4 == 2:
            data[first : first + 2], data[first + 2 : first + 4] = b"\x41\0", b"\x42\0"
        else:
            data = data[:first]
        if bytes(data) != content:
            yield bytes(data)


@pytest.mark.faults
@pytest.mark.parametrize("large", [False, True], ids=["at start", "when read"])
def test_random_damages_of_tokens_are_found(small, tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr("launch.data.SCAN_AT_OPEN", 0)
    folder, tried = copy_of(small, tmp_path / "data"), 0
    for changed in damages((folder / "train.bin").read_bytes(), 240):
        (folder / "train.bin").write_bytes(changed)
        tried += 1
        with pytest.raises(DataError, match=r"train.bin"):
            source = DataFolder(folder).source("train", 64, 258)
            assert large
            # Every token is one of a step, but for those after the last sample.
            for index in range(source.num_samples):
                source.sample(index, 0, 64)
            source._file.check_all()
    assert tried >= 200


def test_a_changed_block_is_found_where_it_is_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.data.SCAN_AT_OPEN", 0)
    folder = copy_of(small, tmp_path / "data")
    content = bytearray((folder / "train.bin").read_bytes())
    content[600] ^= 1
    (folder / "train.bin").write_bytes(content)
    source = DataFolder(folder).source("train", 64, 258)
    assert source.sample(0, 0, 64).shape == (65,)
    with pytest.raises(DataError, match="train.bin has changed between bytes 512 and 768"):
        source.sample(4, 0, 64)
    with pytest.raises(DataError, match="train.bin has changed between bytes 512 and 768"):
        DataFolder(folder).source("train", 64, 258, verify=True)


def test_another_number_of_bytes_in_meta_json_is_found(small, tmp_path):
    """It would give other bits per byte."""
    folder = copy_of(small, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    meta["val"]["bytes"] += 1
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="does not match its digest"):
        DataFolder(folder)


def test_the_leftover_of_a_killed_preparation_is_removed(tmp_path):
    place(tmp_path, "a.txt", "text " * 50)
    # No process has such a number.
    for name in (".out-4194305", f".out-{os.getppid()}", ".other-4194305", ".out-x"):
        (tmp_path / name).mkdir()
    prepare(tmp_path / "out", [tmp_path / "a.txt"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.txt", "out", f".out-{os.getppid()}", ".other-4194305", ".out-x"}
