"""Fixtures of the tests over several hosts, and the skip where namespaces are not allowed."""

import functools

import pytest

from tests.launch.conftest import data
from tests.network.hosts import Hosts, why_not

__all__ = ["data"]

_why_not = functools.cache(why_not)


@pytest.fixture
def hosts():
    """Two hosts."""
    if (reason := _why_not()) is not None:
        pytest.skip(reason)
    with Hosts(2) as hosts:
        yield hosts
