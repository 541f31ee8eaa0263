"""The Hopper scan compiled for sm_90, which needs no GPU: tensor cores, registers, memory.

`tests/triton_versions.py` runs this file with every version of Triton that the kernel supports.
"""

import itertools
import re

import pytest
import torch

from lasp.ops import triton as kernels
from tests.lasp.ops.triton import compiler
from tests.lasp.ops.triton.launch_constants import launch_constants

pytestmark = compiler.needs_compiled_triton
# Loads and stores of spilled registers in every chunk beside products, of all warps together. Up to
# 3 were seen with triton 3.8 and 3.9, none with 3.6 and 3.7.
SPILL_LIMIT = 6
# With a decay per token and triton 3.9: 20 for 256 values, 9 for 256 keys. The warps that also
# compute dot products for two blocks of columns: 99.
WIDE_BY_TOKEN_SPILL_LIMIT = 22
PAIR_WITH_DOTS_SPILL_LIMIT = 102
NARROW, WIDE_VALUES, WIDE_KEYS, PAIR = (
    (128, 128, False),
    (128, 256, False),
    (256, 128, False),
    (128, 128, True),
)
WIDE = (256, 256, False)
# Per warpgroup that holds states and their blocks of keys or columns: y, the state and P x.
NUM_PRODUCTS = {
    "narrow": 8 + 2 * (8 + 4 + 4),
    "wide values": 8 + 2 * 2 * (8 + 4 + 4),
    "wide keys": 16 + 2 * (16 + 8 + 4),
    "pair": 16 + 2 * 2 * (8 + 4 + 4),
}


def kind(case):
    key_dim, value_dim, pair = case
    if pair:
        return "pair"
    return "wide keys" if key_dim > 128 else "wide values" if value_dim > 128 else "narrow"


def launch(case, dtype, reverse, packed, has_initial, has_segment, by_token=False):
    """Launch the scan that a call with such heads needs.

    by_token: with a decay per token, and with the dot products of its gradient.
    """
    key_dim, value_dim, pair = case
    T, H = 1024, 4
    # One segment needs no states of earlier ones.
    length = 512 if has_segment else T
    a = torch.zeros(1, T, H, key_dim, dtype=dtype)
    x = torch.zeros(1, T, H, value_dim, dtype=dtype)
    num_documents = 1 + packed
    initial = torch.zeros(num_documents, H, key_dim, value_dim) if has_initial else None
    segment = torch.zeros(1, H, key_dim, value_dim) if has_segment else None
    offsets = ((0, 300, T) if has_segment else (0, 512, T)) if packed else None
    options = dict(initial_state=initial, segment_states=segment, scale=1.0, cu_seqlens=offsets)
    decay = torch.zeros(1, H, T + 1, dtype=torch.float64) if by_token else None
    constants = dict(segment_length=length, LARGE_VALUES=0, has_gluon=lambda device: True)
    with launch_constants(**constants):
        if pair:
            kernels.scan_dkdv(a, a, x, x, decay, **options, with_dots=by_token)
        else:
            dot_with = x if by_token and case == NARROW else None
            kernels.scan(a, a, x, decay, reverse=reverse, **options, dot_with=dot_with)


def check(kernel, case, folder, spill_limit=SPILL_LIMIT):
    """It multiplies as planned, waits where it must, fits into memory, and does not spill."""
    ptx = kernel.asm["ptx"]
    events = compiler.products_and_waits(ptx)
    num_products = NUM_PRODUCTS[kind(case)]
    assert len([e for e in events if not e.isdigit()]) == num_products
    assert {e for e in events if e.isdigit()} == {"0"}
    # Products with an operand in registers ("{") are waited for before any other begins.
    assert "{%rd" not in "".join(events) and "{" in events
    assert "cp.async.bulk.tensor.4d" in ptx and "setmaxnreg" in ptx
    assert kernel.metadata.shared <= compiler.SHARED_MEMORY_LIMIT
    # C7510 to C7519: the assembler makes products wait for each other.
    assert "registers" in kernel.report and "C751" not in kernel.report, kernel.report

    # The prologue spills, once per program; the chunks must not.
    blocks = compiler.disassembled_blocks(kernel, folder)
    busy = [block for block in blocks if any("HGMMA" in i for i in block)]
    every_chunk = [i for block in busy for part in compiler.without_rows(block) for i in part]
    assert sum("HGMMA" in i for i in every_chunk) == num_products
    assert sum(bool(re.search(r"\b(STL|LDL)\b", i)) for i in every_chunk) <= spill_limit


@pytest.mark.parametrize(
    ("case", "dtype", "reverse", "packed"),
    [
        (NARROW, torch.bfloat16, False, False),
        ((96, 96, False), torch.float16, True, True),
        (WIDE_VALUES, torch.bfloat16, False, True),
        (WIDE_KEYS, torch.bfloat16, True, True),
        (PAIR, torch.bfloat16, True, False),
    ],
)
def test_scan_compiles(case, dtype, reverse, packed, compiled, tmp_path):
    launch(case, dtype, reverse, packed, True, True)
    (kernel,) = compiled
    check(kernel, case, tmp_path)


@pytest.mark.parametrize(
    ("case", "packed"),
    [(NARROW, False), (WIDE_VALUES, True), (WIDE_KEYS, True), (PAIR, False)],
)
def test_scan_with_a_decay_per_token_compiles(case, packed, compiled, tmp_path):
    launch(case, torch.bfloat16, case == PAIR, packed, True, True, by_token=True)
    (kernel,) = compiled
    limits = {PAIR: PAIR_WITH_DOTS_SPILL_LIMIT, NARROW: SPILL_LIMIT}
    limit = limits.get(case, WIDE_BY_TOKEN_SPILL_LIMIT)
    check(kernel, case, tmp_path, limit)


def variants():
    """All other launches: kinds, dtypes, directions, documents and states; then further heads."""
    cases = (NARROW, WIDE_VALUES, WIDE_KEYS, WIDE, PAIR)
    dtypes = (torch.bfloat16, torch.float16)
    flags = (False, True)
    for case, dtype, *rest in itertools.product(cases, dtypes, flags, flags, flags, flags):
        # dk and dv are computed in reverse.
        if rest[0] or not case[2]:
            yield case, dtype, *rest
    for key_dim, value_dim in ((80, 80), (72, 200), (200, 72), (192, 192), (96, 128)):
        for pair in flags if max(key_dim, value_dim) <= 128 else (False,):
            yield (key_dim, value_dim, pair), torch.bfloat16, True, True, True, True


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype", *"rpis"), list(variants()))
def test_every_variant_compiles(case, dtype, r, p, i, s, compiled, tmp_path):
    """r, p, i, s: reverse, packed, with initial states, with states of earlier segments."""
    launch(case, dtype, r, p, i, s)
    (kernel,) = compiled
    check(kernel, case, tmp_path)
