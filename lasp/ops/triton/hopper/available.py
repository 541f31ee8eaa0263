"""Where kernels written in Gluon run: Triton's lower-level language, used here for Hopper GPUs.

Its names change between versions, so these kernels are imported at the first call that can use
them, and without them the Triton scan runs.
"""

from __future__ import annotations

import functools

import torch
import triton

# Gluon is experimental: only versions tested against float64, for races and with both assemblers.
TRITON_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """True if the GPU and this Triton can run these kernels."""
    if device.type != "cuda" or not triton.__version__.startswith(TRITON_VERSIONS):
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from lasp.ops.triton.hopper import kernel  # noqa: F401  (needs this version's names)
    except (ImportError, AttributeError):
        return False
    return True
