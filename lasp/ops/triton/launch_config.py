"""Every launch constant of the kernels, with its reason, and the choice of the kernel for a call.

Nothing here is measured at run time: choices follow from shapes, dtypes and the chip, so the same
inputs on the same GPU give the same bits. Ranks with different GPUs may choose differently: what
crosses ranks, a document's whole state, has the same shape either way. `choose_segments` says how a
sequence is divided and whether a scan needs chunk states, `choose_scan` which kernel scans it; all
other code asks these two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from lasp.ops.triton.chip import H200, Chip, chip_of
from lasp.ops.triton.hopper.available import has_gluon
from lasp.ops.triton.segments import SegmentChoice

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
# Rows of a chunk are addressed with 32-bit offsets; no kernel uses chunks longer than this.
MAX_CHUNK = 64

# How many programs of the scan, of 64 value columns each (the Hopper kernel's count twice, those of
# 256 columns four times), run at once on a multiprocessor. A sequence is divided into as many
# segments as fill all of them: more only add states to write and boundaries to cross. On an H200
# the Hopper scan of 131,072 tokens, 16 heads of 128, takes 0.512 ms in 8 segments, 0.516 in 16,
# 0.549 in 64; with 256 keys 0.779 in 8, 0.776 in 16, 0.789 in 32.
RESIDENT_PROGRAMS = 2
# At or above this many values of q, k or v, one more launch costs less than a launch that does
# more: one kernel combines the states of segments, and the Hopper scan is worth its slower launch.
# Forward and backward on an H200, chosen as above and as below it: 0.046 and 0.094 ms against 0.053
# and 0.126 at (1, 4096, 16, 128); 0.057 and 0.133 against 0.096 and 0.255 at (1, 2048, 16, 256). At
# half that size the call is host-bound either way, and costs the host 20 us less without the Hopper
# scan. Other chips: as many per multiprocessor, not measured.
LARGE_VALUES = 2**23
# Shorter segments would move more bytes of states than of tokens.
MIN_SEGMENT = 256
# With a decay per token. The sum that is its gradient starts anew at every boundary, and rounding
# adds up between two of them. (8, 8192, 32, 128), undivided, takes 0.54 ms forward; divided, 0.70.
MAX_SEGMENT_BY_TOKEN = 4096
UNDIVIDED_BY_TOKEN = 8192
# Documents differ in length: shorter segments balance the load of the multiprocessors.
PACKED_SPLIT = 4
# Below LARGE_VALUES, and with at most this many boundaries per document, the scan sums the states
# of earlier segments itself, from L2 (`SegmentChoice.folded`).
MAX_FOLD = 15


class LinearTiles(NamedTuple):
    """Tiles of `decode.linear`: rows, outputs, inputs per step; splits of the inputs."""

    rows: int
    outputs: int
    inputs: int
    splits: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """Tile sizes of a kernel: `key` and `value` block of the state, `chunk` tokens per step."""

    key: int
    value: int
    chunk: int
    num_warps: int
    num_stages: int


# On Hopper. Keyed by (key dim rounded up to 64, 128 or 256; bytes per element). Value dims are
# divided into blocks of `value`, so they need no key of their own. Four warps in 16-bit: more than
# one warpgroup hits a wait race in triton 3.6 (not in Gluon, where every wait and barrier is
# explicit). Chunks of 64 in 16-bit: 32 rows would compile to mma.sync instead of wgmma.
SCAN_TILES = {
    # 90% of the copy roofline on an H200 at (1, 32768, 32, 64) in 8 segments; two stages 73%.
    (64, 2): Tiles(64, 64, 64, 4, 3),
    # Two programs on a multiprocessor, 65% of the copy roofline on an H200 at (1, 131072, 16, 128).
    # A third stage leaves room for one (43%), as do 128 values with 8 warps (46%); 32 values 42%.
    (128, 2): Tiles(128, 64, 64, 4, 2),
    (256, 2): Tiles(256, 64, 64, 4, 2),
    # Exact float32 products are plain FMAs, unrolled: larger tiles make ptxas give up on registers.
    (64, 4): Tiles(64, 32, 16, 4, 1),
    # Eight warps are safe without wgmma, and avoid 450 bytes of spills.
    (128, 4): Tiles(128, 16, 16, 8, 1),
    (256, 4): Tiles(256, 16, 16, 8, 1),
}
STATE_TILES = {
    # A whole 64 x 64 state; the value block stays at 64 so that small E wastes little.
    (64, 2): Tiles(64, 64, 64, 4, 3),
    # 128 x 128 reads k and v once for the usual head; 204 registers, no spills. With five stages a
    # program has a multiprocessor to itself: the forward takes 0.692 ms on an H200 at
    # (1, 131072, 16, 128), with four stages 0.736, with three 0.734.
    (128, 2): Tiles(128, 128, 64, 4, 5),
    # Two key blocks read v twice, the second time from L2; one block of 256 would spill.
    (256, 2): Tiles(128, 128, 64, 4, 3),
    (64, 4): Tiles(64, 32, 32, 4, 1),
    (128, 4): Tiles(64, 32, 32, 4, 1),
    (256, 4): Tiles(64, 32, 32, 4, 1),
}
# dk and dv by one Triton scan, of heads of at most 64 in 16-bit on Hopper: 207 us on an H200 at
# (1, 32768, 32, 64), 260 with a decay per token and dots; two stages 239 and 295, two scans 270 and
# 388 (triton 3.6). It spills at most 16 bytes with triton 3.6, 88 with 3.9.
SCAN_DKDV_TILES = Tiles(64, 64, 64, 4, 3)
# Other chips: compiled for them by tests/compile_kernels.py, never timed. "mma" serves chips with
# 99 KiB of shared memory (sm_86, sm_89, sm_120) as well as sm_80. Its products take operands from
# registers: chunks of 32 tokens and fewer columns keep two programs on a multiprocessor and spill
# at most 144 bytes per thread, where Hopper's tiles spill up to 8,592.
SCAN_TILES_OF = {
    "wgmma": SCAN_TILES,
    "mma": SCAN_TILES
    | {
        (64, 2): Tiles(64, 64, 32, 4, 3),
        (128, 2): Tiles(128, 64, 32, 4, 3),
        (256, 2): Tiles(256, 32, 16, 4, 3),
    },
    # Eight warps spill 48 bytes, four 1,400.
    "tcgen05": SCAN_TILES | {(256, 2): Tiles(256, 64, 64, 8, 2)},
}
STATE_TILES_OF = {
    "wgmma": STATE_TILES,
    # No spills, two programs on a multiprocessor.
    "mma": STATE_TILES
    | {
        (128, 2): Tiles(128, 128, 32, 4, 3),
        (256, 2): Tiles(128, 128, 32, 4, 3),
    },
    "tcgen05": STATE_TILES,
}
# Elements of the state that one combine program takes through a document's segments: so few that
# 16 heads of 128 x 128 still make 512 programs with several segments' loads in flight each.
COMBINE_BLOCK = 512
COMBINE_WARPS, COMBINE_STAGES = 4, 4
# Columns of the state per program of a decoding step. 64 sequences, 32 heads of 128, on an H200:
# 68 us, 91% of the bandwidth of a copy (32 columns: 70 us, 128: 71 us).
STEP_VALUE_BLOCK = 64
STEP_WARPS = 4
# One program per sequence reads all of its logits.
ARGMAX_BLOCK, ARGMAX_WARPS = 8192, 16
# Above as many rows a product is no longer bound by its weights: cuBLAS takes over.
MAX_DECODE_ROWS = 64
# Blocks of rows and outputs of a product that is split.
MAX_DECODE_PROGRAMS = 4096
# Bytes of shared memory for the stages of a product: "mma" includes GPUs with 99 KiB per program.
DECODE_SHARED = {"wgmma": 220 * 1024, "tcgen05": 220 * 1024, "mma": 96 * 1024}
# A decay per token: heads and tokens of a tile of its cumulative sums, 32 float64 per thread.
DECAY_HEADS, DECAY_TOKENS = 16, 256
DECAY_WARPS = 4
# Its gradient: tokens per step, and values of a state per step of a dot product of two states.
GRADIENT_TOKENS, GRADIENT_STATE_BLOCK = 1024, 2048
# LRPE: tokens per tile; 16 x 128 values over 4 warps leave room for two tensors and their tables.
LRPE_TOKENS = 16
LRPE_WARPS = 4
# Most programs per head in LRPE's backward, each with one float64 row of the rates' gradient.
LRPE_MAX_ROWS = 128
# The joined gradient of q, k, v and u: heads of tokens per program, 16 x 128 values of each.
HEADS_ROWS = 16
HEADS_WARPS = 8
# Floats of a state per counter and per iteration of a program that sends or receives it: 1 MiB of
# state makes 64 chunks.
SEND_CHUNK = 4096
SEND_WARPS = 8
# Such programs hold multiprocessors while they wait, so few are used when they overlap with other
# kernels: (most programs, of every how many multiprocessors at most one).
SEND_PROGRAMS, SEND_PROGRAMS_OVERLAPPED = (64, 2), (16, 8)

# The Hopper scan: tokens per chunk, columns of a block of the state and of one copy of y, buffers.
HOPPER_CHUNK = 64
HOPPER_VALUE_BLOCK = 64
# A third is no faster at (1, 131072, 16, 128): 0.525 ms against 0.519.
HOPPER_STAGES = 2
# What the TMA unit can address: 16-byte steps below 2**40 bytes and 32-bit coordinates.
COPY_STEP = 16
MAX_COPY_STRIDE = 2**40
MAX_COPY_TOKENS = 2**31 - 2 * HOPPER_CHUNK


class HopperTiles(NamedTuple):
    """What a program of the Hopper scan computes, and with how many registers.

    Each of its two warpgroups that hold states has `blocks` blocks of 64 value columns over `keys`
    keys, and multiplies `part` keys at a time. `registers` are per thread of the second of these,
    of the warpgroup that computes scores, and of the warp that loads; the first gets the rest of
    512. Only the prologue may spill: two scans in one launch took 1.53 ms instead of 0.96 where the
    score warpgroup spilled 25 registers in every chunk.
    """

    keys: int
    blocks: int
    part: int
    registers: tuple[int, int, int]


NARROW = HopperTiles(128, 1, 64, (168, 128, 24))
# A state of 128 registers per thread. With fewer than 208 registers products wait for each other.
WIDE_KEYS = HopperTiles(256, 1, 64, (208, 72, 24))
WIDE_VALUES = HopperTiles(128, 2, 64, (208, 72, 24))


def large_values(chip: Chip) -> int:
    """LARGE_VALUES for a chip with more or fewer multiprocessors."""
    return -(-LARGE_VALUES * chip.multiprocessors // H200.multiprocessors)


class ScanShape(NamedTuple):
    """Sizes of a, b [B, T, H, A] and x [B, T, H, X] of a scan; `packed`: of documents, B is 1."""

    batch: int
    seq_len: int
    num_heads: int
    key_dim: int
    value_dim: int
    packed: bool

    def is_large(self, chip: Chip) -> bool:
        """True if a call is bound by the GPU, not by the host."""
        rows = self.batch * self.seq_len * self.num_heads
        return rows * max(self.key_dim, self.value_dim) >= large_values(chip)


class ScanChoice(NamedTuple):
    """The kernel for a scan, its tiles, how many results a launch computes, and the segments."""

    kernel: Literal["triton", "hopper"]
    tiles: Tiles | HopperTiles
    num_results: int
    segments: SegmentChoice


@lru_cache(maxsize=1024)
def choose_segments(
    shape: ScanShape, device: torch.device, *, by_token: bool = False
) -> SegmentChoice:
    """How the documents of a scan are divided; `by_token`: with a decay per token.

    Depends on shapes and the chip, never on where packed documents begin, so that a traced graph
    holds for any documents. Symmetric in the two head dims: the backward exchanges them.
    """
    chip = chip_of(device)
    length = segment_length(shape, chip)
    if by_token and shape.seq_len > min(length, UNDIVIDED_BY_TOKEN):
        length = min(length, MAX_SEGMENT_BY_TOKEN)
    boundaries = (shape.seq_len - 1) // length if shape.seq_len else 0
    # The gradient of a decay needs all that crosses a boundary.
    foldable = not (shape.packed or shape.is_large(chip) or by_token)
    folded = foldable and 2 <= boundaries <= MAX_FOLD
    # Each boundary follows a full-length segment, so packing documents adds none.
    return SegmentChoice(length, boundaries * shape.batch, folded)


def segment_length(shape: ScanShape, chip: Chip) -> int:
    """Tokens per segment for documents of `seq_len` tokens each (packed: together)."""
    # Value blocks of the scan with the fewer of them: both directions then have enough programs.
    programs = shape.batch * shape.num_heads * -(-min(shape.key_dim, shape.value_dim) // 64)
    # The Triton scan of such wide heads, which small inputs and all chips but Hopper get, has a
    # multiprocessor to itself, or half of one for 32 columns.
    hopper = chip.products == "wgmma" and shape.is_large(chip)
    alone = max(shape.key_dim, shape.value_dim) > 128 and not hopper
    resident = RESIDENT_PROGRAMS * chip.multiprocessors // (2 if alone else 1)
    segments = max(1, resident // max(programs, 1))
    if shape.packed:
        segments *= PACKED_SPLIT
    length = -(-shape.seq_len // segments)
    # Whole chunks, so that only the last segment has a partial one.
    length = -(-length // MAX_CHUNK) * MAX_CHUNK
    return min(max(length, MIN_SEGMENT), max(shape.seq_len, 1))


@lru_cache(maxsize=1024)
def choose_scan(
    shape: ScanShape,
    dtype: torch.dtype,
    device: torch.device,
    num_results: int,
    *,
    copyable: bool = True,
    by_token: bool = False,
    with_dots: bool = False,
) -> ScanChoice:
    """The kernel that scans operands of this shape, dtype and device.

    num_results: 1 for y, 2 for dv and dk, if a kernel computes both in a launch.
    copyable: False if Hopper's TMA unit cannot fetch the operands (`launcher.is_copyable`).
    by_token: with a decay per token. with_dots: with dot products of the results' rows.
    """
    chip, segments = chip_of(device), choose_segments(shape, device, by_token=by_token)
    if with_dots and max(shape.key_dim, shape.value_dim) > NARROW.keys:
        # The Hopper scan has no shared memory left for one more operand.
        copyable = False
    if copyable and _hopper_is_faster(shape, dtype, num_results, chip) and has_gluon(device):
        tiles = hopper_tiles(shape.key_dim, shape.value_dim, num_results)
        return ScanChoice("hopper", tiles, num_results, segments)
    if num_results == 2 and _is_one_block(shape, dtype) and chip.products == "wgmma":
        return ScanChoice("triton", SCAN_DKDV_TILES, 2, segments)
    return ScanChoice("triton", scan_tiles(shape.key_dim, dtype, chip), 1, segments)


def _hopper_is_faster(shape: ScanShape, dtype: torch.dtype, num_results: int, chip: Chip) -> bool:
    """True if the Hopper scan computes this, and faster than the Triton scan."""
    # Two results have both head dims as keys.
    most_keys = WIDE_KEYS.keys if num_results == 1 else WIDE_VALUES.keys
    return (
        dtype in (torch.bfloat16, torch.float16)
        and 64 < shape.key_dim <= most_keys
        and shape.value_dim > 64
        and (num_results == 1 or shape.value_dim <= most_keys)
        and shape.seq_len <= MAX_COPY_TOKENS
        and shape.is_large(chip)
    )


def _is_one_block(shape: ScanShape, dtype: torch.dtype) -> bool:
    """True if one program of the scan for dk and dv holds a head's state."""
    fits = shape.key_dim <= SCAN_DKDV_TILES.key and shape.value_dim <= SCAN_DKDV_TILES.value
    return fits and dtype in (torch.bfloat16, torch.float16)


