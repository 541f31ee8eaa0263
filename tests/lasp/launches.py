"""Calls of the operator with CPU tensors and GPU kernels, of which nothing is run."""

import contextlib
from unittest import mock

from lasp import ops, replay
from lasp.ops import triton
from lasp.ops.triton.launcher import CachedLaunch

STREAM = 7


@contextlib.contextmanager
def pretended(direct=lambda launch, programs, addresses: None):
    """Within, calls take the way of a GPU's; direct(launch, programs, addresses) replaces every
    launch by the driver."""

    def launch(self, programs, *tensors):
        def run(programs, stream, addresses):
            direct(self, programs, addresses)

        replay.note_launch(lambda device: run, programs, STREAM, tensors)
        run(programs, STREAM, [0 if x is None else x.data_ptr() for x in tensors])

    def call(name, tensors, options, group=None):
        return replay.Call(name, tensors, options, stream=STREAM, group=group)

    replay.forget()
    with (
        mock.patch.object(CachedLaunch, "__call__", launch),
        mock.patch.object(ops, "backend", lambda x: triton),
        mock.patch.object(ops, "remembered_call", call),
    ):
        try:
            yield
        finally:
            replay.forget()
