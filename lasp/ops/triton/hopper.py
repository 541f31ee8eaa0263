"""Where the kernels written in Gluon run: the layer under Triton's language, for Hopper GPUs.

Its names move between versions, so these kernels are imported at the first call that can use them,
and `scan` goes on without them otherwise.
"""

from __future__ import annotations

import functools

import torch
import triton

# Gluon is experimental: only where it was tested against float64, for races and both assemblers.
TRITON_VERSIONS = ("3.6.",)


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """Whether the GPU and this Triton can run them."""
    if not triton.__version__.startswith(TRITON_VERSIONS):
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from lasp.ops.triton import scan_chained_kernel, scan_hopper_kernel  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True
