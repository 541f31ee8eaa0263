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
from lasp.ops.triton.plan import Plan
from lasp.ops.triton.tiles import state_strides

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
        # Launches cost the CPU about 45 us more than Triton's, four descriptors each. Fewer rows
        # take the GPU about as long, so that a model would wait for the CPU.
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
    gluon = _gluon(a.device)
    assert gluon is not None and y.is_contiguous()
    _, seq_len, num_heads, key_dim = a.shape
    value_dim = x.shape[-1]
    grid = (plan.num_segments * num_heads * triton.cdiv(value_dim, 2 * VALUE_BLOCK),)
    gluon.kernel[grid](
        _descriptor(gluon, a, KEY_BLOCK),
        _descriptor(gluon, b, KEY_BLOCK),
        _descriptor(gluon, x, VALUE_BLOCK),
        _descriptor(gluon, y, VALUE_BLOCK),
        y,
        initial_state,
        segment_states,
        log_decay,
        table,
        *state_strides(initial_state),
        *state_strides(segment_states),
        float(scale),
        seq_len,
        plan.segments_per_row,
        plan.segment_length,
        num_heads,
        A=key_dim,
        X=value_dim,
        BA=KEY_BLOCK,
        BX=VALUE_BLOCK,
        BC=CHUNK,
        STAGES=STAGES,
        REVERSE=reverse,
        PACKED=plan.packed,
        HAS_INITIAL=initial_state is not None,
        HAS_SEGMENT=segment_states is not None,
        REGISTERS=REGISTERS,
        num_warps=4,
    )


def _copyable(operand: torch.Tensor) -> bool:
    """Whether the copy engine can fetch tiles of `operand` [B, T, H, X]."""
    size = operand.element_size()
    return (
        operand.stride(-1) == 1
        and operand.shape[-1] * size % STEP == 0
        and operand.data_ptr() % STEP == 0
        and all(
            0 < stride * size < MAX_STRIDE and stride * size % STEP == 0
            for length, stride in zip(operand.shape[:3], operand.stride()[:3], strict=True)
            if length > 1
        )
    )


def _descriptor(gluon: SimpleNamespace, tensor: torch.Tensor, columns: int) -> object:
    """Describe tiles of a chunk's rows and `columns` columns of `tensor` [B, T, H, X]."""
    # PyTorch leaves arbitrary strides on dims of size 1: unused, but the copy engine checks them.
    steps = [
        stride if length > 1 else STEP
        for length, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    ]
    return gluon.descriptor(
        tensor, list(tensor.shape), [*steps, 1], *gluon.tile(tensor.dtype, columns)
    )


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
