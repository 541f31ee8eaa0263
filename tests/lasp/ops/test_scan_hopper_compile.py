"""The Hopper scan compiled for sm_90, which needs no GPU: tensor cores, registers, memory."""

import re

import pytest
import torch

pytest.importorskip("triton")

from lasp.ops.triton import scan_hopper  # noqa: E402
from tests.lasp.ops import hopper_compile  # noqa: E402

pytestmark = hopper_compile.needs_tested_triton
# Loads and stores of spilled registers between products, of all roles together.
SPILL_LIMIT = 12


def compile_for_hopper(monkeypatch, key_dim, value_dim, *, reverse, packed, pair):
    """Compile what a launch on CPU tensors of these shapes would run on the GPU."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from lasp.ops.triton.scan_hopper_kernel import scan_hopper_kernel

    def tile(dtype, columns):
        block = [1, scan_hopper.CHUNK, 1, columns]
        return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)

    recorder = hopper_compile.Recorder(scan_hopper_kernel)
    stand_in = scan_hopper.SimpleNamespace(kernel=recorder, descriptor=TensorDescriptor, tile=tile)
    monkeypatch.setattr(scan_hopper, "_gluon", lambda device: stand_in)
    scan_hopper._bind.cache_clear()
    T, H = 1024, 4
    a, b = torch.zeros(2, 1, T, H, key_dim, dtype=torch.bfloat16).unbind()
    x, c = torch.zeros(2, 1, T, H, value_dim, dtype=torch.bfloat16).unbind()
    state = torch.zeros(2, H, key_dim, value_dim)
    plan = scan_hopper.plans.make_plan(a, x, (0, 300, T) if packed else None, 512)
    table, _ = plan.device_tables(a.device)
    scan_hopper.launch(
        (a, b, x, c) if pair else (a, b, x),
        (x, a) if pair else (x,),
        torch.zeros(H),
        plan,
        table,
        scale=1.0,
        initial_state=state,
        segment_states=state,
        reverse=reverse,
    )
    scan_hopper._bind.cache_clear()
    return recorder.compiled


NARROW, WIDE_VALUES, WIDE_KEYS, PAIR = (
    (128, 128, False),
    (128, 256, False),
    (256, 128, False),
    (128, 128, True),
)
# Per warpgroup that carries states and their blocks of keys or columns: y, the state and P x.
NUM_PRODUCTS = {
    NARROW: 8 + 2 * (8 + 4 + 4),
    (96, 96, False): 8 + 2 * (8 + 4 + 4),
    WIDE_VALUES: 8 + 2 * 2 * (8 + 4 + 4),
    WIDE_KEYS: 16 + 2 * (16 + 8 + 4),
    PAIR: 16 + 2 * 2 * (8 + 4 + 4),
}


@pytest.mark.parametrize(
    ("cut", "reverse", "packed"),
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
def test_scan(cut, reverse, packed, monkeypatch, tmp_path):
    key_dim, value_dim, pair = cut
    compiled = compile_for_hopper(
        monkeypatch, key_dim, value_dim, reverse=reverse, packed=packed, pair=pair
    )
    ptx = compiled.asm["ptx"]
    events = hopper_compile.products_and_waits(ptx)
    assert len([e for e in events if not e.isdigit()]) == NUM_PRODUCTS[cut]
    assert {e for e in events if e.isdigit()} == {"0"}
    # Products with an operand in registers ("{") are waited for before any other begins.
    assert "{%rd" not in "".join(events) and "{" in events
    assert "cp.async.bulk.tensor.4d" in ptx and "setmaxnreg" in ptx
    assert compiled.metadata.shared <= hopper_compile.SHARED_MEMORY_LIMIT

    _, cubin = hopper_compile.assemble(ptx, tmp_path)
    # The prologue spills, once per program; the chunks must not.
    blocks = hopper_compile.disassembled_blocks(cubin)
    busy = [i for block in blocks if any("HGMMA" in i for i in block) for i in block]
    assert sum("HGMMA" in i for i in busy) == NUM_PRODUCTS[cut]
    assert sum(bool(re.search(r"\b(STL|LDL)\b", i)) for i in busy) <= SPILL_LIMIT
