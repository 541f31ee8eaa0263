"""Launches that cost the host little, and what every launch checks and asks of its tensors.

`kernel[grid](...)` looks at each of some forty arguments on every call, to find the compiled
variant they need: about 55 us. All but the addresses follow from shapes and strides, which repeat
from call to call, so the variant is looked up once per shape and then launched directly
(`lasp.ops.triton.driver`).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import triton

from lasp import replay
from lasp.ops.host_values import filled
from lasp.ops.triton.driver import DirectLaunch
from lasp.ops.triton.launch_config import (
    COPY_STEP,
    DTYPES,
    MAX_CHUNK,
    MAX_COPY_STRIDE,
    MAX_HEAD_DIM,
)

_runtime = triton.knobs.runtime


class CachedLaunch:
    """A kernel with all its arguments fixed but the first ones, which are tensors.

    A variant is compiled for `numbers`, `constants`, the tensors' dtypes and which of them are
    None: a `CachedLaunch` is made for one set of these. It is also compiled for whether each
    address is a multiple of 16 bytes, which is checked on every call. The first call of a variant
    is the plain `kernel[grid](...)`, all later ones go to the driver directly, unless this Triton,
    the device or a hook requires the plain launch.

    Args:
        kernel: takes tensors, numbers and constants, in this order.
        numbers, constants: its arguments after the tensors.
        descriptors: make TMA descriptors of as many first tensors, None for None.
        options: of the plain launch, such as num_warps.
    """

    def __init__(
        self,
        kernel: Any,
        numbers: Iterable[int | float],
        constants: dict,
        descriptors: Sequence[Callable[[torch.Tensor], Any] | None] = (),
        **options,
    ) -> None:
        self._kernel = kernel
        self._numbers = tuple(numbers)
        # What all versions do by default up to 3.9, which warns that the next one will not.
        self._named = {"enable_fp_fusion": True} | constants | options
        self._descriptors = tuple(descriptors)
        # Not in the interpreter, nor on AMD GPUs: there a variant also depends on tensor sizes.
        jit = isinstance(kernel, triton.runtime.jit.JITFunction)
        self._direct = jit and torch.version.hip is None
        self._variants: dict[Hashable, DirectLaunch | None] = {}

    def __call__(self, programs: int, *tensors: torch.Tensor | None) -> None:
        """Run `programs` programs on the current device, the first tensor's, and current stream."""
        if not self._direct or has_hooks() or self._kernel.pre_run_hooks:
            replay.refuse()
            self._launch(programs, tensors)
            return
        device = tensors[0].get_device()
        stream = current_stream(device)
        replay.note_launch(self.direct, programs, stream, tensors)
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        odd = functools.reduce(operator.or_, addresses) % 16
        # Nearly always all are aligned.
        key = (device, *[address % 16 == 0 for address in addresses]) if odd else device
        if key not in self._variants:
            self._variants[key] = self._first_launch(programs, tensors)
            return
        direct = self._variants[key]
        if direct is None:
            self._launch(programs, tensors)
        else:
            direct(programs, stream, addresses)

    def direct(self, device: int) -> DirectLaunch | None:
        """The launch by the driver for aligned addresses; None if there is none, or not yet."""
        return self._variants.get(device)

    def _first_launch(self, programs: int, tensors: tuple) -> DirectLaunch | None:
        compiled = self._launch(programs, tensors)
        try:
            described = self._describe(tensors)
            return DirectLaunch(compiled, tensors, described, self._numbers)
        except (AttributeError, LookupError):
            # A Triton whose compiled kernels have other attributes is slower, not broken.
            return None

    def _launch(self, programs: int, tensors: tuple) -> Any:
        arguments = (*self._describe(tensors), *tensors[len(self._descriptors) :])
        return self._kernel[(programs,)](*arguments, *self._numbers, **self._named)

    def _describe(self, tensors: tuple) -> list:
        """The TMA descriptors of the first tensors."""
        pairs = zip(self._descriptors, tensors, strict=False)
        return [None if describe is None else describe(x) for describe, x in pairs]


def current_stream(device: int) -> int:
    """The handle of torch's current stream."""
    return _get_current_stream()(device)


@functools.cache
def _get_current_stream() -> Callable[[int], int]:
    return triton.runtime.driver.active.get_current_stream


_launches: dict[tuple, CachedLaunch] = {}
# Lengths that differ in every step must not fill the memory.
_MAX_LAUNCHES = 1024


