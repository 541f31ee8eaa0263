"""The chained scan on Hopper GPUs: few heads and short sequences of 16-bit heads, in one launch.

Elsewhere one kernel makes the states of segments and others scan from them. Where the GPU is not
full, the time is not that of the bytes but that of the launches, of what waits for what in each,
and the host's: `scan_chained_kernel` does all at once, o in one launch and dq, dk and dv in
another. On an H200 in bfloat16, forward and backward, caches cold: 0.028 and 0.070 ms at
(1, 2048, 16, 128), otherwise 0.040 and 0.083; 0.022 and 0.025 at (1, 512, 16, 128), otherwise 0.020
and 0.042.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence

import torch
import triton

from lasp.ops.triton import plan as plans
from lasp.ops.triton.hopper import has_gluon
from lasp.ops.triton.launch import Bound
from lasp.ops.triton.tiles import Layout, layout, state_strides, strides

SEGMENT = 256
# Head dims are padded to this; those of 64 would be half of it.
DIM = 128
# With more, a program would add up less than 8 rows of states.
MAX_SEGMENTS = 16
# Values and bytes: heads, strides and addresses are multiples of it, for vector loads.
STEP = 16
# Of launches: they go on from a random one with 62 bits.
_numbers = itertools.count(2**61 + int.from_bytes(os.urandom(7), "little"))


def applies(a: torch.Tensor, x: torch.Tensor, offsets: tuple[int, ...] | None) -> bool:
    """Whether `launch` scans a, b [B, T, H, A] and x [B, T, H, X], by shape, dtype and device."""
    batch, seq_len, num_heads, key_dim = a.shape
    value_dim = x.shape[-1]
    return (
        a.is_cuda
        and offsets is None
        and a.dtype in (torch.bfloat16, torch.float16)
        and DIM // 2 < key_dim <= DIM
        and DIM // 2 < value_dim <= DIM
        and key_dim % STEP == 0
        and value_dim % STEP == 0
        and SEGMENT < seq_len <= SEGMENT * MAX_SEGMENTS
        and batch * num_heads * _num_segments(seq_len) <= plans.MULTIPROCESSORS
        # Always so, but for tests that want the kernels of large inputs.
        and not plans.is_large(batch * seq_len * num_heads, key_dim, value_dim)
        and has_gluon(a.device)
        and _num_multiprocessors(a.device) >= plans.MULTIPROCESSORS
    )


def launch(
    operands: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    log_decay: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
) -> None:
    """Write the contiguous results: y = scan(a, b, x), where this applies.

    Or of q, k, v, do, with heads of one size, (dq, dk, dv): dq = scan(do, v, k, initial_state), in
    reverse dv = scan(k, q, do) and dk = scan(v, do, q).
    """
    assert initial_state is None or initial_state.shape == _state_shape(operands)
    operands = [t if _is_aligned(t) else _copied(t) for t in operands]
    programs, bound = _bind(tuple(layout(t) for t in operands), layout(initial_state), float(scale))
    like = operands[0]
    local = torch.empty(programs, DIM, DIM, dtype=torch.float32, device=like.device)
    entering = torch.empty(programs, DIM, DIM, dtype=like.dtype, device=like.device)
    flags = _make_flags(2 * programs, like.device)
    # What a scan alone lacks: do, dk and dv.
    q, k, v, do = (*operands, None)[:4]
    o, dk, dv = (*results, None, None)[:3]
    tensors = (q, k, v, do, o, dk, dv, initial_state, local, entering, log_decay, flags)
    bound(programs, *tensors, leading=(next(_numbers),))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """Of this process's share of the GPU; programs that wait for each other need some to spare."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _state_shape(operands: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Of the state that enters: [B, H, A, X] of a, b, x or, where A is X, of q, k, v, do."""
    a, _, x, *_ = operands
    return (a.shape[0], *a.shape[2:], x.shape[-1])


def _num_segments(seq_len: int) -> int:
    """A power of two: the last ones may be empty, and few kernels serve all lengths."""
    return triton.next_power_of_2(triton.cdiv(seq_len, SEGMENT))


def _copied(operand: torch.Tensor) -> torch.Tensor:
    return operand.clone(memory_format=torch.contiguous_format)


def _is_aligned(operand: torch.Tensor) -> bool:
    return operand.data_ptr() % STEP == 0 and _is_divisible(layout(operand))


@functools.lru_cache(maxsize=1024)
def _is_divisible(operand: Layout) -> bool:
    steps = strides(operand, (0, 1, 2))
    near = abs(steps[1]) * SEGMENT < 2**31
    return near and operand[1][-1] == 1 and all(step % STEP == 0 for step in steps)


def _make_flags(count: int, device: torch.device) -> torch.Tensor:
    """Memory for a launch's flags, which holds anything but the launch's number.

    Other launches had other numbers, and all are larger than what integers in memory count. But a
    graph's launch has the same number in every replay: its flags are cleared in each.
    """
    make = torch.zeros if torch.cuda.is_current_stream_capturing() else torch.empty
    return make(count, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=1024)
def _bind(operands: tuple[Layout, ...], initial: Layout | None, scale: float) -> tuple[int, Bound]:
    """How many programs run, and the kernel without its tensors."""
    q, _, v, *do = operands
    (batch, seq_len, num_heads, key_dim), *_ = q
    num_segments = _num_segments(seq_len)
    steps = [strides(operand, (0, 1, 2)) for operand in operands]
    numbers = (
        *itertools.chain(*steps),
        *((0, 0, 0) if not do else ()),
        *state_strides(initial),
        scale,
        seq_len,
        num_heads,
    )
    constants = dict(
        A=key_dim,
        X=v[0][-1],
        D=DIM,
        SEGMENT=SEGMENT,
        SEGMENTS=num_segments,
        HAS_INITIAL=initial is not None,
        GRADIENTS=bool(do),
    )
    bound = Bound(_kernel(), numbers, constants, num_warps=8)
    return (3 if do else 1) * batch * num_heads * num_segments, bound


def _kernel() -> object:
    from lasp.ops.triton.scan_chained_kernel import scan_chained_kernel

    return scan_chained_kernel
