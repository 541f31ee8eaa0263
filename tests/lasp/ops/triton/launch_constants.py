"""Other launch constants for a test, such as segments short enough for Triton's interpreter."""

import contextlib
from unittest import mock

from lasp import replay
from lasp.ops.triton import launch_config
from lasp.ops.triton.scan import plan_scan
from lasp.ops.triton.state import plan_states


@contextlib.contextmanager
def launch_constants(*, segment_length=None, **constants):
    """Within, `launch_config` has these constants and all segments this length, if given."""
    if segment_length is not None:
        constants["segment_length"] = lambda shape: segment_length
    choices = (launch_config.choose_segments, launch_config.choose_scan, plan_scan, plan_states)
    with mock.patch.multiple(launch_config, **constants):
        _forget(choices)
        try:
            yield
        finally:
            _forget(choices)


def _forget(choices):
    replay.forget()
    for choose in choices:
        choose.cache_clear()
