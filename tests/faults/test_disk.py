"""Disks that are full, fill up during a save, or cannot be written: checkpoints are complete or not
there, and the run says so and ends with 74 once nothing more can be saved."""

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import subprocess
import tempfile
from collections import namedtuple

import pytest
import torch

from launch import metrics
from launch.checkpoint import store as store_module
from launch.checkpoint.store import CheckpointStore, verify
from launch.exit_codes import DISK_FAILED
from tests.launch.runs import STEPS, at_step, losses, records, run_here, save_tensors

pytestmark = pytest.mark.usefixtures("one_process")


@contextlib.contextmanager
def file_limit(nbytes):
    """Writing more than this to a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(step):
    values = torch.arange(20_000.0) * step
    return {"model": {"a": values, "b": values[:9]}, "optimizer": {"exp_avg/a": -values}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("tries", [20, pytest.param(400, marks=pytest.mark.faults)])
def test_a_disk_that_fills_up_anywhere_in_a_save_leaves_nothing_of_it(tmp_path, tries):
    rng, written = random.Random(tries), 0
    store = CheckpointStore(tmp_path)
    save_tensors(store, 1, contents(1), {"step": 1})
    for step in range(2, 2 + tries):
        try:
            # The largest file has 80 kB.
            with file_limit(rng.choice([0, rng.randrange(2000), rng.randrange(90_000)])):
                save_tensors(store, step, contents(step), {"step": step})
            written += 1
        except OSError as error:
            assert error.errno == errno.EFBIG
            assert names(tmp_path) == [name_of(step) for step in store.steps()]
    assert 0 < written < tries
    for step in store.steps():
        assert torch.equal(verify(tmp_path / name_of(step)).tensors("model")["a"], values(step))


def name_of(step):
    return f"step-{step:08d}"


def values(step):
    return contents(step)["model"]["a"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and its rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("knows_its_room", [True, False])
def test_a_full_file_system_keeps_the_checkpoints_it_has(small_disk, monkeypatch, knows_its_room):
    if not knows_its_room:
        monkeypatch.setattr(store_module, "check_room", lambda folder, nbytes: None)
    store, step = CheckpointStore(small_disk), 0
    with pytest.raises(OSError, match="No space left|are free") as caught:
        for step in range(1, 100):
            staging = store.begin(step, 165_000)
            store.discard(staging)
            save_tensors(store, step, contents(step), {"step": step})
    assert caught.value.errno == errno.ENOSPC
    assert store.steps() == list(range(1, step)) and step > 3
    assert names(small_disk) == [name_of(each) for each in range(1, step)]
    for each in range(1, step):
        verify(small_disk / name_of(each))
    # With room again, saves go on.
    shutil.rmtree(small_disk / name_of(1))
    save_tensors(store, step, contents(step), {"step": step})
    assert store.find("must")[0].step == step


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.faults), "async"])
def test_a_run_survives_a_full_disk_and_resumes(tmp_path, data, monkeypatch, capsys, mode):
    wanted = dict(checkpoint__interval=1, checkpoint__keep_latest_k=0, checkpoint__async_mode=mode)
    limit = contextlib.ExitStack()
    # Saves of steps 3 and 4 fail, some of which may be in the background.
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda state: limit.enter_context(file_limit(20_000)))
        with monkeypatch.context() as other:
            at_step(other, 4, lambda state: limit.close())
            assert run_here(tmp_path, data, **wanted) == 0
    output = capsys.readouterr().out
    assert "checkpoint 1 not written" in output and "File too large" in output
    saved = CheckpointStore(tmp_path / "checkpoint").steps()
    assert set(saved) < set(range(1, STEPS + 1)) and {1, STEPS} <= set(saved)
    assert names(tmp_path / "checkpoint") == [name_of(step) for step in saved]
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("mode", ["disabled", pytest.param("async", marks=pytest.mark.faults)])
def test_a_run_that_cannot_save_stops_after_some_tries(tmp_path, data, monkeypatch, capsys, mode):
    wanted = dict(checkpoint__interval=1, checkpoint__async_mode=mode)
    with contextlib.ExitStack() as limit:
        at_step(monkeypatch, 2, lambda state: limit.enter_context(file_limit(20_000)))
        assert run_here(tmp_path, data, **wanted, training__steps=20) == DISK_FAILED
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 3 checkpoints in a row could not be written")
    # In the background, that of step 2 is written while the disk fills up.
    (newest,) = re.findall(r"the newest checkpoint is that of step ([12]),", captured.err)
    assert captured.err.count("\n") == 1
    assert max(losses(tmp_path)) <= 7
    # The same command goes on from there.
    assert run_here(tmp_path, data, **wanted) == 0
    assert f"step-0000000{newest}" in capsys.readouterr().out
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))


@pytest.mark.faults
def test_a_run_that_may_fail_to_save_for_ever_goes_on(tmp_path, data, monkeypatch, capsys):
    wanted = dict(checkpoint__interval=1, checkpoint__max_failed_saves=0)
    with contextlib.ExitStack() as limit:
        at_step(monkeypatch, 2, lambda state: limit.enter_context(file_limit(20_000)))
        assert run_here(tmp_path, data, **wanted) == DISK_FAILED
    assert f"checkpoint {STEPS - 2} not written" in capsys.readouterr().out
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))


def full(monkeypatch, folder):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))


def read_only(monkeypatch, folder):
    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def a_file_in_its_place(monkeypatch, folder):
    folder.mkdir()
    (folder / "checkpoint").write_text("")


def a_dangling_link(monkeypatch, folder):
    folder.mkdir()
    (folder / "checkpoint").symlink_to(folder / "nowhere")


@pytest.mark.parametrize(
    ("disk", "sentence"),
    [
        (full, "0.000 GB are free"),
        (read_only, "Read-only file system"),
        (a_file_in_its_place, "Not a directory"),
        (a_dangling_link, "No such file or directory"),
    ],
)
def test_a_disk_that_cannot_hold_a_checkpoint_is_refused_before_the_first_step(
    tmp_path, data, monkeypatch, capsys, disk, sentence
):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        disk(patch, folder)
        assert run_here(folder, data) == DISK_FAILED
        captured = capsys.readouterr()
        assert sentence in captured.err and captured.err.count("\n") == 1
        assert "step: 1/" not in captured.out
        assert not (folder / "metrics.jsonl").exists()
        # What saves nothing needs no room.
        assert run_here(folder, data, "--checkpoint.no-enable", training__steps=1) == 0


def test_a_finished_run_needs_no_room(tmp_path, data, monkeypatch):
    assert run_here(tmp_path, data, training__steps=2) == 0
    full(monkeypatch, tmp_path)
    assert run_here(tmp_path, data, training__steps=2) == 0


def test_metrics_on_a_full_disk_lose_lines_and_spoil_none(tmp_path, data, monkeypatch, capsys):
    with contextlib.ExitStack() as limit:
        # In the middle of the fourth line.
        at_step(
            monkeypatch,
            3,
            lambda state: limit.enter_context(
                file_limit((tmp_path / "metrics.jsonl").stat().st_size + 50)
            ),
        )
        with monkeypatch.context() as patch:
            at_step(patch, 5, lambda state: limit.close())
            assert run_here(tmp_path, data, "--checkpoint.no-enable") == 0
    assert "metrics.jsonl cannot be written" in capsys.readouterr().out
    assert [each["step"] for each in records(tmp_path)] == [1, 2, 3, 6, 7, 8]
    assert metrics.plot_loss(tmp_path / "metrics.jsonl") is not None
