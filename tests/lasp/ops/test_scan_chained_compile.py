"""The chained scan compiled for sm_90, which needs no GPU: tensor cores, registers, memory."""

import re

import pytest
import torch

pytest.importorskip("triton")

from lasp.ops.triton import scan_chained  # noqa: E402
from tests.lasp.ops import hopper_compile  # noqa: E402

pytestmark = hopper_compile.needs_tested_triton
# Four chunks of 64 keys each for the state, six tiles of scores (128 keys and then twice 64), and
# four of what enters (128 keys), 16 keys per instruction.
NUM_PRODUCTS = 4 * 4 + 6 * (8 + 2 * 4) + 4 * 8
# Bytes of registers that a thread spills, once.
SPILL_LIMIT = 160


@pytest.mark.parametrize(
    ("T", "key_dim", "value_dim", "with_state", "gradients"),
    [
        (300, 128, 128, False, True),
        (1300, 128, 80, False, False),
        (2048, 128, 128, False, False),
        (2048, 128, 128, False, True),
        (4096, 96, 96, True, True),
    ],
)
def test_scan(T, key_dim, value_dim, with_state, gradients, monkeypatch, tmp_path):
    from lasp.ops.triton.scan_chained_kernel import scan_chained_kernel

    recorder = hopper_compile.Recorder(scan_chained_kernel)
    monkeypatch.setattr(scan_chained, "_kernel", lambda: recorder)
    flags = torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(scan_chained, "_make_flags", lambda *_: flags)
    scan_chained._bind.cache_clear()
    q = torch.zeros(1, T, 4, key_dim, dtype=torch.bfloat16)
    v = torch.zeros(1, T, 4, value_dim, dtype=torch.bfloat16)
    operands, results = ((q, q, v, v), (q, q, v)) if gradients else ((q, q, v), (v,))
    state = torch.zeros(1, 4, key_dim, value_dim) if with_state else None
    scan_chained.launch(operands, results, torch.zeros(4), scale=1.0, initial_state=state)
    scan_chained._bind.cache_clear()

    ptx = recorder.compiled.asm["ptx"]
    assert recorder.compiled.metadata.shared <= hopper_compile.SHARED_MEMORY_LIMIT
    events = hopper_compile.products_and_waits(ptx)
    assert len([e for e in events if not e.isdigit()]) == NUM_PRODUCTS
    # Operands in registers stay there until their products are done: two halves of y, one state.
    assert {e for e in events if e.isdigit()} == {"0"}
    assert "{%rd" not in "".join(events)
    hopper_compile.assert_loads_are_whole_vectors(ptx)
    report, _ = hopper_compile.assemble(ptx, tmp_path)
    assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= SPILL_LIMIT
