"""What every kernel here shares: where a segment lies, and how a tensor is handed to a kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
# Rows of a chunk are addressed with 32-bit offsets; no kernel uses chunks longer than this.
MAX_CHUNK = 64
_NO_CONTEXT = nullcontext()


@triton.jit
def locate_segment(
    p_table,
    i_s,
    T,
    segments_per_row,
    segment_length,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Return a segment's (document, batch row, first token, tokens, tokens outside, slot).

    `outside` counts the document's tokens on the side that the scan comes from; where there are
    any, `slot` is the row of the segment states that enters. Dense documents are batch rows and
    need no table: their segments follow from arithmetic.
    """
    if PACKED:
        p_row = p_table + i_s.to(tl.int64) * 5
        i_n = tl.load(p_row)
        start = tl.load(p_row + 1)
        document_start = tl.load(p_row + 2)
        document_stop = tl.load(p_row + 3)
        slot = tl.load(p_row + 4)
        i_b = i_n * 0
    else:
        i_n = (i_s // segments_per_row).to(tl.int64)
        start = (i_s % segments_per_row).to(tl.int64) * segment_length
        document_start = start * 0
        document_stop = document_start + T
        i_b = i_n
        slot = i_n * (segments_per_row - 1) + i_s % segments_per_row
    # Chunk arithmetic is 32-bit: a segment has fewer than 2**31 tokens, the whole tensor need not.
    count = tl.minimum(document_stop - start, segment_length).to(tl.int32)
    # Nothing enters a document's first segment (reverse: last), so the others alone have slots.
    if REVERSE:
        outside = document_stop - start - count
    else:
        outside = start - document_start
        slot -= 1
    return i_n, i_b, start, count, outside, slot


def check_operands(**operands: torch.Tensor) -> None:
    """Refuse dtypes and head dimensions that the kernels do not have; names the operand seen."""
    first_name, first = next(iter(operands.items()))
    for name, operand in operands.items():
        if operand.dtype not in DTYPES:
            raise ValueError(
                f"{name} has dtype {operand.dtype}; the Triton kernels take torch.bfloat16, "
                "torch.float16 or torch.float32. Cast it, or use the torch backend for float64."
            )
        if operand.dtype != first.dtype:
            raise ValueError(
                f"{name} has dtype {operand.dtype} but {first_name} has {first.dtype}; the Triton "
                "kernels take operands of one dtype. Cast them to the same one."
            )
        if not 1 <= operand.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} has head dimension {operand.shape[-1]}; the Triton kernels take 1 to "
                f"{MAX_HEAD_DIM}. Use more heads of a smaller dimension."
            )


def addressable(operand: torch.Tensor) -> torch.Tensor:
    """Return `operand` [B, T, H, X] itself where the kernels can address it, else a copy.

    They need a unit last stride (the gradient of a sum arrives with stride 0) and a token stride
    small enough that a chunk spans fewer than 2**31 elements.
    """
    _, token, _, last = operand.stride()
    if last != 1 or abs(token) * MAX_CHUNK >= 2**31:
        return operand.contiguous()
    return operand


# A tensor's shape, strides and dtype: all that a launch depends on besides its address. With the
# dtype, because nobody who remembers launches may forget it: a float32 kernel on bfloat16 memory
# raises nothing, and reads and writes beyond its end.
Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def layout(tensor: torch.Tensor | None) -> Layout | None:
    """The layout of `tensor`, to remember launches by; None for None."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def strides(layout: Layout, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements, with 0 for dims of size 1.

    PyTorch leaves arbitrary strides on dims of size 1. They are never used, but an odd one would
    make Triton compile a variant without vector loads.
    """
    shape, stride, _ = layout
    return tuple(stride[dim] if shape[dim] > 1 else 0 for dim in dims)


def state_strides(states: Layout | None) -> tuple[int, ...]:
    """Strides of [S, H, D, E] states for a kernel; zeros where there are none."""
    return (0,) * 4 if states is None else strides(states, (0, 1, 2, 3))


def decay_or_zeros(
    log_decay: torch.Tensor | None, num_heads: int, device: torch.device
) -> torch.Tensor:
    """Return `log_decay` [H] contiguous; zeros for None, so that no decay gives the same bits."""
    if log_decay is None:
        return torch.zeros(num_heads, dtype=torch.float32, device=device)
    assert log_decay.dtype == torch.float32 and log_decay.shape == (num_heads,), log_decay.shape
    return log_decay.contiguous()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make that the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(tensor.device)
