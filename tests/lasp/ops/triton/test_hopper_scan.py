"""The Hopper scan compiled for sm_90, which needs no GPU: tensor cores, registers, memory."""

import re

import pytest
import torch

from lasp.ops import triton as kernels
from tests.lasp.ops.triton import compiler
from tests.lasp.ops.triton.launch_constants import launch_constants

pytestmark = compiler.needs_tested_triton
# Loads and stores of spilled registers between products, of all warps together.
SPILL_LIMIT = 12
NARROW, WIDE_VALUES, WIDE_KEYS, PAIR = (
    (128, 128, False),
    (128, 256, False),
    (256, 128, False),
    (128, 128, True),
)
# Per warpgroup that holds states and their blocks of keys or columns: y, the state and P x.
NUM_PRODUCTS = {
    NARROW: 8 + 2 * (8 + 4 + 4),
    (96, 96, False): 8 + 2 * (8 + 4 + 4),
    WIDE_VALUES: 8 + 2 * 2 * (8 + 4 + 4),
    WIDE_KEYS: 16 + 2 * (16 + 8 + 4),
    PAIR: 16 + 2 * 2 * (8 + 4 + 4),
}


@pytest.mark.parametrize(
    ("case", "reverse", "packed"),
    [
        (NARROW, False, False),
        ((96, 96, False), True, True),
        (WIDE_VALUES, False, True),
        (WIDE_KEYS, False, False),
        (WIDE_KEYS, True, True),
        (PAIR, True, False),
        (PAIR, True, True),
    ],
)
def test_scan_compiles(case, reverse, packed, compiled, tmp_path):
    key_dim, value_dim, pair = case
    T, H = 1024, 4
    a = torch.zeros(1, T, H, key_dim, dtype=torch.bfloat16)
    x = torch.zeros(1, T, H, value_dim, dtype=torch.bfloat16)
    states = dict(initial_state=torch.zeros(1 + packed, H, key_dim, value_dim))
    states["segment_states"] = torch.zeros(1, H, key_dim, value_dim)
    options = dict(scale=1.0, cu_seqlens=(0, 300, T) if packed else None)
    constants = dict(segment_length=512, LARGE_VALUES=0, has_gluon=lambda device: True)
    with launch_constants(**constants):
        if pair:
            kernels.scan_dkdv(a, a, x, x, None, **states, **options)
        else:
            kernels.scan(a, a, x, None, reverse=reverse, **states, **options)
    (kernel,) = compiled
    ptx = kernel.asm["ptx"]
    events = compiler.products_and_waits(ptx)
    assert len([e for e in events if not e.isdigit()]) == NUM_PRODUCTS[case]
    assert {e for e in events if e.isdigit()} == {"0"}
    # Products with an operand in registers ("{") are waited for before any other begins.
    assert "{%rd" not in "".join(events) and "{" in events
    assert "cp.async.bulk.tensor.4d" in ptx and "setmaxnreg" in ptx
    assert kernel.metadata.shared <= compiler.SHARED_MEMORY_LIMIT

    cubin = compiler.assemble(ptx, tmp_path)
    # The prologue spills, once per program; the chunks must not.
    blocks = compiler.disassembled_blocks(cubin)
    busy = [i for block in blocks if any("HGMMA" in i for i in block) for i in block]
    assert sum("HGMMA" in i for i in busy) == NUM_PRODUCTS[case]
    assert sum(bool(re.search(r"\b(STL|LDL)\b", i)) for i in busy) <= SPILL_LIMIT
