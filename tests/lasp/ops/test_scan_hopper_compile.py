"""The Hopper scan compiled for sm_90, which needs no GPU: tensor cores, registers, memory."""

import re
import subprocess
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from lasp.ops.triton import scan_hopper  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(scan_hopper.TRITON_VERSIONS),
    reason="the kernel is not used with this Triton",
)
HOPPER = GPUTarget("cuda", 90, 32)
SPILL_LIMIT = 64


def compile_for_hopper(key_dim, value_dim, reverse, packed):
    """Compile as a launch on CPU tensors of these shapes would on the GPU."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from lasp.ops.triton.scan_hopper_kernel import scan_hopper_kernel as kernel

    def descriptor(tensor, columns):
        block = [1, scan_hopper.CHUNK, 1, columns]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)

    T, H = 1024, 4
    a = torch.zeros(1, T, H, key_dim, dtype=torch.bfloat16)
    x = torch.zeros(1, T, H, value_dim, dtype=torch.bfloat16)
    state = torch.zeros(2, H, key_dim, value_dim)
    table = torch.zeros(4, 5, dtype=torch.int64) if packed else None
    arguments = (
        descriptor(a, scan_hopper.KEY_BLOCK),
        descriptor(a, scan_hopper.KEY_BLOCK),
        descriptor(x, scan_hopper.VALUE_BLOCK),
        descriptor(x, scan_hopper.VALUE_BLOCK),
        *(x, state, state, torch.zeros(H), table, *state.stride(), *state.stride()),
        *(1.0, T, 2, 512, H),
    )
    constants = dict(
        A=key_dim,
        X=value_dim,
        BA=scan_hopper.KEY_BLOCK,
        BX=scan_hopper.VALUE_BLOCK,
        BC=scan_hopper.CHUNK,
        STAGES=scan_hopper.STAGES,
        REVERSE=reverse,
        PACKED=packed,
        HAS_INITIAL=True,
        HAS_SEGMENT=True,
        REGISTERS=scan_hopper.REGISTERS,
        num_warps=4,
        sanitize_overflow=False,
    )
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **constants)
    options, signature, values, attributes = kernel._pack_args(
        backend, constants, bound, specialization, options
    )
    source = GluonASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=HOPPER, options=options.__dict__)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (96, 96), (128, 256)])
@pytest.mark.parametrize(
    ("reverse", "packed"), [(False, False), (True, True)], ids=["dense", "reverse, packed"]
)
def test_scan(key_dim, value_dim, reverse, packed):
    compiled = compile_for_hopper(key_dim, value_dim, reverse, packed)
    ptx = compiled.asm["ptx"]
    products = re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\}, (\S+),", ptx)
    # 8 for P, and for each of two states 8 + 4 + 8: every operand read from shared memory.
    assert len(products) == 48
    assert all(operand.startswith("%rd") for operand in products), "an operand in registers"
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)
    assert sorted(waits) == ["0"] * 3 + ["1"] * 4, "products are not in flight together"
    assert "cp.async.bulk.tensor.4d" in ptx and "setmaxnreg" in ptx
    assert compiled.metadata.shared <= 227 * 1024

    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= SPILL_LIMIT
    # C7510 to C7519: the assembler makes products wait for each other.
    assert "C751" not in report, report
