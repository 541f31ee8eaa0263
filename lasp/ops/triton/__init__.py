"""The GPU kernels: `prefix_states`, `scan`, `scan_pair`, `scan_gradients` and `step`, in Triton.

    k, v -> state kernel -> combine kernel -> segment states, total      (prefix_states)
    a, b, x, states -> scan kernel -> y                                  (scan: o, dq, dk and dv)
    a, b, x, c, states -> scan kernel -> y, z                            (scan_pair: dv and dk)
    a, b, x -> chained scan kernel -> y                      (scan of few heads, short sequences)
    q, k, v, do -> chained scan kernel -> dq, dk, dv                     (scan_gradients of these)
    q, k, v, state -> step kernel -> o, new state                        (step: decoding)

`plan.py` holds the launch table and cuts documents into segments; `launch.py` remembers which
compiled variant of a kernel serves which shapes.
"""

from lasp.ops.triton.prefix import is_one_pass, prefix_states
from lasp.ops.triton.relay import relay
from lasp.ops.triton.scan import scan, scan_gradients, scan_pair
from lasp.ops.triton.step import step

__all__ = [
    "is_one_pass",
    "prefix_states",
    "relay",
    "scan",
    "scan_gradients",
    "scan_pair",
    "step",
]