def cached_launch(
    kernel: Any, numbers: tuple[int | float, ...], constants: dict, dtype: torch.dtype, **options
) -> CachedLaunch:
    """The `CachedLaunch` of these arguments; `dtype`: of the operands, which imply all others.

    Shared by calls that differ in their number of programs only, such as packed documents.
    """
    key = (id(kernel), numbers, *constants.items(), dtype, *options.items())
    launch = _launches.get(key)
    if launch is None:
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        launch = _launches[key] = CachedLaunch(kernel, numbers, constants, **options)
    return launch


def has_hooks() -> bool:
    """True if a profiler or another hook of Triton must see every launch."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    # A chain of hooks, or a single one in its place.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# A tensor's shape, strides and dtype: all that a launch depends on besides its address. A cache of
# launches without the dtype would run a float32 kernel on bfloat16 memory, which raises nothing,
# and reads and writes beyond its end.
TensorSpec: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def check_operands(operands: dict[str, TensorSpec]) -> None:
    """Raise ValueError for dtypes and head dimensions that the kernels do not support."""
    first_name, (*_, first_dtype) = next(iter(operands.items()))
    for name, (shape, _, dtype) in operands.items():
        if dtype not in DTYPES:
            raise ValueError(
                f"{name} has dtype {dtype}; the Triton kernels take torch.bfloat16, "
                "torch.float16 or torch.float32. Cast it, or use the torch backend for float64."
            )
        if dtype != first_dtype:
            raise ValueError(
                f"{name} has dtype {dtype} but {first_name} has {first_dtype}; the Triton "
                "kernels take operands of one dtype. Cast them to the same one."
            )
        if not 1 <= shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} has head dimension {shape[-1]}; the Triton kernels take 1 to "
                f"{MAX_HEAD_DIM}. Use more heads of a smaller dimension."
            )


def is_addressable(operand: TensorSpec) -> bool:
    """True if the kernels can address an operand [B, T, H, X]; if not, it must be copied.

    They need a unit last stride (the gradient of a sum arrives with stride 0) and a token stride
    small enough that a chunk spans fewer than 2**31 elements.
    """
    _, (_, token, _, last), _ = operand
    return last == 1 and abs(token) * MAX_CHUNK < 2**31


def addressable_spec(operand: TensorSpec) -> TensorSpec:
    """The spec of an operand after it was copied if it must be."""
    return operand if is_addressable(operand) else contiguous_spec(operand)


def contiguous_spec(tensor: TensorSpec) -> TensorSpec:
    """The spec of a contiguous copy of [B, T, H, X]."""
    shape, _, dtype = tensor
    _, T, H, X = shape
    return shape, (T * H * X, H * X, X, 1), dtype


def is_copyable(operand: TensorSpec) -> bool:
    """True if Hopper's TMA unit can fetch tiles of an operand [B, T, H, X]."""
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


def strides(spec: TensorSpec, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements, with 0 for dims of size 1.

    PyTorch leaves arbitrary strides on dims of size 1. They are never used, but an odd one would
    make Triton compile a variant without vector loads.
    """
    shape, stride, _ = spec
    return tuple(stride[dim] if shape[dim] > 1 else 0 for dim in dims)


def state_numbers(states, scale, segments, seq_len, num_heads) -> tuple[int | float, ...]:
    """The numbers that both scans take after the strides of their operands: the strides of initial
    and segment states [S, H, D, E], zeros where there are none, the scale and the segments."""
    numbers = scale, seq_len, segments.per_row, segments.length, num_heads
    return (*strides_or_zeros(states, (0, 1, 2, 3)), *numbers)


def strides_or_zeros(tensors: Iterable[TensorSpec | None], dims: tuple[int, ...]) -> list[int]:
    """The strides of all tensors along these dims, one after the other; zeros for None."""
    each = ((0,) * len(dims) if spec is None else strides(spec, dims) for spec in tensors)
    return list(itertools.chain.from_iterable(each))


def is_by_token(log_decay: torch.Tensor | None) -> bool:
    """True for the cumulative sums of a decay per token."""
    return log_decay is not None and log_decay.dim() == 3


def decay_or_zeros(
    log_decay: torch.Tensor | None, num_heads: int, device: torch.device
) -> torch.Tensor:
    """Return `log_decay` [H] contiguous; zeros for None, which give the same bits.

    The cumulative sums of a decay per token (`decay.prepare_decay`) are returned as they are.
    """
    if log_decay is None:
        return filled(0.0, num_heads, torch.float32, device)
    if is_by_token(log_decay):
        return log_decay
    assert log_decay.dtype == torch.float32 and log_decay.shape == (num_heads,), log_decay.shape
    return log_decay.contiguous()
