"""The state and combine kernels compiled for Hopper: tensor cores, registers, memory.

Triton's interpreter, in which test_scan.py runs them, knows nothing of these, and a kernel that
spills or falls back to older instructions is still right, only slow.
"""

import pytest
import torch

from lasp.ops import triton as kernels
from tests.lasp.ops.triton.compiler import assert_tensor_cores_used_well, spilled_bytes
from tests.lasp.ops.triton.launch_constants import launch_constants

DIMS = [(64, 64), (128, 128), (96, 96), (256, 128), (128, 256)]


@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS)
@pytest.mark.parametrize(
    ("reverse", "packed", "with_total"),
    [(False, False, True), (True, True, True), (True, True, False)],
    ids=["dense", "reverse, packed", "reverse, packed, no total"],
)
def test_states_compile_to_tensor_cores(key_dim, value_dim, reverse, packed, with_total, compiled):
    k = torch.zeros(1, 2048, 16, key_dim, dtype=torch.bfloat16)
    v = torch.zeros(1, 2048, 16, value_dim, dtype=torch.bfloat16)
    cu_seqlens = (0, 700, 2048) if packed else None
    with launch_constants(segment_length=64):
        kernels.chunk_states(
            k, v, None, cu_seqlens=cu_seqlens, reverse=reverse, scale=0.3, with_total=with_total
        )
    state, combine = compiled
    assert (state.name, combine.name) == ("state_kernel", "combine_kernel")
    assert_tensor_cores_used_well(state)
    assert spilled_bytes(state) == spilled_bytes(combine) == 0
    # Loads of later segments are in flight while one is added: the kernel is a chain otherwise.
    assert "cp.async.wait_group" in combine.asm["ptx"]
