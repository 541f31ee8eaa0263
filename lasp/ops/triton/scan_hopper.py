"""The scan on Hopper GPUs for 16-bit heads of 65 to 128: `scan_hopper_kernel` and its launch.

The kernel is written in Gluon, the layer under Triton's language, whose names move between
versions: it is imported at the first call that can use it, and `scan` goes on without it otherwise.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import triton

from lasp.ops.triton import plan as plans
from lasp.ops.triton.launch import Bound
from lasp.ops.triton.plan import Plan
from lasp.ops.triton.tiles import Layout, layout, state_strides

CHUNK = 64
# Value columns of one warpgroup; a program has two. Keys are padded to one block of 128.
VALUE_BLOCK = 64
KEY_BLOCK = 128
STAGES = 2
# Per thread of the second state's warpgroup, of the one that makes P, and of the producer; the
# first state's gets the rest, 192. With 152 for the second state, some variants spill.
REGISTERS = (168, 128, 24)
# Gluon is experimental: only where it was tested against float64, for races and both assemblers.
TRITON_VERSIONS = ("3.6.",)
# What the copy engine can address: 16-byte steps below 2**40 bytes and 32-bit coordinates.
STEP = 16
MAX_STRIDE = 2**40
MAX_TOKENS = 2**31 - 2 * CHUNK


def supported(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, plan: Plan) -> bool:
    """Whether `launch` takes a, b [B, T, H, A] and x [B, T, H, X], and is the faster kernel."""
    batch, seq_len, num_heads, key_dim = a.shape
    value_dim = x.shape[-1]
    return (
        a.is_cuda
        and not plan.folded
        and a.dtype in (torch.bfloat16, torch.float16)
        and 64 < key_dim <= KEY_BLOCK
        and value_dim > 64
        and seq_len <= MAX_TOKENS
        and batch * seq_len * num_heads >= plans.LARGE_ROWS
        and all(_copyable(operand) for operand in (a, b, x))
        and _gluon(a.device) is not None
    )


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    log_decay: torch.Tensor,
    plan: Plan,
    table: torch.Tensor | None,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
    segment_states: torch.Tensor | None,
    reverse: bool,
) -> None:
    """Write y [B, T, H, X], contiguous: what `scan` does once it has its plan, on `supported`."""
    assert y.is_contiguous()
    programs, bound, columns = _bind(
        a.device,
        a.dtype,
        layout(a),
        x.shape[-1],
        layout(initial_state),
        layout(segment_states),
        float(scale),
        (plan.num_segments, plan.segments_per_row, plan.segment_length),
        reverse,
        plan.packed,
    )
    bound(
        programs,
        y,
        initial_state,
        segment_states,
        log_decay,
        table,
        descriptors=[_descriptor(t, n) for t, n in zip((a, b, x, y), columns, strict=True)],
    )


@functools.lru_cache(maxsize=1024)
def _bind(
    device: torch.device,
    dtype: torch.dtype,
    a: Layout,
    value_dim: int,
    initial: Layout | None,
    segment: Layout | None,
    scale: float,
    segments: tuple[int, int, int],
    reverse: bool,
    packed: bool,
) -> tuple[int, Bound, tuple[int, ...]]:
    """How many programs run, the kernel without its tensors, and the columns of their tiles."""
    gluon = _gluon(device)
    assert gluon is not None
    (_, seq_len, num_heads, key_dim), _ = a
    num_segments, segments_per_row, segment_length = segments
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
        BA=KEY_BLOCK,
        BX=VALUE_BLOCK,
        BC=CHUNK,
        STAGES=STAGES,
        REVERSE=reverse,
        PACKED=packed,
        HAS_INITIAL=initial is not None,
        HAS_SEGMENT=segment is not None,
        REGISTERS=REGISTERS,
    )
    columns = (KEY_BLOCK, KEY_BLOCK, VALUE_BLOCK, VALUE_BLOCK)
    programs = num_segments * num_heads * triton.cdiv(value_dim, 2 * VALUE_BLOCK)
    return programs, Bound(gluon.kernel, numbers, constants, num_warps=4), columns


def _copyable(operand: torch.Tensor) -> bool:
    """Whether the copy engine can fetch tiles of `operand` [B, T, H, X]."""
    aligned = operand.data_ptr() % STEP == 0
    return aligned and _copyable_layout(layout(operand), operand.element_size())


@functools.lru_cache(maxsize=1024)
def _copyable_layout(operand: Layout, size: int) -> bool:
    shape, strides = operand
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
    known = _known_descriptor(tensor.device, tensor.dtype, layout(tensor), columns)
    # A copy of what was checked once per layout: to check again costs 10 us.
    descriptor = object.__new__(type(known))
    descriptor.__dict__.update(known.__dict__, base=tensor)
    return descriptor


@functools.lru_cache(maxsize=1024)
def _known_descriptor(
    device: torch.device, dtype: torch.dtype, tensor: Layout, columns: int
) -> object:
    gluon = _gluon(device)
    shape, strides = tensor
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
    if not triton.__version__.startswith(TRITON_VERSIONS):
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from lasp.ops.triton.scan_hopper_kernel import scan_hopper_kernel
    except (ImportError, AttributeError):
        return None

    @functools.cache
    def tile(dtype: torch.dtype, columns: int) -> tuple:
        block = [1, CHUNK, 1, columns]
        element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
        return block, gl.NVMMASharedLayout.get_default_for(block, element)

    return SimpleNamespace(kernel=scan_hopper_kernel, descriptor=TensorDescriptor, tile=tile)
