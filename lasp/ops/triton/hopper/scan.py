"""The launch of the Hopper scan: 16-bit heads of 65 to 256, large inputs (see `kernel`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import triton

from lasp.ops.triton.launch_config import (
    COPY_STEP,
    HOPPER_CHUNK,
    HOPPER_STAGES,
    HOPPER_VALUE_BLOCK,
    HopperTiles,
)
from lasp.ops.triton.launcher import (
    CachedLaunch,
    TensorSpec,
    cached_launch,
    contiguous_spec,
    state_numbers,
)
from lasp.ops.triton.segments import Segments


def prepare(
    operands: Sequence[TensorSpec],
    states: tuple[TensorSpec | None, TensorSpec | None],
    segments: Segments,
    tiles: HopperTiles,
    *,
    scale: float,
    reverse: bool,
    kind: tuple[bool, TensorSpec | None],
    device: torch.device,
) -> tuple[int, CachedLaunch, int]:
    """(number of programs, launch, blocks of columns of dots).

    The launch takes operands and results as descriptors first.

    Of operands a, b, x for y = scan(a, b, x); or of a, b, x, c for y and z = scan(c, x, b) with the
    same states transposed. The operands are `is_copyable`, the results contiguous.
    """
    pair = len(operands) == 4
    by_token, dot_with = kind
    a, b, x, c = operands if pair else (*operands, dot_with)
    initial, segment = states
    (_, seq_len, num_heads, key_dim), _, dtype = a
    value_dim = x[0][-1]
    # The two warpgroups of a pair hold the same columns, of y and of z.
    width = tiles.blocks * HOPPER_VALUE_BLOCK * (1 if pair else 2)
    numbers = state_numbers(states, scale, segments, seq_len, num_heads)
    constants = dict(
        A=key_dim,
        X=value_dim,
        BA=tiles.keys,
        BX=HOPPER_VALUE_BLOCK,
        BC=HOPPER_CHUNK,
        BLOCKS=tiles.blocks,
        PART=tiles.part,
        STAGES=HOPPER_STAGES,
        PAIR=pair,
        REVERSE=reverse,
        PACKED=segments.packed,
        HAS_INITIAL=initial is not None,
        HAS_SEGMENT=segment is not None,
        BY_TOKEN=by_token,
        WITH_DOTS=dot_with is not None,
        REGISTERS=tiles.registers,
    )
    y, z = contiguous_spec(x), contiguous_spec(b) if pair else None
    of_c = tiles.keys if pair else width
    columns = (tiles.keys, tiles.keys, width, of_c, HOPPER_VALUE_BLOCK, HOPPER_VALUE_BLOCK)
    descriptors = tuple(
        None if tensor is None else _descriptor(tensor, n, device)
        for tensor, n in zip((a, b, x, c, y, z), columns, strict=True)
    )
    options = dict(descriptors=descriptors, num_warps=4)
    launch = cached_launch(_gluon(device).kernel, numbers, constants, dtype, **options)
    blocks = triton.cdiv(value_dim, width)
    num_programs = segments.num_segments * num_heads * blocks
    # Dots are sums over the 16 columns of y (of z in a pair) that a warp holds.
    columns_of_dots = tiles.keys if pair else blocks * width
    return num_programs, launch, columns_of_dots // 16


@functools.lru_cache(maxsize=1024)
def _descriptor(tensor: TensorSpec, columns: int, device: torch.device) -> Callable:
    """Describes tiles of a chunk's rows and `columns` columns of tensors [B, T, H, X]."""
    shape, strides, dtype = tensor
    # PyTorch leaves arbitrary strides on dims of size 1: unused, but TMA checks them.
    steps = [
        stride if length > 1 else COPY_STEP
        for length, stride in zip(shape[:3], strides[:3], strict=True)
    ]
    language = _gluon(device)

    def describe(tensor: torch.Tensor) -> object:
        tile = language.tile(dtype, columns)
        return language.descriptor(tensor, list(shape), [*steps, 1], *tile)

    return describe


@functools.cache
def _gluon(device: torch.device) -> SimpleNamespace:
    """What the launch needs of Gluon: the kernel, descriptors, and the layout of tiles."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from lasp.ops.triton.hopper.kernel import hopper_scan_kernel

    @functools.cache
    def tile(dtype: torch.dtype, columns: int) -> tuple:
        block = [1, HOPPER_CHUNK, 1, columns]
        element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
        return block, gl.NVMMASharedLayout.get_default_for(block, element)

    return SimpleNamespace(kernel=hopper_scan_kernel, descriptor=TensorDescriptor, tile=tile)
