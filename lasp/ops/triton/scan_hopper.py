"""The scan on Hopper GPUs for 16-bit heads of 65 to 256: the launch of `scan_hopper_kernel`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton

from lasp.ops.triton import plan as plans
from lasp.ops.triton.hopper import has_gluon
from lasp.ops.triton.launch import Bound
from lasp.ops.triton.plan import Plan
from lasp.ops.triton.tiles import Layout, layout, state_strides

CHUNK = 64
# Columns of a state's block, and of one copy of y.
VALUE_BLOCK = 64
STAGES = 2


class Cut(NamedTuple):
    """How much a program does, by its two warpgroups that carry states, and with what registers.

    Each carries `columns` blocks of 64 value columns, over `keys` keys, and multiplies `part` keys
    at a time. `registers` are per thread of the second one, of the warpgroup that makes P, and of
    the producer; the first one gets the rest of 512. Only the prologue may spill: a pair of scans
    took 1.53 ms instead of 0.96 where the P warpgroup spilled 25 registers in every chunk.
    """

    keys: int
    columns: int
    part: int
    registers: tuple[int, int, int]


NARROW = Cut(128, 1, 64, (168, 128, 24))
# A state of 128 registers per thread. With fewer than 208 registers products wait for each other.
WIDE_KEYS = Cut(256, 1, 64, (208, 72, 24))
WIDE_VALUES = Cut(128, 2, 64, (208, 72, 24))
# What the copy engine can address: 16-byte steps below 2**40 bytes and 32-bit coordinates.
STEP = 16
MAX_STRIDE = 2**40
MAX_TOKENS = 2**31 - 2 * CHUNK


def supported(operands: Sequence[torch.Tensor], plan: Plan) -> bool:
    """Whether `launch` takes these operands, and is the faster kernel.

    a, b [B, T, H, A] and x [B, T, H, X] for one scan; with c [B, T, H, X] for a pair of them.
    """
    a, _, x = operands[:3]
    batch, seq_len, num_heads, key_dim = a.shape
    value_dim = x.shape[-1]
    # A pair has both head dims as keys.
    most_keys = WIDE_KEYS.keys if len(operands) == 3 else WIDE_VALUES.keys
    return (
        a.is_cuda
        and not plan.folded
        and a.dtype in (torch.bfloat16, torch.float16)
        and 64 < key_dim <= most_keys
        and value_dim > 64
        and (len(operands) == 3 or value_dim <= most_keys)
        and seq_len <= MAX_TOKENS
        and plans.is_large(batch * seq_len * num_heads, key_dim, value_dim)
        and all(_copyable(operand) for operand in operands)
        and _gluon(a.device) is not None
    )


def launch(
    operands: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    log_decay: torch.Tensor,
    plan: Plan,
    table: torch.Tensor | None,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
    segment_states: torch.Tensor | None,
    reverse: bool,
) -> None:
    """Write the contiguous results: what `scan` does once it has its plan, on `supported`.

    y = scan(a, b, x), and z = scan(c, x, b) with the same states transposed if there is a c.
    """
    assert all(result.is_contiguous() for result in results)
    a, b, x, c = (*operands, None)[:4]
    y, z = (*results, None)[:2]
    programs, bound, columns = _bind(
        a.device,
        layout(a),
        x.shape[-1],
        layout(initial_state),
        layout(segment_states),
        float(scale),
        (plan.num_segments, plan.segments_per_row, plan.segment_length),
        reverse,
        plan.packed,
        c is not None,
    )
    bound(
        programs,
        y,
        z,
        initial_state,
        segment_states,
        log_decay,
        table,
        leading=[
            None if t is None else _descriptor(t, n)
            for t, n in zip((a, b, x, c, y, z), columns, strict=True)
        ],
    )


@functools.lru_cache(maxsize=1024)
def _bind(
    device: torch.device,
    a: Layout,
    value_dim: int,
    initial: Layout | None,
    segment: Layout | None,
    scale: float,
    segments: tuple[int, int, int],
    reverse: bool,
    packed: bool,
    pair: bool,
) -> tuple[int, Bound, tuple[int, ...]]:
    """How many programs run, the kernel without its tensors, and the columns of their tiles."""
    gluon = _gluon(device)
    assert gluon is not None
    (_, seq_len, num_heads, key_dim), *_ = a
    num_segments, segments_per_row, segment_length = segments
    cut = choose_cut(key_dim, value_dim, pair)
    # The two warpgroups of a pair carry the same columns, of y and of z.
    width = cut.columns * VALUE_BLOCK * (1 if pair else 2)
    numbers = (
        *state_strides(initial),
        *state_strides(segment),
        scale,
        seq_len,
        segments_per_row,
        segment_length,
        num_heads,
    )
    constants = dict(
        A=key_dim,
        X=value_dim,
        BA=cut.keys,
        BX=VALUE_BLOCK,
        BC=CHUNK,
        COLUMNS=cut.columns,
        PART=cut.part,
        STAGES=STAGES,
        PAIR=pair,
        REVERSE=reverse,
        PACKED=packed,
        HAS_INITIAL=initial is not None,
        HAS_SEGMENT=segment is not None,
        REGISTERS=cut.registers,
    )
    columns = (cut.keys, cut.keys, width, cut.keys, VALUE_BLOCK, VALUE_BLOCK)
    programs = num_segments * num_heads * triton.cdiv(value_dim, width)
    return programs, Bound(gluon.kernel, numbers, constants, num_warps=4), columns


def choose_cut(key_dim: int, value_dim: int, pair: bool) -> Cut:
    """Cut of a scan with these head dims, or of a pair of scans."""
    if key_dim > NARROW.keys:
        return WIDE_KEYS
    return WIDE_VALUES if pair or value_dim > 2 * VALUE_BLOCK else NARROW


def _copyable(operand: torch.Tensor) -> bool:
    """Whether the copy engine can fetch tiles of `operand` [B, T, H, X]."""
    aligned = operand.data_ptr() % STEP == 0
    return aligned and _copyable_layout(layout(operand))


@functools.lru_cache(maxsize=1024)
def _copyable_layout(operand: Layout) -> bool:
    shape, strides, dtype = operand
    size = dtype.itemsize
    return (
        strides[-1] == 1
        and shape[-1] * size % STEP == 0
        and all(
            0 < stride * size < MAX_STRIDE and stride * size % STEP == 0
            for length, stride in zip(shape[:3], strides[:3], strict=True)
            if length > 1
        )
    )


def _descriptor(tensor: torch.Tensor, columns: int) -> object:
    """Describe tiles of a chunk's rows and `columns` columns of `tensor` [B, T, H, X]."""
    known = _known_descriptor(tensor.device, layout(tensor), columns)
    # A copy of what was checked once per layout: to check again costs 10 us.
    descriptor = object.__new__(type(known))
    descriptor.__dict__.update(known.__dict__, base=tensor)
    return descriptor


