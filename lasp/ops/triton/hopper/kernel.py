"""The Hopper scan in Gluon: specialised warps, fed by TMA (see `scan`).

A program scans one head's segment for some value columns. The load warp copies its chunks of a, b
and x into a ring of buffers in shared memory. The score warps, one warpgroup, compute what needs no
state: P = decay * (a b^T) and w = x * decay. The state warps, two warpgroups, hold the states of
some columns each, in float32 registers: y = decay * (a state) + P x, state = decay * state + b^T w.

With PAIR a program computes two scans for all columns, of a, b, x and of c, x, b, with one
warpgroup for each. They share all operands and w, since b^T (x * decay) is the transpose of
x^T (b * decay).

With a decay per token the score warps leave the decays of each chunk in shared memory, for all.
WITH_DOTS adds the dot products of every row of y with that of c (PAIR: of z with a), from
accumulators in float32.

Barriers of each buffer: `full`, the copies have landed; `w_ready`, w is stored; `p_ready`, P is;
`empty`, every warpgroup is done with it. A buffer is full again only after it was empty, so nothing
else has to guard P and w.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from lasp.ops.triton.cumulative import remaining, row_of_decay
from lasp.ops.triton.hopper.language import barrier
from lasp.ops.triton.hopper.warps import load_warp, score_warps, state_warps
from lasp.ops.triton.segments import locate_segment


@gluon.jit(do_not_specialize=["scale", "T", "segments_per_row", "segment_length"])
def hopper_scan_kernel(
    a_descriptor, b_descriptor, x_descriptor, c_descriptor, y_descriptor, z_descriptor,
    p_y, p_z, p_initial, p_segment, p_log_decay, p_table, p_dots,
    stride_in, stride_ih, stride_ia, stride_ix, stride_sn, stride_sh, stride_sa, stride_sx,
    scale, T, segments_per_row, segment_length, H,
    A: gl.constexpr, X: gl.constexpr, BA: gl.constexpr, BX: gl.constexpr, BC: gl.constexpr,
    BLOCKS: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr,
    REVERSE: gl.constexpr, PACKED: gl.constexpr, HAS_INITIAL: gl.constexpr,
    HAS_SEGMENT: gl.constexpr, BY_TOKEN: gl.constexpr, WITH_DOTS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Allocate the shared memory and start the warps; REGISTERS are those of all but the first.

    With PAIR, a program computes y = scan(a, b, x) and z = scan(c, x, b): the states of one are the
    transposed states of the other.
    """
    BW: gl.constexpr = x_descriptor.block_type.shape[3]
    NX: gl.constexpr = (X + BW - 1) // BW
    i_p = gl.program_id(0)
    i_x = i_p % NX * BW
    i_h = i_p // NX % H
    i_n, i_b, start, count, outside, i_boundary = locate_segment(
        p_table, i_p // (NX * H), T, segments_per_row, segment_length, PACKED, REVERSE
    )
    p_y += (i_b * T + start) * H * X
    initial = ()
    segment = ()
    initial_mT = ()
    segment_mT = ()
    if HAS_INITIAL:
        p_initial += i_n * stride_in + i_h.to(gl.int64) * stride_ih
        initial = (p_initial, stride_ia, stride_ix)
        initial_mT = (p_initial, stride_ix, stride_ia)
    if HAS_SEGMENT:
        p_segment += i_boundary * stride_sn + i_h.to(gl.int64) * stride_sh
        segment = (p_segment, stride_sa, stride_sx)
        segment_mT = (p_segment, stride_sx, stride_sa)
    # TMA takes 32-bit coordinates and makes 64-bit addresses of them.
    where = (i_b.to(gl.int32), i_h, start.to(gl.int32), count)
    if BY_TOKEN:
        # The cumulative sums from the segment's first token on.
        decay = row_of_decay(p_log_decay, i_b, i_h, T, H) + start
        outside_decay = 1.0
        if HAS_INITIAL:
            if REVERSE:
                outside_decay = remaining(decay + count, decay + count + outside)
            else:
                outside_decay = remaining(decay - outside, decay)
    else:
        decay = gl.load(p_log_decay + i_h)
        outside_decay = gl.exp(decay * outside.to(gl.float32))

    dtype: gl.constexpr = a_descriptor.dtype
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BC], dtype)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BA], a_descriptor.layout)
    b_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BA], b_descriptor.layout)
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BW], x_descriptor.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BW], x_descriptor.layout)
    NP: gl.constexpr = 2 if PAIR else 1
    p_tiles = gl.allocate_shared_memory(dtype, [STAGES * NP, BC, BC], p_layout)
    y_tiles = gl.allocate_shared_memory(dtype, [2, 1, BC, 1, BX], y_descriptor.layout)
    # The decays of the rows of a chunk; or, if constant, of each warpgroup. The score warps store
    # those of a chunk before it lands, while others still read of as many chunks as are buffered.
    NR: gl.constexpr = 2 * STAGES if BY_TOKEN else 2
    row_decays = gl.allocate_shared_memory(gl.float32, [NR, BC], row_layout)
    chunk_decays = gl.allocate_shared_memory(gl.float32, [NR, 1], row_layout)
    positions = gl.allocate_shared_memory(gl.float32, [3 if BY_TOKEN else 1, BC], row_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    w_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    p_ready = gl.allocate_shared_memory(gl.int64, [STAGES * NP, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(w_ready.index(i), count=1)
        # One arrival of each warpgroup that reads the buffer.
        mbarrier.init(empty.index(i), count=3)
    for i in gl.static_range(STAGES * NP):
        mbarrier.init(p_ready.index(i), count=1)
    fence_async_shared()
    barrier()

    barriers = (full, w_ready, p_ready, empty)
    scratch = (p_tiles, y_tiles, row_decays, chunk_decays)
    decay_tiles = (row_decays, chunk_decays)
    state_in = (initial, segment, outside, outside_decay)
    factors = (decay, scale)
    dots = ()

    # fmt: off
    # Constants stay constants only where the arguments are written into the call.
    if PAIR:
        c_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BA], c_descriptor.layout)
        p_z += (i_b * T + start) * H * A
        tiles = (a_tiles, b_tiles, x_tiles, c_tiles)
        descriptors = (a_descriptor, b_descriptor, x_descriptor, c_descriptor)
        y_operands = (a_tiles, b_tiles, x_tiles, w_tiles)
        z_operands = (c_tiles, w_tiles, b_tiles, b_tiles)
        state_in_mT = (initial_mT, segment_mT, outside, outside_decay)
        if WITH_DOTS:
            p_dots += (i_b * H + i_h) * (BA // 16) * T + start
            dots = (a_tiles, p_dots, T)
        gl.warp_specialize([
            (state_warps, (y_operands, scratch, barriers, y_descriptor, p_y, state_in, where,
                 factors, i_x, H, (), 0, 0, 0,
                 A, X, BC, BA, BX, BLOCKS, PART, STAGES, REVERSE, HAS_INITIAL, HAS_SEGMENT,
                 BY_TOKEN)),
            (state_warps, (z_operands, scratch, barriers, z_descriptor, p_z, state_in_mT, where,
                 factors, i_x, H, dots, 1, 1, 0,
                 X, A, BC, BA, BX, BLOCKS, PART, STAGES, REVERSE, HAS_INITIAL, HAS_SEGMENT,
                 BY_TOKEN)),
            (score_warps, (tiles, p_tiles, w_tiles, positions, decay_tiles, barriers, where,
                 factors, BC, BA, BX, STAGES, REVERSE, PAIR, BY_TOKEN)),
            (load_warp, (descriptors, (0, 0, 0, 0), tiles, barriers, where, BC, STAGES, REVERSE)),
        ], [4, 4, 1], REGISTERS)
    else:
        tiles = (a_tiles, b_tiles, x_tiles)
        descriptors = (a_descriptor, b_descriptor, x_descriptor)
        columns = (0, 0, i_x)
        if WITH_DOTS:
            c_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BW], c_descriptor.layout)
            tiles = (a_tiles, b_tiles, x_tiles, c_tiles)
            descriptors = (a_descriptor, b_descriptor, x_descriptor, c_descriptor)
            columns = (0, 0, i_x, i_x)
            p_dots += (i_b * H + i_h) * (NX * BW // 16) * T + start
            dots = (c_tiles, p_dots, T)
        operands = (a_tiles, b_tiles, x_tiles, w_tiles)
        gl.warp_specialize([
            (state_warps, (operands, scratch, barriers, y_descriptor, p_y, state_in, where,
                 factors, i_x, H, dots, 0, 0, 0,
                 A, X, BC, BA, BX, BLOCKS, PART, STAGES, REVERSE, HAS_INITIAL, HAS_SEGMENT,
                 BY_TOKEN)),
            (state_warps, (operands, scratch, barriers, y_descriptor, p_y, state_in, where,
                 factors, i_x + BW // 2, H, dots, 1, 0, BW // 2,
                 A, X, BC, BA, BX, BLOCKS, PART, STAGES, REVERSE, HAS_INITIAL, HAS_SEGMENT,
                 BY_TOKEN)),
            (score_warps, (tiles, p_tiles, w_tiles, positions, decay_tiles, barriers, where,
                 factors, BC, BA, BX, STAGES, REVERSE, PAIR, BY_TOKEN)),
            (load_warp, (descriptors, columns, tiles, barriers, where, BC, STAGES, REVERSE)),
        ], [4, 4, 1], REGISTERS)
    # fmt: on
