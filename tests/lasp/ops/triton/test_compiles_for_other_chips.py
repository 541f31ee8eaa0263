"""The Triton kernels compiled for chips that are not at hand: shared memory and spills.

`python -m tests.compile_kernels` prints the figures. The Hopper scan has tests of its own.
"""

import itertools

import pytest

from tests.compile_kernels import compile_call
from tests.lasp.ops.triton.compiler import TARGETS
from tests.lasp.ops.triton.launches import DIMS, DTYPES, QUICK, all_launches, quick_launches

# Bytes that a thread may spill, none where nothing is said; of the scan by head dims. Odd dims
# spill most with triton 3.7.1 on sm_100. The exact products of 256 keys in float32 spill on every
# chip, a state of 256 x 64 does on Hopper (see test_scan.py). Heads of 64 spill with a decay per
# token only, on sm_100 and sm_120.
SPILL_LIMIT = {
    "state_kernel": 40,
    "cumulate_kernel": 16,
    "boundary_gradient_kernel": 8,
    "decay_gradient_kernel": 56,
    "scan_dkdv_kernel": 96,
}
SCAN_SPILL_LIMIT = {"64": 64, "128": 144, "256": 136, "odd": 640}
SPILLING = {("fp32", "256", chip) for chip in TARGETS}
SPILLING |= {("bf16", "256", "sm_90"), ("fp16", "256", "sm_90")}
TENSOR_MEMORY = 512


def check(launch, chip):
    rows = compile_call(launch, chip)
    assert rows
    for row in rows:
        assert row.resources is not None, row.error
        assert row.resources.shared_memory <= TARGETS[chip].shared_memory, row
        assert row.resources.tensor_memory <= TENSOR_MEMORY, row
        if (launch.dtype, launch.dims, chip) not in SPILLING:
            limits = SPILL_LIMIT | {"scan_kernel": SCAN_SPILL_LIMIT.get(launch.dims)}
            assert row.resources.spilled <= limits.get(row.kernel, 0), row


# One chip with little shared memory, and one with much and another kind of product.
@pytest.mark.parametrize("chip", ["sm_86", pytest.param("sm_100", marks=pytest.mark.slow)])
@pytest.mark.parametrize("launch", quick_launches(), ids=lambda launch: " ".join(launch[:4]))
def test_fits(launch, chip):
    check(launch, chip)


def test_the_quick_ones_exist():
    assert len(quick_launches()) == len(QUICK)


SLOW = [("send_recv_state", "", ""), ("cumulate", "", "")]
SLOW += [("dkdv", "bf16", "64"), ("dkdv", "fp16", "64")]
SLOW += itertools.product(("scan", "state", "gradient", "step", "lrpe"), DTYPES, DIMS)


@pytest.mark.slow
@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("kind", SLOW, ids=" ".join)
def test_every_variant_fits(kind, chip):
    launches = [launch for launch in all_launches() if launch[:3] == kind]
    assert launches
    for launch in launches:
        check(launch, chip)