def hopper_tiles(key_dim: int, value_dim: int, num_results: int) -> HopperTiles:
    """Tiles of the Hopper scan."""
    if key_dim > NARROW.keys:
        return WIDE_KEYS
    wide = num_results == 2 or value_dim > 2 * HOPPER_VALUE_BLOCK
    return WIDE_VALUES if wide else NARROW


def scan_tiles(key_dim: int, dtype: torch.dtype, chip: Chip) -> Tiles:
    """Tiles of the Triton scan for operands of `key_dim` and `dtype`."""
    return SCAN_TILES_OF[chip.products][_dim_class(key_dim), dtype.itemsize]


def state_tiles(
    key_dim: int, value_dim: int, dtype: torch.dtype, num_states: int, device: torch.device
) -> Tiles:
    """Tiles of the state kernel for `num_states` states [key_dim, value_dim] from `dtype`."""
    chip = chip_of(device)
    tiles = STATE_TILES_OF[chip.products][_dim_class(key_dim), dtype.itemsize]
    # Too few to fill the GPU: smaller tiles put more loads in flight, the second ones from L2.
    for smaller in ({"value": 64}, {"value": 64, "key": 64}):
        blocks = -(-key_dim // tiles.key) * -(-value_dim // tiles.value)
        if tiles.key > 64 and num_states * blocks < chip.multiprocessors:
            tiles = tiles._replace(**smaller)
    return tiles


def send_programs(device: torch.device, overlapped: bool) -> int:
    """Most programs that send or receive a state."""
    most, share = SEND_PROGRAMS_OVERLAPPED if overlapped else SEND_PROGRAMS
    return max(1, min(most, chip_of(device).multiprocessors // share))


def _dim_class(dim: int) -> int:
    assert 1 <= dim <= MAX_HEAD_DIM, dim
    return 64 if dim <= 64 else 128 if dim <= 128 else 256


def choose_linear(
    rows: int, outputs: int, inputs: int, gated: bool, device: torch.device
) -> LinearTiles:
    """The tiles of a product of few rows with a weight matrix (`decode.linear`).

    Measured in TNL-1b and TNL-385m. Matrices with fewer outputs than inputs have too few blocks of
    outputs to fill a GPU: their inputs are split among programs.
    """
    narrow = outputs <= inputs
    if rows == 1:
        if narrow:
            return LinearTiles(1, 2, 1024, 1, 4, 1)
        if gated and outputs < 4096:
            return LinearTiles(1, 4, 256, 1, 2, 1)
        return LinearTiles(1, 8, 512 if outputs < 8192 and not gated else 256, 1, 4, 1)
    if rows <= 16:
        if narrow:
            tiles = LinearTiles(16, 64, 256 if inputs > outputs else 128, 4, 4, 4)
        elif gated:
            tiles = LinearTiles(16, 32, 128, 1, 4, 4)
        else:
            tiles = LinearTiles(16, 64, 256, 1, 4, 4 if outputs < 32768 else 3)
    else:
        block = 32 if rows <= 32 else MAX_DECODE_ROWS
        if narrow and inputs > outputs:
            tiles = LinearTiles(block, 64, 128, 4, 8, 4)
        elif narrow:
            tiles = LinearTiles(block, 32, 128, 2, 4, 4)
        elif gated:
            tiles = LinearTiles(block, 32, 64, 1, 4, 6)
        elif outputs < 32768:
            tiles = LinearTiles(block, 64, 128, 1, 4, 5)
        else:
            tiles = LinearTiles(block, 128, 64, 1, 8, 4)
    stage = 2 * tiles.inputs * (tiles.rows + tiles.outputs * (2 if gated else 1))
    stages = min(tiles.num_stages, DECODE_SHARED[chip_of(device).products] // stage)
    return tiles._replace(num_stages=max(2, stages))


def choose_mixer(rows: int, num_heads: int) -> tuple[int, int, bool]:
    """Of a token step's mixer: value columns per program, warps, and whether it starts before the
    product in front of it has ended, which many programs delay."""
    states = rows * num_heads
    if states >= 1024:
        return 64, 4, False
    return 32, 8, states < 128


def has_dependent_launch(device: torch.device) -> bool:
    """True if a kernel can start before the one in front of it has ended (compute capability 9.0
    and 10.x; 12.0 was not tried)."""
    return chip_of(device).products in ("wgmma", "tcgen05")
