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


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    tracked = []

    def track(items, name, *, total, transient):
        tracked.append((name, total))
        return items

    monkeypatch.setattr("launch.progress.track", track)
    assert list(progress([1, 2, 3], "numbers")) == [1, 2, 3]
    assert tracked == [("numbers", 3)]
