"""Tables of faults, of which `make test` tries a few rows and `make test-faults` all."""

import pytest


def cases(rows, every=8):
    """The rows of a table; all but each `every`-th have the mark `faults`."""
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=_marks(number % every))
        for number, row in enumerate(rows)
    ]


def _marks(left):
    return (pytest.mark.faults,) if left else ()
