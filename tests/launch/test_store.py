"""Checkpoints are complete or not there, and any changed byte is detected when reading."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from launch.checkpoint.store import CheckpointStore, verify
from launch.exit_codes import CheckpointError
from tests.launch import runs
from tests.launch.runs import ROOT, save_tensors

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def tensors(step):
    return {
        "model": {"a": torch.full((3, 4), float(step)), "b": torch.arange(5.0)},
        "optimizer": {"exp_avg/a": torch.full((3, 4), -float(step))},
    }


def fill(store, *steps):
    for step in steps:
        save_tensors(store, step, tensors(step), {"step": step})


def change_manifest(path, change):
    """Edit a manifest and give it a hash that matches."""
    manifest = json.loads(path.read_text())
    change(manifest["files"])
    del manifest["sha256"]
    content = json.dumps(manifest, sort_keys=True).encode()
    path.write_text(json.dumps({**manifest, "sha256": hashlib.sha256(content).hexdigest()}))


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoint")


def test_what_was_saved_is_read_back(store):
    fill(store, 7)
    found, refused = store.find("auto")
    assert (found.step, refused) == (7, [])
    assert found.path.name == "step-00000007"
    assert sorted(path.name for path in found.path.iterdir()) == FILES
    assert torch.equal(found.tensors("model")["a"], torch.full((3, 4), 7.0))
    assert found.state() == {"step": 7}


def truncations(data):
    return {"empty": b"", "half": data[: len(data) // 2], "last byte": data[:-1]}


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused_by_name(store, name):
    fill(store, 1, 2)
    path = store.folder / "step-00000002" / name
    data = path.read_bytes()
    for short in truncations(data).values():
        path.write_bytes(short)
        with pytest.raises(CheckpointError, match=name):
            verify(path.parent)
    found, refused = store.find("auto")
    assert found.step == 1
    assert len(refused) == 1 and name in refused[0]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected(store, name):
    fill(store, 1)
    path = store.folder / "step-00000001" / name
    data = path.read_bytes()
    for offset in range(0, len(data), max(1, len(data) // 40)):
        changed = bytearray(data)
        changed[offset] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="manifest.json|" + name):
            verify(path.parent)
    path.write_bytes(data)
    assert verify(path.parent).step == 1


def test_a_manifest_cannot_point_outside_its_folder(store, tmp_path):
    fill(store, 1)
    path = store.folder / "step-00000001" / "manifest.json"
    (tmp_path / "outside").write_bytes(b"")
    outside = {"name": "../../outside", "size": 0, "sha256": ""}
    change_manifest(path, lambda files: files.append(outside))
    with pytest.raises(CheckpointError, match="outside"):
        verify(path.parent)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_manifest_that_leaves_a_file_out_is_refused(store, name):
    fill(store, 1)
    path = store.folder / "step-00000001" / "manifest.json"
    change_manifest(path, lambda files: files.remove(next(f for f in files if f["name"] == name)))
    with pytest.raises(CheckpointError, match="does not list all files"):
        verify(path.parent)


def test_a_renamed_checkpoint_is_refused(store):
    fill(store, 1)
    (store.folder / "step-00000001").rename(store.folder / "step-00000009")
    with pytest.raises(CheckpointError, match="is of step 1"):
        verify(store.folder / "step-00000009")


def test_a_valid_checkpoint_is_never_overwritten(store):
    fill(store, 3)
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_tensors(store, 3, tensors(99), {})
    assert torch.equal(verify(store.folder / "step-00000003").tensors("model")["a"], full(3))


def full(value):
    return torch.full((3, 4), float(value))


def test_a_damaged_checkpoint_of_the_same_step_is_moved_aside(store):
    fill(store, 3)
    (store.folder / "step-00000003" / "state.json").write_text("{}")
    fill(store, 3)
    assert store.find("must")[0].step == 3
    (aside,) = store.folder.glob(".refused-step-00000003-*")
    assert (aside / "state.json").read_text() == "{}"


def test_what_another_rank_cannot_read_is_replaced_and_not_counted(tmp_path):
    store = CheckpointStore(tmp_path, keep_latest_k=2)
    fill(store, 1, 2, 3)
    failed = {str(tmp_path / "step-00000003"): "rank 1 cannot read it"}
    found, refused = store.find("auto", failed=failed)
    assert (found.step, refused) == (2, ["rank 1 cannot read it"])
    # The run comes to step 3 again.
    fill(store, 3)
    assert store.steps() == [2, 3] and store.find("auto")[0].step == 3
    assert [path.name[:22] for path in tmp_path.glob(".refused-*")] == [".refused-step-00000003"]
    fill(store, 4)
    assert store.steps() == [3, 4]


def test_retention_counts_valid_checkpoints_and_leaves_other_folders(tmp_path):
    store = CheckpointStore(tmp_path, keep_latest_k=2)
    other = ["old-step-00000900.bak", "step-5", "step-000000012", "notes"]
    for name in other:
        (tmp_path / name).mkdir()
    fill(store, 1, 2)
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000008").mkdir()
    fill(store, 3)
    # Valid: 1 and 3. The damaged 2 and the empty 8 are not counted.
    assert store.steps() == [1, 2, 3, 8]
    fill(store, 4)
    assert store.steps() == [2, 3, 4, 8]
    assert store.find("auto")[0].step == 4
    assert all((tmp_path / name).is_dir() for name in other)


def test_failing_to_remove_an_old_checkpoint_is_not_a_failed_save(tmp_path, monkeypatch):
    store, rename = CheckpointStore(tmp_path, 1), os.rename

    def refuse(source, target):
        if ".removed" in str(target):
            raise PermissionError("not yours")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    fill(store, 1, 2)
    assert store.steps() == [1, 2]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (runs, "write_shards"),
        (runs, "seal_file"),
        (Path, "write_text"),
        (os, "fsync"),
        (os, "rename"),
    ],
)
def test_a_failed_save_commits_nothing(store, monkeypatch, owner, name):
    fill(store, 1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space"):
        fill(store, 2)
    monkeypatch.undo()
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    fill(store, 2)
    assert store.find("auto")[0].step == 2


def test_incomplete_folders_are_not_checkpoints(store):
    fill(store, 1)
    staging = store.folder / ".staging-step-00000002-123"
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(b"torn")
    # A step folder without manifest, like an interrupted copy.
    (store.folder / "step-00000003").mkdir()
    found, refused = store.find("auto")
    assert found.step == 1
    assert len(refused) == 1 and "manifest.json is missing" in refused[0]


def test_leftovers_of_killed_processes_are_removed_at_the_first_save(store):
    store.folder.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (".staging-step-00000002", ".removed-step-00000001"):
        for process in (dead.pid, os.getpid(), os.getppid()):
            (store.folder / f"{name}-{process}").mkdir()
    (store.folder / ".refused-step-00000003-0").mkdir()
    fill(store, 4)
    # The folders of a running process are kept, and what was refused is kept for the user.
    assert sorted(path.name for path in store.folder.iterdir()) == [
        ".refused-step-00000003-0",
        f".removed-step-00000001-{os.getppid()}",
        f".staging-step-00000002-{os.getppid()}",
        "step-00000004",
    ]


def test_resume_modes(store, tmp_path):
    assert store.find("auto") == (None, [])
    assert store.find("never") == (None, [])
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        store.find("must")
    with pytest.raises(CheckpointError, match="no such folder"):
        store.find("autp")
    fill(store, 1, 2)
    assert store.find("must")[0].step == 2
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        store.find("never")
    with pytest.raises(CheckpointError, match="overwrite the checkpoints from step 2"):
        store.find(str(store.folder / "step-00000001"))
    assert store.find(str(store.folder / "step-00000002"))[0].step == 2
    other = CheckpointStore(tmp_path / "other")
    assert other.find(str(store.folder / "step-00000001"))[0].step == 1
    (store.folder / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state.json has 2 bytes"):
        other.find(str(store.folder / "step-00000002"))


def test_the_launcher_never_unpickles():
    sources = sorted((ROOT / "launch").rglob("*.py"))
    assert len(sources) > 15
    for path in sources:
        text = path.read_text(encoding="utf-8")
        # Released .bin files are pickles; this reads no more of them than tensors.
        text = re.sub(r"torch\.load\((?=[^()]*\bweights_only=True\b)", "", text)
        assert not re.search(r"torch\.load|import pickle|pickle\.load|_object", text), path
