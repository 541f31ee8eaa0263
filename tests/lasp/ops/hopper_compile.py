"""Compile kernels for sm_90, without a GPU, and look at what came out; those in Gluon by launching
a stand-in."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lasp.ops.triton import hopper

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_LIMIT = 227 * 1024
needs_tested_triton = pytest.mark.skipif(
    not triton.__version__.startswith(hopper.TRITON_VERSIONS),
    reason="the kernel is not used with this Triton",
)


class Recorder:
    """Stands for the kernel on a launch: keeps the arguments, compiles them for sm_90."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *arguments, **constants):
        from triton.experimental.gluon._runtime import GluonASTSource

        kernel, backend = self._kernel, make_backend(HOPPER)
        constants["sanitize_overflow"] = False
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*arguments, **constants)
        options, signature, values, attributes = kernel._pack_args(
            backend, constants, bound, specialization, options
        )
        source = GluonASTSource(kernel, signature, values, attributes)
        self.compiled = triton.compile(source, target=HOPPER, options=options.__dict__)


def products_and_waits(ptx: str) -> list[str]:
    """In order: "{" for a product with an operand in registers, "%rd" for one with none, and for
    every wait how many products may be left in flight."""
    products = r"wgmma\.mma_async[^{]*\{[^}]*\}, (%rd|\{)"
    waits = r"wgmma\.wait_group\.sync\.aligned (\d+)"
    return ["".join(found) for found in re.findall(f"{products}|{waits}", ptx)]


def assert_loads_are_whole_vectors(ptx: str) -> None:
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+|\d+)", ptx)
    assert copies and {int(size, 0) for size in copies} == {16}, "loads are not whole vectors"


def assemble(ptx: str, folder: Path) -> tuple[str, Path]:
    """(what the assembler says, the cubin)."""
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    report = subprocess.run(
        [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", cubin, source],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    # C7510 to C7519: the assembler makes products wait for each other.
    assert "C751" not in report, report
    return report, cubin


def disassembled_blocks(cubin: Path) -> list[list[str]]:
    """The kernel's basic blocks, each a list of instructions."""
    tool = Path(knobs.nvidia.ptxas.path).with_name("nvdisasm")
    text = subprocess.run([tool, cubin], capture_output=True, text=True, check=True).stdout
    return [re.findall(r"\*/ +(.*?;)", block) for block in re.split(r"\n\s*\.L_x", text)]
