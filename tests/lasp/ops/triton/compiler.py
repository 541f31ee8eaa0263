"""Compile kernels without a GPU, for sm_90 unless told otherwise, and inspect the result."""

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lasp.ops.triton import launcher
from lasp.ops.triton.chip import Chip
from lasp.ops.triton.hopper import available
from tests.lasp.ops.triton.launch_constants import launch_constants

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_LIMIT = 227 * 1024


class Target(NamedTuple):
    """A GPU to compile for.

    Attributes:
        capability: 10 times its compute capability.
        shared_memory: most bytes that a program may use.
        chip: what `lasp.ops.triton.chip.chip_of` finds on it.
    """

    capability: int
    shared_memory: int
    chip: Chip


TARGETS = {
    "sm_80": Target(80, 163 * 1024, Chip(108, "mma")),  # A100
    "sm_86": Target(86, 99 * 1024, Chip(72, "mma")),  # A10
    "sm_89": Target(89, 99 * 1024, Chip(142, "mma")),  # L40S
    "sm_90": Target(90, SHARED_MEMORY_LIMIT, Chip(132, "wgmma")),  # H100, H200
    "sm_100": Target(100, SHARED_MEMORY_LIMIT, Chip(148, "tcgen05")),  # B200
    "sm_120": Target(120, 99 * 1024, Chip(170, "mma")),  # RTX 5090
}
needs_compiled_triton = pytest.mark.skipif(
    not triton.__version__.startswith(available.COMPILED_VERSIONS),
    reason="the kernel is not used with this Triton",
)


@contextlib.contextmanager
def compiling(target: Target, **constants):
    """What is launched on CPU tensors is compiled for the target, with its launch constants and
    these; the list of the results."""
    results = []

    def getitem(kernel, grid):
        def launch(*args, **named):
            gpu = GPUTarget("cuda", target.capability, 32)
            results.append(compile_launch(kernel, args, named, gpu))

        return launch

    constants["chip_of"] = lambda device: target.chip
    # There is no GPU to load a kernel on, and no stream.
    unloaded = mock.Mock(side_effect=LookupError)
    with (
        mock.patch.object(JITFunction, "__getitem__", getitem),
        mock.patch.multiple(launcher, DirectLaunch=unloaded, current_stream=lambda device: 0),
        launch_constants(**constants),
    ):
        yield results


def compile_launch(kernel, arguments, constants, target=HOPPER):
    """The variant of the kernel that a launch with these arguments would run.

    Of a kernel in Gluon the attribute `report` is what the assembler says.
    """
    source = ASTSource
    if type(kernel) is not JITFunction:
        from triton.experimental.gluon._runtime import GluonASTSource as source
    backend = make_backend(target)
    constants["sanitize_overflow"] = False
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **constants)
    options, signature, values, attributes = kernel._pack_args(
        backend, constants, bound, specialization, options
    )
    source = source(kernel, signature, values, attributes)
    options = options.__dict__
    if type(kernel) is JITFunction:
        return triton.compile(source, target=target, options=options)
    report = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.compilation.scope())
        stack.enter_context(knobs.nvidia.scope())
        stack.enter_context(contextlib.redirect_stdout(report))
        # The cache has no reports.
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options)
    compiled.report = report.getvalue()
    return compiled


def products_and_waits(ptx: str) -> list[str]:
    """In order: "{" for a product with an operand in registers, "%rd" for one with none, and for
    every wait how many products may be left in flight."""
    products = r"wgmma\.mma_async[^{]*\{[^}]*\}, (%rd|\{)"
    waits = r"wgmma\.wait_group\.sync\.aligned (\d+)"
    return ["".join(found) for found in re.findall(f"{products}|{waits}", ptx)]


class Resources(NamedTuple):
    """What a program uses: bytes of shared memory, registers and spilled bytes per thread, columns
    of tensor memory (Blackwell has 512 per multiprocessor)."""

    shared_memory: int
    registers: int
    spilled: int
    tensor_memory: int

    @classmethod
    def of(cls, compiled):
        metadata, report = compiled.metadata, _resource_usage(compiled)
        # The kernels have no arrays, so what is on the stack was spilled.
        registers, stack = (int(re.search(rf"{k}:(\d+)", report)[1]) for k in ("REG", "STACK"))
        return cls(metadata.shared, registers, stack, getattr(metadata, "tmem_size", 0) or 0)


def spilled_bytes(compiled) -> int:
    """Bytes of registers that each thread spilled."""
    return Resources.of(compiled).spilled


def _resource_usage(compiled) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_tensor_cores_used_well(compiled, copy_sizes: frozenset[int] = frozenset({16})) -> None:
    """Of a kernel in Triton with 16-bit operands, whose loads copy so many bytes at a time."""
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx, "a product fell back to the instructions before Hopper"
    # A product left in flight over the end of an iteration meets a register hazard in triton 3.6.
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) == {"0"}
    # The transpose of a product is miscompiled on Hopper; loaded tiles are transposed in memory.
    assert "tt.trans" not in ttgir
    assert not re.search(r"local_alloc.*#linear", ttgir)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+|\d+)", ptx)
    assert {int(size, 0) for size in copies} == copy_sizes, "loads are not whole vectors"
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT


def disassembled_blocks(compiled, folder: Path) -> list[list[str]]:
    """The kernel's basic blocks, each a list of instructions."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = knobs.nvidia.nvdisasm.path
    text = subprocess.run([tool, cubin], capture_output=True, text=True, check=True).stdout
    return [re.findall(r"\*/ +(.*?;)", block) for block in re.split(r"\n\s*\.L_x", text)]


def without_rows(block: list[str]) -> list[list[str]]:
    """A block cut at its branches, without the parts that write rows to global memory and multiply
    nothing: only the last chunk of a segment, a short one, runs them."""
    parts: list[list[str]] = [[]]
    for instruction in block:
        parts[-1].append(instruction)
        if re.search(r"\bBRA\b", instruction):
            parts.append([])

    def has(part, name):
        return any(re.search(name, i) for i in part)

    return [part for part in parts if has(part, "HGMMA") or not has(part, r"\bSTG\b")]
