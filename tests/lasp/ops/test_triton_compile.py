"""The Triton kernels compiled for Hopper, which needs no GPU: tensor cores, registers, memory.

The interpreter knows nothing of these, and a kernel that spills or falls back to older instructions
is still right, only slow.
"""

import functools
import re
import subprocess
import tempfile

import pytest
import torch
import triton
from triton import knobs
from triton.compiler import ASTSource

from lasp.ops.triton.combine import combine_kernel
from lasp.ops.triton.plan import COMBINE_BLOCK, scan_launch, state_launch
from lasp.ops.triton.scan import scan_kernel
from lasp.ops.triton.state import state_kernel
from lasp.ops.triton.step import step_kernel
from tests.lasp.ops.hopper_compile import (
    HOPPER,
    SHARED_MEMORY_LIMIT,
    assert_loads_are_whole_vectors,
)

DIMS = [(64, 64), (128, 128), (96, 96), (256, 128), (128, 256)]
# Bytes a thread spills in the scan. A state of 256 x 64 alone takes half of all registers, and no
# other tile is better without leaving four warps or tiles of 64; see the launch table.
SPILL_LIMIT = {64: 0, 128: 64, 256: 640}


def compile_for_hopper(kernel, constants, types, num_warps, num_stages):
    """Compile as a launch with aligned pointers and strides divisible by 16 would."""
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[i,] = constants[name]
            continue
        pointer = name.startswith("p_")
        signature[name] = types.get(name, "*fp32" if pointer else "i32")
        if pointer or name.startswith("stride"):
            attributes[i,] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=HOPPER,
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


@functools.cache
def compiled_scan(key_dim, value_dim, reverse, packed):
    launch = scan_launch(key_dim, torch.bfloat16)
    constants = dict(
        A=key_dim,
        X=value_dim,
        BA=launch.key,
        BX=launch.value,
        BC=launch.chunk,
        REVERSE=reverse,
        PACKED=packed,
        HAS_INITIAL=True,
        HAS_SEGMENT=True,
        FOLDED=not packed,
        PRECISION="ieee",
    )
    types = dict.fromkeys(("p_a", "p_b", "p_x", "p_y"), "*bf16") | {"scale": "fp32"}
    return _compiled(scan_kernel, constants, types, packed, launch)


@functools.cache
def compiled_state(key_dim, value_dim, reverse, packed, with_total):
    launch = state_launch(key_dim, value_dim, torch.bfloat16, 1000)
    constants = dict(
        D=key_dim,
        E=value_dim,
        BD=launch.key,
        BE=launch.value,
        BC=launch.chunk,
        REVERSE=reverse,
        PACKED=packed,
        WITH_TOTAL=with_total,
        PRECISION="ieee",
    )
    types = {"p_k": "*bf16", "p_v": "*bf16", "scale": "fp32"}
    return _compiled(state_kernel, constants, types, packed, launch)


def _compiled(kernel, constants, types, packed, launch):
    if packed:
        types = types | {"p_table": "*i64"}
    else:
        constants = constants | {"p_table": None}
    return compile_for_hopper(kernel, constants, types, launch.num_warps, launch.num_stages)


def spilled_bytes(compiled):
    """Bytes of stack per thread: the kernels have no arrays, so what is there was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


def assert_tensor_cores_used_well(compiled):
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx, "a product fell back to the instructions before Hopper"
    # A product left in flight over the end of an iteration meets a register hazard in triton 3.6.
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) == {"0"}
    # The transpose of a product is miscompiled on Hopper; loaded tiles are transposed in memory.
    assert "tt.trans" not in ttgir
    assert not re.search(r"local_alloc.*#linear", ttgir)
    assert_loads_are_whole_vectors(ptx)
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT


@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS)
@pytest.mark.parametrize(
    ("reverse", "packed"), [(False, False), (True, True)], ids=["dense", "reverse, packed"]
)
def test_scan(key_dim, value_dim, reverse, packed):
    compiled = compiled_scan(key_dim, value_dim, reverse, packed)
    assert_tensor_cores_used_well(compiled)
    limit = SPILL_LIMIT[scan_launch(key_dim, torch.bfloat16).key]
    assert spilled_bytes(compiled) <= limit


@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS)
@pytest.mark.parametrize(
    ("reverse", "packed", "with_total"),
    [(False, False, True), (True, True, True), (True, True, False)],
    ids=["dense", "reverse, packed", "reverse, packed, no total"],
)
def test_state(key_dim, value_dim, reverse, packed, with_total):
    compiled = compiled_state(key_dim, value_dim, reverse, packed, with_total)
    assert_tensor_cores_used_well(compiled)
    assert spilled_bytes(compiled) == 0


def test_combine_prefetches():
    """Loads of later segments are in flight while one is added: the kernel is a chain otherwise."""
    constants = dict(SIZE=128 * 128, BLOCK=COMBINE_BLOCK, REVERSE=False, PACKED=True, NUM_STAGES=4)
    constants |= dict(STORE=True, WITH_TOTAL=True)
    compiled = compile_for_hopper(combine_kernel, constants, {"p_documents": "*i64"}, 4, 3)
    assert "cp.async.wait_group" in compiled.asm["ptx"]
    assert spilled_bytes(compiled) == 0


def test_step_does_not_spill():
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_o"), "*bf16") | {"scale": "fp32"}
    constants = dict(D=256, E=128, BD=256, BE=32)
    assert spilled_bytes(compile_for_hopper(step_kernel, constants, types, 4, 3)) == 0
