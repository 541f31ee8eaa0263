"""The fixture for tests that compile kernels."""

import pytest


@pytest.fixture
def compiled(monkeypatch):
    """What is launched on CPU tensors is compiled for sm_90 instead; the list of the results."""
    # Imported late: this machine may have no triton.
    from triton.runtime.jit import JITFunction

    from lasp.ops.triton import launcher
    from tests.lasp.ops.triton.compiler import compile_launch

    results = []

    def load(*args):
        raise LookupError("there is no GPU to load the kernel")

    def getitem(kernel, grid):
        return lambda *args, **constants: results.append(compile_launch(kernel, args, constants))

    monkeypatch.setattr(JITFunction, "__getitem__", getitem)
    monkeypatch.setattr(launcher, "DirectLaunch", load)
    monkeypatch.setattr(launcher, "current_stream", lambda device: 0)
    return results
