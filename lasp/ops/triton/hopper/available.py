"""Where kernels written in Gluon run: Triton's lower-level language, used here for Hopper GPUs.

Its names change between versions (`language` has those of all supported ones), so these kernels are
imported at the first call that can use them, and without them the Triton scan runs.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
import triton

# Gluon is experimental: only versions with which a GPU was tested against float64.
TRITON_VERSIONS = ("3.6.", "3.7.", "3.9.")
# Versions with which every kernel compiles, without a GPU.
COMPILED_VERSIONS = (*TRITON_VERSIONS, "3.8.")


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """True if the GPU and this Triton can run these kernels; warns where only Triton cannot."""
    reason = why_not(device)
    if reason is not None and _is_hopper(device):
        _warn(reason)
    return reason is None


@functools.cache
def why_not(device: torch.device) -> str | None:
    """The reason why these kernels cannot run on the device; None if they can."""
    if not _is_hopper(device):
        return "it needs a GPU of compute capability 9.0 (H100, H200, GH200)"
    untested = not triton.__version__.startswith(TRITON_VERSIONS)
    if untested and os.environ.get("LASP_UNTESTED_TRITON") != "1":
        tested = ", ".join(version[:-1] for version in TRITON_VERSIONS)
        return (
            f"triton is {triton.__version__}, and it was tested on GPUs with {tested} only "
            "(LASP_UNTESTED_TRITON=1 runs it all the same)"
        )
    try:
        from lasp.ops.triton.hopper import kernel  # noqa: F401  (needs this version's names)
    except (ImportError, AttributeError) as error:
        return f"triton {triton.__version__} cannot import it ({type(error).__name__}: {error})"
    return None


def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _warn(reason: str) -> None:
    """Warn, the first time in this process."""
    warnings.warn(
        f"The Hopper scan cannot run: {reason}. The Triton scan takes its place, with the same "
        "results, but slower. See lasp.describe_kernels().",
        stacklevel=2,
    )
