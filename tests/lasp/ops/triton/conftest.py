"""The fixture for tests that compile kernels."""

import pytest


@pytest.fixture
def compiled():
    """What is launched on CPU tensors is compiled for sm_90 instead; the list of the results."""
    # Imported late: this machine may have no triton.
    from tests.lasp.ops.triton import compiler

    with compiler.compiling(compiler.TARGETS["sm_90"]) as results:
        yield results
