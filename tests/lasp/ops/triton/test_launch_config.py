"""Which kernel scans what, and when a scan needs chunk states."""

import pytest
import torch

from lasp.ops.triton.launch_config import (
    MAX_SEGMENT_BY_TOKEN,
    ScanShape,
    choose_scan,
    choose_segments,
)
from tests.lasp.ops.triton.launch_constants import launch_constants

BF16, FP32 = torch.bfloat16, torch.float32
# An H200 in these choices, where there is no GPU.
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "seq_len, key_dim, value_dim, dtype, num_results, kernel, num_launched",
    [
        (131072, 128, 128, BF16, 1, "hopper", 1),
        (131072, 128, 128, BF16, 2, "hopper", 2),
        (131072, 256, 128, BF16, 1, "hopper", 1),
        # Both head dims of dv and dk are keys.
        (131072, 256, 128, BF16, 2, "triton", 1),
        (131072, 128, 256, BF16, 2, "triton", 1),
        (131072, 64, 64, BF16, 1, "triton", 1),
        (131072, 128, 128, FP32, 1, "triton", 1),
        (2048, 128, 128, BF16, 1, "triton", 1),
    ],
)
def test_large_16_bit_heads_get_the_hopper_scan(
    seq_len, key_dim, value_dim, dtype, num_results, kernel, num_launched
):
    shape = ScanShape(1, seq_len, 16, key_dim, value_dim, packed=False)
    for available in (True, False):
        with launch_constants(has_gluon=lambda device, available=available: available):
            choice = choose_scan(shape, dtype, GPU, num_results)
            other = choose_scan(shape, dtype, GPU, num_results, copyable=False)
        wanted = (kernel, num_launched) if available else ("triton", 1)
        assert (choice.kernel, choice.num_results) == wanted
        assert (other.kernel, other.num_results) == ("triton", 1)
        assert choice.segments == other.segments


def test_one_launch_computes_dk_and_dv_of_small_heads():
    for seq_len, key_dim, value_dim, dtype, wanted in (
        (131072, 64, 64, BF16, 2),
        (100, 33, 64, torch.float16, 2),
        (131072, 64, 65, BF16, 1),
        (131072, 64, 64, FP32, 1),
    ):
        shape = ScanShape(1, seq_len, 16, key_dim, value_dim, packed=False)
        for copyable in (True, False):
            choice = choose_scan(shape, dtype, GPU, 2, copyable=copyable)
            assert (choice.kernel, choice.num_results) == ("triton", wanted)
            assert choose_scan(shape, dtype, GPU, 1, copyable=copyable).num_results == 1


@pytest.mark.parametrize(
    "shape, boundaries, folded",
    [
        (ScanShape(1, 256, 16, 128, 128, False), 0, False),
        (ScanShape(1, 2048, 16, 128, 128, False), 7, True),
        (ScanShape(2, 131072, 16, 128, 128, False), 6, False),
        (ScanShape(64, 2048, 32, 128, 128, False), 0, False),
        (ScanShape(1, 2048, 16, 128, 128, True), 7, False),
    ],
)
def test_segments_follow_from_shapes_in_both_directions(shape, boundaries, folded):
    choice = choose_segments(shape, CPU)
    assert (choice.num_boundaries, choice.folded) == (boundaries, folded)
    swapped = shape._replace(key_dim=shape.value_dim + 72, value_dim=shape.key_dim)
    mirrored = swapped._replace(key_dim=swapped.value_dim, value_dim=swapped.key_dim)
    assert choose_segments(swapped, CPU) == choose_segments(mirrored, CPU)


@pytest.mark.parametrize(
    "shape",
    [
        ScanShape(1, 131072, 16, 128, 128, False),
        ScanShape(1, 131072, 16, 128, 128, True),
        ScanShape(8, 131072, 32, 128, 128, False),
        ScanShape(1, 100_001, 3, 64, 128, False),
        ScanShape(1, 131072, 16, 256, 256, False),
    ],
)
def test_a_decay_per_token_has_segments_that_are_short_enough(shape):
    for device in (CPU, GPU):
        choice = choose_segments(shape, device, by_token=True)
        assert choice.length <= MAX_SEGMENT_BY_TOKEN and choice.length % 64 == 0
        assert choice.num_boundaries == shape.batch * ((shape.seq_len - 1) // choice.length)
        assert not choice.folded
        assert choice.length <= choose_segments(shape, device).length
        with launch_constants(has_gluon=lambda device: True):
            for num_results, with_dots in ((1, False), (1, True), (2, True)):
                options = dict(by_token=True, with_dots=with_dots)
                scan = choose_scan(shape, BF16, device, num_results, **options)
                assert scan.segments == choice


def test_short_sequences_are_divided_alike_with_any_decay():
    for shape in (
        ScanShape(8, 2048, 32, 128, 128, False),
        ScanShape(8, 8192, 32, 128, 128, False),
        ScanShape(1, 32768, 32, 64, 64, False),
    ):
        assert choose_segments(shape, GPU, by_token=True) == choose_segments(shape, GPU)
