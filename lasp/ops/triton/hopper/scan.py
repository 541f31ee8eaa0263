"""The launch of the Hopper scan: 16-bit heads of 65 to 256, large inputs (see `kernel`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import triton

from lasp.ops.triton.launch_config import (
    COPY_STEP,
    HOPPER_CHUNK,
    HOPPER_STAGES,
    HOPPER_VALUE_BLOCK,
    MAX_COPY_STRIDE,
    HopperTiles,
)
from lasp.ops.triton.launcher import CachedLaunch, TensorSpec, spec, state_strides
from lasp.ops.triton.segments import Segments


def prepare(
    operands: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor | None],
    segments: Segments,
    tiles: HopperTiles,
    *,
    scale: float,
    reverse: bool,
) -> tuple[CachedLaunch, tuple, list]:
    """(launch, number of programs and tensors, descriptors) for y = scan(a, b, x); or, of operands
    a, b, x, c, for y and z = scan(c, x, b) with the same states transposed.

    The operands are `copyable`, the results contiguous. others: initial state, segment states, log
    decay, table.
    """
    pair = len(results) == 2
    a, b, x, c = operands if pair else (*operands, None)
    y, z = results if pair else (*results, None)
    assert y.is_contiguous() and (z is None or z.is_contiguous())
    specs = tuple(spec(tensor) for tensor in (a, x, *others[:2]))
    key = (*specs, a.device, pair)
    programs, cached, columns = _scan_launch(key, segments.key, tiles, scale, reverse)
    descriptors = [
        None if tensor is None else _descriptor(tensor, n)
        for tensor, n in zip((a, b, x, c, y, z), columns, strict=True)
    ]
    return cached, (programs, y, z, *others), descriptors


@functools.lru_cache(maxsize=1024)
def _scan_launch(
    key: tuple, segments: tuple, tiles: HopperTiles, scale: float, reverse: bool
) -> tuple[int, CachedLaunch, tuple[int, ...]]:
    """How many programs run, the launch, and the columns of the operands' and results' tiles.

    key: specs of a, x and the states, the device, and whether there are two results; `segments` is
    `Segments.key`.
    """
    a, x, initial, segment, device, pair = key
    (_, seq_len, num_heads, key_dim), *_ = a
    value_dim = x[0][-1]
    _, num_segments, per_row, length, _, packed = segments
    # The two warpgroups of a pair hold the same columns, of y and of z.
    width = tiles.blocks * HOPPER_VALUE_BLOCK * (1 if pair else 2)
    numbers = (
        *state_strides(initial),
        *state_strides(segment),
        scale,
        seq_len,
        per_row,
        length,
        num_heads,
    )
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
        PACKED=packed,
        HAS_INITIAL=initial is not None,
        HAS_SEGMENT=segment is not None,
        REGISTERS=tiles.registers,
    )
    columns = (tiles.keys, tiles.keys, width, tiles.keys, HOPPER_VALUE_BLOCK, HOPPER_VALUE_BLOCK)
    programs = num_segments * num_heads * triton.cdiv(value_dim, width)
    return programs, CachedLaunch(_gluon(device).kernel, numbers, constants, num_warps=4), columns


def copyable(operand: torch.Tensor) -> bool:
    """True if the copy engine can fetch tiles of `operand` [B, T, H, X]."""
    return operand.data_ptr() % COPY_STEP == 0 and _is_copyable(spec(operand))


@functools.lru_cache(maxsize=1024)
def _is_copyable(operand: TensorSpec) -> bool:
    shape, strides, dtype = operand
    size = dtype.itemsize
    return (
        strides[-1] == 1
        and shape[-1] * size % COPY_STEP == 0
        and all(
            0 < stride * size < MAX_COPY_STRIDE and stride * size % COPY_STEP == 0
            for length, stride in zip(shape[:3], strides[:3], strict=True)
            if length > 1
        )
    )


def _descriptor(tensor: torch.Tensor, columns: int) -> object:
    """Describe tiles of a chunk's rows and `columns` columns of `tensor` [B, T, H, X]."""
    template = _descriptor_template(tensor.device, spec(tensor), columns)
    # A copy of what was checked once per spec: checking again would cost 10 us.
    descriptor = object.__new__(type(template))
    descriptor.__dict__.update(template.__dict__, base=tensor)
    return descriptor


@functools.lru_cache(maxsize=1024)
def _descriptor_template(device: torch.device, tensor: TensorSpec, columns: int) -> object:
    shape, strides, dtype = tensor
    # PyTorch leaves arbitrary strides on dims of size 1: unused, but the copy engine checks them.
    steps = [
        stride if length > 1 else COPY_STEP
        for length, stride in zip(shape[:3], strides[:3], strict=True)
    ]
    # Stands for any tensor of this spec, whose address `copyable` checks.
    base = torch.empty(0, dtype=dtype, device=device)
    language = _gluon(device)
    return language.descriptor(base, list(shape), [*steps, 1], *language.tile(dtype, columns))


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
