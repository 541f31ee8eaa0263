"""Tables of faults, of which `make test` tries a few rows and `make test-faults` all."""

import os
import re
import socket

import pytest


def cases(rows, every=8):
    """The rows of a table; all but each `every`-th have the mark `faults`."""
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=_marks(number % every))
        for number, row in enumerate(rows)
    ]


def _marks(left):
    return (pytest.mark.faults,) if left else ()


DEEP = "[" * 100_000
DEEP_OBJECT = '{"text": ' * 5000 + "1" + "}" * 5000
# Parsed by Python, and too deep for what writes it again.
NESTED = "[" * 500 + "]" * 500
QUICK = ("--validation.no-enable", "--sample.no-enable")


def one_sentence(main, argv, capsys, code):
    """Run `main`; it must end with `code` and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error, error
    assert "invalid command line" in error or error.count("\n") == 1, error
    return error


def place(folder, name, content):
    """A file of a table: bytes, text, or what is no regular file."""
    path = folder / name
    if content == "fifo":
        os.mkfifo(path)
    elif content == "socket":
        # The path of a socket is short.
        here = os.getcwd()
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)
        os.chdir(here)
    elif content == "device":
        path.symlink_to("/dev/zero")
    elif content == "folder":
        path.mkdir()
    elif content == "nowhere":
        path.symlink_to(folder / "nothing")
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text_id(value):
    return re.sub(r"\W+", " ", repr(value))[:40]


ODD = ("fifo", "socket", "device", "nowhere", None)
