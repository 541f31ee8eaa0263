"""Fixtures of the launcher's tests."""

import pytest

from tests.launch.runs import as_one_process, make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def one_process():
    """See `as_one_process`."""
    with as_one_process():
        yield
