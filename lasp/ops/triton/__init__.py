"""The GPU kernels, in Triton.

    k, v -> state kernel -> combine kernel -> segment states, total      (chunk_states)
    a, b, x, states -> scan kernel -> y                                  (scan: o, dq, dk and dv)
    q, k, v, do, states -> Hopper scan or dkdv kernel -> dk, dv          (scan_dkdv)
    log_decay of every token -> cumulative sums                          (prepare_decay)
    q, k, v, state -> step kernel -> o, new state                        (step: decoding)
    state of the previous rank -> kernel -> state for the following one  (send_recv_state)

`launch_config` has every launch constant and chooses the kernel for a call, `segments` divides
documents among programs, `launcher` caches launches and `driver` runs them, `hopper` is the scan
for Hopper GPUs, `lrpe` the positional encoding of TransNormerLLM, and `decode` its token step.
"""

from lasp.ops.triton.decay import decay_gradient, decay_sums, prepare_decay
from lasp.ops.triton.launcher import current_stream, has_hooks
from lasp.ops.triton.scan import scan, scan_dkdv
from lasp.ops.triton.send_recv_state import send_recv_state
from lasp.ops.triton.state import chunk_states, segment_states_shape
from lasp.ops.triton.step import step

__all__ = [
    "chunk_states",
    "current_stream",
    "decay_gradient",
    "decay_sums",
    "has_hooks",
    "prepare_decay",
    "scan",
    "scan_dkdv",
    "segment_states_shape",
    "send_recv_state",
    "step",
]
