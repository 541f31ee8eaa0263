"""One run at a time in a dump folder."""

import os
import signal
import subprocess
import sys

import pytest

from launch import dump_folder
from launch.dump_folder import open_dump_folder
from launch.exit_codes import ConfigError
from tests.launch.runs import ROOT, run_here

HOLDS = """
import sys, time
from pathlib import Path
from launch.dump_folder import open_dump_folder
held = open_dump_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.usefixtures("one_process")
def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(
    holder, tmp_path, data, monkeypatch, capsys
):
    monkeypatch.setattr(dump_folder, "_PATIENCE_SECONDS", 0.3)
    assert run_here(tmp_path, data, training__steps=1) == 73
    error = capsys.readouterr().err
    assert f"{tmp_path} is in use by process {holder.pid} on " in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == [".lock"]
    # A job that was killed leaves no lock behind.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run_here(tmp_path, data, training__steps=1) == 0


def test_a_folder_is_waited_for_while_its_last_owner_ends(holder, tmp_path, monkeypatch):
    def end(seconds):
        holder.kill()
        holder.wait()

    monkeypatch.setattr(dump_folder.time, "sleep", end)
    open_dump_folder(tmp_path).close()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(dump_folder.fcntl, "lockf", refuse)
    open_dump_folder(tmp_path).close()
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["file", "fifo", "nul", "link to itself"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, kind):
    folder = tmp_path / ("nul\0" if kind == "nul" else "out")
    if kind == "file":
        folder.write_text("")
    if kind == "fifo":
        os.mkfifo(folder)
    if kind == "link to itself":
        folder.symlink_to(folder)
    with pytest.raises(ConfigError, match="cannot be made or written"):
        open_dump_folder(folder)