@functools.lru_cache(maxsize=1024)
def _known_descriptor(device: torch.device, tensor: Layout, columns: int) -> object:
    gluon = _gluon(device)
    shape, strides, dtype = tensor
    # PyTorch leaves arbitrary strides on dims of size 1: unused, but the copy engine checks them.
    steps = [
        stride if length > 1 else STEP
        for length, stride in zip(shape[:3], strides[:3], strict=True)
    ]
    # Stands for any tensor of this layout, whose address `supported` looks at.
    base = torch.empty(0, dtype=dtype, device=device)
    return gluon.descriptor(base, list(shape), [*steps, 1], *gluon.tile(dtype, columns))


@functools.cache
def _gluon(device: torch.device) -> SimpleNamespace | None:
    """What the launch needs of Gluon; None where the GPU or this Triton cannot do it."""
    if not has_gluon(device):
        return None
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from lasp.ops.triton.scan_hopper_kernel import scan_hopper_kernel

    @functools.cache
    def tile(dtype: torch.dtype, columns: int) -> tuple:
        block = [1, CHUNK, 1, columns]
        element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
        return block, gl.NVMMASharedLayout.get_default_for(block, element)

    return SimpleNamespace(kernel=scan_hopper_kernel, descriptor=TensorDescriptor, tile=tile)
