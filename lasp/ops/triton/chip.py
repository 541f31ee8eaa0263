"""What `launch_config` asks of a GPU: how many multiprocessors, and how they multiply tiles."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch


class Chip(NamedTuple):
    """A kind of GPU.

    Attributes:
        multiprocessors: how many it has.
        products: its instructions for products of 16-bit tiles: "wgmma" on Hopper (sm_90),
            "tcgen05" on Blackwell in data centers (sm_100, sm_103), "mma" on all others.
    """

    multiprocessors: int
    products: Literal["mma", "wgmma", "tcgen05"]


# The GPU that the launch constants were measured on.
H200 = Chip(132, "wgmma")
# The first major compute capability that multiplies bfloat16, and that Triton supports.
MIN_CAPABILITY = 8


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a GPU; without one, as in the interpreter or a simulated run, an H200.

    Raises:
        ValueError: the GPU is older than any that the kernels are compiled for.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return H200
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Chip(properties.multi_processor_count, "mma")
    if properties.major < MIN_CAPABILITY:
        raise ValueError(
            f"{device} is a {properties.name} of compute capability "
            f"{properties.major}.{properties.minor}; the Triton kernels need "
            f"{MIN_CAPABILITY}.0 or newer (A100, A10, RTX 30 series and later). Use such a GPU, "
            "or tensors on the CPU."
        )
    products = {9: "wgmma", 10: "tcgen05"}.get(properties.major, "mma")
    return Chip(properties.multi_processor_count, products)
