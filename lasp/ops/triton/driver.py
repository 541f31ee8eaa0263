"""Launches of compiled kernels by the CUDA driver, with all arguments but the addresses prepared.

Triton's own launch converts some forty arguments and encodes every TMA descriptor anew in each
call. None of these change between calls with tensors of the same shapes: here they are written
once, and a call writes addresses only. What is used of Triton is a compiled kernel's handle,
signature and metadata.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch

# In a tensor map: the element types and the promotion of reads to lines of 128 bytes in L2.
_ELEMENT_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_L2_128_BYTES = 2
_MAP_BYTES = 128
_SCALARS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
_SCALARS |= {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
_INVALID_CONTEXT = 201


class DirectLaunch:
    """A compiled kernel whose arguments are all known but for the addresses of its tensors.

    Args:
        compiled: Triton's compiled kernel, loaded on the current device.
        tensors: of a call, None where the kernel takes none; all later calls pass tensors of the
            same specs, which are aligned alike.
        descriptors: the first arguments are TMA descriptors of as many first tensors.
        numbers: the arguments that follow the tensors.

    Raises:
        LookupError: the kernel needs what only Triton's launch provides.
    """

    def __init__(
        self,
        compiled: Any,
        tensors: Sequence[torch.Tensor | None],
        descriptors: Sequence[Any],
        numbers: Sequence[int | float],
    ) -> None:
        metadata = compiled.metadata
        _check_launch(metadata)
        self._compiled = compiled  # Unloads the kernel when it is freed.
        self._driver, self._run = _driver(), _driver().cuLaunchKernel
        self._addresses = struct.Struct(f"{len(tensors)}Q")
        parameters = _Parameters(self._addresses.size)
        types = list(compiled.src.signature.values())
        meta = list(getattr(metadata, "tensordesc_meta", None) or ())
        maps: list[tuple[int, int]] = []
        arguments = [*descriptors, *range(len(descriptors), len(tensors)), *numbers]
        for i, (kind, argument) in enumerate(zip(types, arguments, strict=False)):
            if kind == "constexpr":
                continue
            if i < len(descriptors):
                maps.append((i, parameters.add_map(argument, meta.pop(0))))
            elif i < len(tensors):
                parameters.add_address(8 * i)
            else:
                parameters.add(kind, argument)
        if any(kind != "constexpr" for kind in types[len(arguments) :]):
            raise LookupError("arguments behind the numbers")
        for _ in range(2):  # Global and profile scratch memory, of which there is none.
            parameters.add("u64", 0)
        parameters.check(compiled.function)
        self._buffer = parameters.buffer()
        self._pointers = parameters.pointers(self._buffer)
        base = ctypes.addressof(self._buffer)
        self._maps = [[i, ctypes.c_void_p(base + offset), None] for i, offset in maps]
        self._function = ctypes.c_void_p(compiled.function)
        self._one = ctypes.c_uint(1)
        self._threads = ctypes.c_uint(32 * metadata.num_warps)
        self._shared = ctypes.c_uint(metadata.shared)
        # Two threads, a forward's and a backward's, may share a launch.
        self._lock = threading.Lock()

    def __call__(self, programs: int, stream: int, addresses: Sequence[int]) -> None:
        """Launch on the current device. RuntimeError if the driver refuses."""
        with self._lock:
            self._addresses.pack_into(self._buffer, 0, *addresses)
            for each in self._maps:
                index, pointer, encoded = each
                if addresses[index] != encoded:
                    address = ctypes.c_void_p(addresses[index])
                    code = self._driver.cuTensorMapReplaceAddress(pointer, address)
                    if code:  # The kernel would read the tensor of another call.
                        raise self._error(code)
                    each[2] = addresses[index]
            code = self._launch(programs, stream)
            if code == _INVALID_CONTEXT:
                # The driver's first call in this thread.
                torch.cuda.set_device(torch.cuda.current_device())
                code = self._launch(programs, stream)
        if code:
            raise self._error(code)

    def _error(self, code: int) -> RuntimeError:
        text = ctypes.c_char_p()
        self._driver.cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        return RuntimeError(f"{self._compiled.name} could not be launched: {reason} ({code})")

    def _launch(self, programs, stream):
        one = self._one
        return self._run(
            *(self._function, programs, one, one, self._threads, one, one, self._shared),
            *(ctypes.c_void_p(stream), self._pointers, None),
        )


def _check_launch(metadata: Any) -> None:
    """Raise LookupError if a launch needs more than a grid, threads and shared memory."""
    scratch = metadata.global_scratch_size, metadata.profile_scratch_size
    plain = metadata.num_ctas == 1 and not metadata.launch_pdl
    if any(scratch) or not plain or metadata.launch_cooperative_grid:
        raise LookupError("scratch memory, clusters or launch attributes")


class _Parameters:
    """The parameters of a kernel in one buffer, which begins with the addresses of its tensors."""

    def __init__(self, address_bytes: int) -> None:
        self._values = [bytes(address_bytes)]
        self._offsets: list[int] = []
        self._sizes: list[int] = []

    def add_address(self, offset: int) -> None:
        """A pointer, whose value is at `offset`."""
        self._offsets.append(offset)
        self._sizes.append(8)

    def add(self, kind: str, value: int | float) -> None:
        """A number of Triton's type `kind`."""
        self._add(struct.pack(_SCALARS[kind], value))

    def add_map(self, descriptor: Any, meta: dict) -> int:
        """A TMA descriptor, with its shape and strides; returns the offset of the tensor map."""
        offset = self._add(_tensor_map(descriptor, meta))
        for kind, values in (("i32", descriptor.shape), ("i64", descriptor.strides)):
            for value in values:
                self.add(kind, value)
        return offset

    def check(self, function: int) -> None:
        """Raise LookupError unless the kernel takes parameters of these sizes."""
        sizes = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        query = _driver().cuFuncGetParamInfo
        handle = ctypes.c_void_p(function)
        while query(handle, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
            sizes.append(size.value)
        if sizes != self._sizes:
            raise LookupError(f"parameters of {sizes} bytes instead of {self._sizes}")

    def buffer(self) -> Any:
        """The values, at a multiple of 64 bytes."""
        values = b"".join(self._values)
        buffer = _aligned_buffer(len(values))
        buffer.raw = values
        return buffer

    def pointers(self, buffer: Any) -> Any:
        """The address of every parameter."""
        base = ctypes.addressof(buffer)
        return (ctypes.c_void_p * len(self._offsets))(*(base + offset for offset in self._offsets))

    def _add(self, value: bytes) -> int:
        offset = sum(map(len, self._values))
        padding = -offset % (64 if len(value) == _MAP_BYTES else 8)
        self._values += [bytes(padding), value]
        self._offsets.append(offset + padding)
        self._sizes.append(len(value))
        return offset + padding


def _tensor_map(descriptor: Any, meta: dict) -> bytes:
    """The driver's tensor map of a TMA descriptor, as Triton encodes it."""
    dtype = descriptor.base.dtype
    if meta.get("fp4_padded") or meta.get("is_im2col") or dtype not in _ELEMENT_TYPES:
        raise LookupError("a kind of TMA descriptor")
    rank, size = len(descriptor.shape), dtype.itemsize
    encoded = _aligned_buffer(_MAP_BYTES)
    # Innermost dimension first; its stride of one element is implied.
    steps = [stride * size for stride in descriptor.strides[-2::-1]]
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(encoded),
        ctypes.c_uint(_ELEMENT_TYPES[dtype]),
        ctypes.c_uint(rank),
        # Any address: every call writes its own.
        ctypes.c_void_p(1 << 20),
        (ctypes.c_uint64 * rank)(*descriptor.shape[::-1]),
        (ctypes.c_uint64 * (rank - 1))(*steps),
        (ctypes.c_uint32 * rank)(*meta["block_size"][::-1]),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        *(ctypes.c_uint(0), ctypes.c_uint(meta["swizzle"])),
        *(ctypes.c_uint(_L2_128_BYTES), ctypes.c_uint(0)),
    )
    if code:
        raise LookupError(f"cuTensorMapEncodeTiled returned {code}")
    return encoded.raw


def _aligned_buffer(size: int) -> Any:
    """Memory at a multiple of 64 bytes, as tensor maps need it."""
    memory = ctypes.create_string_buffer(size + 64)
    return (ctypes.c_char * size).from_buffer(memory, -ctypes.addressof(memory) % 64)


@functools.cache
def _driver() -> ctypes.CDLL:
    """The CUDA driver's library; LookupError if it is not there, or too old."""
    names = ("cuLaunchKernel", "cuTensorMapEncodeTiled", "cuTensorMapReplaceAddress")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for name in (*names, "cuFuncGetParamInfo", "cuGetErrorString"):
            getattr(driver, name)
    except (OSError, AttributeError) as error:
        raise LookupError(str(error)) from error
    return driver
