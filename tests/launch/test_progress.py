"""Progress is printed now and then, and by one rank only."""

import itertools
import time

import pytest

from launch.progress import progress


@pytest.mark.parametrize("enabled", [True, False])
def test_off_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys, enabled):
    seconds = itertools.count(step=20.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    assert list(progress("abcde", "letters", enabled=enabled)) == list("abcde")
    lines = capsys.readouterr().out.splitlines()
    assert lines == (["letters: 1/5", "letters: 3/5"] if enabled else [])


def test_items_without_a_length_need_a_total(capsys):
    assert list(progress(iter("ab"), "letters", total=2)) == ["a", "b"]


def test_progress_in_bytes_counts_the_size_of_items(monkeypatch, capsys):
    seconds = itertools.count(step=20.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    items = ["a" * 1_000_000, "b" * 2_000_000, "c" * 5_000_000]
    assert list(progress(items, "text", total=8_000_000, size=len)) == items
    assert capsys.readouterr().out.splitlines() == ["text: 1/8 MB"]


@pytest.mark.parametrize(("size", "done"), [(None, [1, 1, 1]), (len, [1, 2, 5])])
def test_on_a_terminal_progress_is_a_bar(monkeypatch, size, done):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    advanced = []
    monkeypatch.setattr("rich.progress.Progress.advance", lambda bar, task, n: advanced.append(n))
    items = ["a", "bb", "ccccc"]
    assert list(progress(items, "items", total=8, size=size)) == items
    assert advanced == done
