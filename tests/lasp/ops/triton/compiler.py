"""Compile kernels for sm_90, without a GPU, and inspect the result."""

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lasp.ops.triton.hopper import available

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_LIMIT = 227 * 1024
needs_tested_triton = pytest.mark.skipif(
    not triton.__version__.startswith(available.TRITON_VERSIONS),
    reason="the kernel is not used with this Triton",
)


def compile_launch(kernel, arguments, constants):
    """The variant of the kernel that a launch with these arguments would run.

    Its attribute `report` is what the assembler says.
    """
    source = ASTSource
    if type(kernel) is not JITFunction:
        from triton.experimental.gluon._runtime import GluonASTSource as source
    backend = make_backend(HOPPER)
    constants["sanitize_overflow"] = False
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **constants)
    options, signature, values, attributes = kernel._pack_args(
        backend, constants, bound, specialization, options
    )
    source = source(kernel, signature, values, attributes)
    report = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.compilation.scope())
        stack.enter_context(knobs.nvidia.scope())
        stack.enter_context(contextlib.redirect_stdout(report))
        # The cache has no reports.
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=HOPPER, options=options.__dict__)
    compiled.report = report.getvalue()
    return compiled


def products_and_waits(ptx: str) -> list[str]:
    """In order: "{" for a product with an operand in registers, "%rd" for one with none, and for
    every wait how many products may be left in flight."""
    products = r"wgmma\.mma_async[^{]*\{[^}]*\}, (%rd|\{)"
    waits = r"wgmma\.wait_group\.sync\.aligned (\d+)"
    return ["".join(found) for found in re.findall(f"{products}|{waits}", ptx)]


def spilled_bytes(compiled) -> int:
    """Bytes of stack per thread: the kernels have no arrays, so what is there was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


def assert_tensor_cores_used_well(compiled) -> None:
    """Of a kernel in Triton with 16-bit operands."""
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx, "a product fell back to the instructions before Hopper"
    # A product left in flight over the end of an iteration meets a register hazard in triton 3.6.
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) == {"0"}
    # The transpose of a product is miscompiled on Hopper; loaded tiles are transposed in memory.
    assert "tt.trans" not in ttgir
    assert not re.search(r"local_alloc.*#linear", ttgir)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+|\d+)", ptx)
    assert copies and {int(size, 0) for size in copies} == {16}, "loads are not whole vectors"
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT


def disassembled_blocks(compiled, folder: Path) -> list[list[str]]:
    """The kernel's basic blocks, each a list of instructions."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = knobs.nvidia.nvdisasm.path
    text = subprocess.run([tool, cubin], capture_output=True, text=True, check=True).stdout
    return [re.findall(r"\*/ +(.*?;)", block) for block in re.split(r"\n\s*\.L_x", text)]
