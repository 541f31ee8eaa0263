"""What is asked of a GPU, and what the launch constants choose on it."""

from types import SimpleNamespace

import pytest
import torch

from lasp.ops.triton.chip import H200, Chip, chip_of
from lasp.ops.triton.launch_config import (
    ScanShape,
    SegmentChoice,
    Tiles,
    choose_scan,
    choose_segments,
    send_programs,
    state_tiles,
)
from tests.lasp.ops.triton.launch_constants import launch_constants

BF16 = torch.bfloat16
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu_of(monkeypatch):
    """Make this machine's GPU one of a name, compute capability and number of multiprocessors."""

    def make(name, major, minor, multiprocessors):
        properties = SimpleNamespace(
            name=name, major=major, minor=minor, multi_processor_count=multiprocessors
        )
        asked = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: (asked.append(device), properties)[1],
        )
        chip_of.cache_clear()
        return asked

    chip_of.cache_clear()
    yield make
    chip_of.cache_clear()


@pytest.mark.parametrize(
    "name, major, minor, multiprocessors, products",
    [
        ("A100", 8, 0, 108, "mma"),
        ("A10", 8, 6, 72, "mma"),
        ("L40S", 8, 9, 142, "mma"),
        ("H100 PCIe", 9, 0, 114, "wgmma"),
        ("B200", 10, 0, 148, "tcgen05"),
        ("RTX 5090", 12, 0, 170, "mma"),
    ],
)
def test_a_gpu_is_asked_once(gpu_of, name, major, minor, multiprocessors, products):
    asked = gpu_of(name, major, minor, multiprocessors)
    assert {chip_of(GPU) for _ in range(3)} == {Chip(multiprocessors, products)}
    assert asked == [GPU]
    assert chip_of(CPU) == H200


def test_a_gpu_without_bfloat16_products_is_refused(gpu_of):
    gpu_of("Tesla T4", 7, 5, 40)
    shape = ScanShape(1, 777, 3, 64, 64, packed=False)
    for choose in (
        lambda: choose_segments(shape, GPU),
        lambda: choose_scan(shape, BF16, GPU, 1),
        lambda: state_tiles(64, 64, BF16, 6, GPU),
    ):
        with pytest.raises(
            ValueError, match=r"Tesla T4 of compute capability 7\.5.* 8\.0 or newer"
        ):
            choose()


# What the measured GPU was given when its launch constants were chosen, in bfloat16.
TRITON_64, TRITON_128 = Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 4, 2)
TRITON_256 = Tiles(256, 64, 64, 4, 2)
CHOICES_OF_H200 = {
    (1, 256, 16, 128, 128, False): (TRITON_128, SegmentChoice(256)),
    (1, 1024, 16, 128, 128, False): (TRITON_128, SegmentChoice(256, 3, True)),
    (1, 4096, 16, 128, 128, False): (TRITON_128, SegmentChoice(512, 7)),
    (1, 131072, 16, 128, 128, False): (TRITON_128, SegmentChoice(16384, 7)),
    (2, 131072, 16, 128, 128, False): (TRITON_128, SegmentChoice(32768, 6)),
    (8, 2048, 32, 128, 128, False): (TRITON_128, SegmentChoice(2048)),
    (1, 32768, 32, 64, 64, False): (TRITON_64, SegmentChoice(4096, 7)),
    (1, 1024, 16, 256, 256, False): (TRITON_256, SegmentChoice(512, 1)),
    (1, 2048, 16, 256, 256, False): (TRITON_256, SegmentChoice(512, 3)),
    (1, 131072, 4, 128, 128, True): (TRITON_128, SegmentChoice(1024, 127)),
    (1, 3000, 16, 96, 100, True): (TRITON_128, SegmentChoice(256, 11)),
}


@pytest.mark.parametrize("shape", CHOICES_OF_H200)
def test_an_h200_gets_what_it_was_measured_with(gpu_of, shape):
    gpu_of("H200", 9, 0, 132)
    for device in (CPU, GPU):
        choice = choose_scan(ScanShape(*shape), BF16, device, 1, copyable=False)
        assert (choice.tiles, choice.segments) == CHOICES_OF_H200[shape]
        assert choice.segments == choose_segments(ScanShape(*shape), device)
    states = [state_tiles(128, 128, BF16, n, GPU) for n in (132, 66, 65)]
    assert states == [
        Tiles(128, 128, 64, 4, 5),
        Tiles(128, 64, 64, 4, 5),
        Tiles(64, 64, 64, 4, 5),
    ]
    assert [send_programs(GPU, overlapped) for overlapped in (False, True)] == [64, 16]


def programs(shape, choice):
    """Programs of a dense scan."""
    segments = -(-shape.seq_len // choice.segments.length)
    blocks = -(-shape.value_dim // choice.tiles.value)
    return shape.batch * shape.num_heads * segments * blocks


@pytest.mark.parametrize(
    "chip", [Chip(72, "mma"), Chip(108, "mma"), Chip(142, "mma"), Chip(148, "tcgen05")]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_programs_fill_the_multiprocessors_that_a_chip_has(chip, dim):
    shape = ScanShape(1, 131072, 2, dim, dim, packed=False)
    constants = dict(chip_of=lambda device: chip, has_gluon=lambda device: False)
    with launch_constants(**constants):
        choice = choose_scan(shape, BF16, GPU, 1)
    # As many as run at once: two on a multiprocessor, or one if it has 64 columns of 256 keys.
    resident = chip.multiprocessors * (1 if choice.tiles.value == 64 and dim == 256 else 2)
    assert 0.85 * resident < programs(shape, choice) <= resident


def test_programs_that_wait_leave_half_of_a_small_chip_free():
    with launch_constants(chip_of=lambda device: Chip(14, "mma")):
        assert [send_programs(GPU, overlapped) for overlapped in (False, True)] == [7, 1]
    with launch_constants(chip_of=lambda device: Chip(5, "mma")):
        assert send_programs(GPU, True) == 1


def test_a_fake_gpu_tensor_gets_the_segments_of_its_device(gpu_of):
    """The shape of a saved tensor: a traced graph and the call that it traces must agree."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lasp import ops

    gpu_of("A10", 8, 6, 72)
    with FakeTensorMode(allow_non_fake_inputs=True):
        k = torch.empty(1, 131072, 4, 128, dtype=BF16, device=GPU)
        shape = ops.segment_states_shape(k, k, None, None)
        decay = torch.empty(1, 131072, 4, device=GPU)
        of_token = ops.segment_states_shape(k, k, decay, None)
    choice = choose_segments(ScanShape(1, 131072, 4, 128, 128, packed=False), GPU)
    assert shape == (choice.num_boundaries, 4, 128, 128)
    by_token = choose_segments(ScanShape(1, 131072, 4, 128, 128, packed=False), GPU, by_token=True)
    assert of_token == (by_token.num_boundaries, 4, 128, 128) != shape
    assert choice != choose_segments(ScanShape(1, 131072, 4, 128, 128, packed=False), CPU)
