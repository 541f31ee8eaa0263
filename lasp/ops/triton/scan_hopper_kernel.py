"""The Hopper scan in Gluon: warps with roles, fed by the copy engine (see `scan_hopper`).

A program is one head's segment and two blocks of value columns. A producer warp copies its chunks
of a, b and x into a ring of buffers in shared memory. One warpgroup makes what needs no state: P =
decay * (a b^T) and x * decay. Two more own a block of columns each, with its state in float32
registers: y = decay * (a state) + P x, state = decay * state + b^T (x * decay).

Three barriers per buffer: `full`, the copies have landed; `ready`, P and the decayed x are there;
`empty`, every warpgroup has left it. A buffer can be full again only after it was empty, so nothing
else has to guard P and the decayed x.

Every product takes both operands from shared memory. With one in registers, triton 3.6 and its
assembler may overwrite an operand of a product that is still in flight.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasp.ops.triton.tiles import locate_segment


@gluon.jit
def _matrix(tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """View a tile of shape [1, ROWS, 1, COLUMNS], as the copy engine knows it, as a matrix."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], tile.dtype)
    return tile._reinterpret(tile.dtype, [ROWS, COLUMNS], layout)


@gluon.jit
def _first_row(i_c, count, BC: gl.constexpr, REVERSE: gl.constexpr):
    """Row of chunk `i_c` in its segment, which may lie before it.

    Chunks lie against the side that the scan starts from: only the last one met can be short, and
    no state leaves that one.
    """
    if REVERSE:
        row = count - (i_c + 1) * BC
    else:
        row = i_c * BC
    return row


@gluon.jit
def _is_short(row, count, BC: gl.constexpr):
    return (row < 0) | (row + BC > count)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """Advance around the ring; the phase of its barriers flips at each turn."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _produce(
    descriptors,
    tiles,
    full,
    empty,
    place,
    count,
    BC: gl.constexpr,
    BX: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
):
    """Fill buffers; rows outside the tensors arrive as zeros, neighbours' rows as they are."""
    a_descriptor, b_descriptor, x_descriptor = descriptors
    a_tiles, b_tiles, x_tiles = tiles
    i_b, i_h, i_x, start = place
    nbytes: gl.constexpr = (
        a_descriptor.block_type.nbytes
        + b_descriptor.block_type.nbytes
        + 2 * x_descriptor.block_type.nbytes
    )
    stage = 0
    phase = 1
    for i_c in range(gl.cdiv(count, BC)):
        t = start + _first_row(i_c, count, BC, REVERSE)
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, nbytes)
        tma.async_copy_global_to_shared(a_descriptor, [i_b, t, i_h, 0], bar, a_tiles.index(stage))
        tma.async_copy_global_to_shared(b_descriptor, [i_b, t, i_h, 0], bar, b_tiles.index(stage))
        for i_w in gl.static_range(2):
            x_tile = x_tiles.index(2 * stage + i_w)
            tma.async_copy_global_to_shared(
                x_descriptor, [i_b, t, i_h, i_x + i_w * BX], bar, x_tile
            )
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _weigh(
    tiles,
    p_tiles,
    w_tiles,
    full,
    ready,
    empty,
    log_decay,
    scale,
    count,
    BC: gl.constexpr,
    BA: gl.constexpr,
    BX: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
):
    """Make P and the decayed x of every chunk; in a short one, wipe the rows of x outside it."""
    a_tiles, b_tiles, x_tiles = tiles
    dtype: gl.constexpr = x_tiles.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BC, 16])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BX, BX // 8], [4, 1], [1, 0])
    o_i = gl.arange(0, BC, gl.SliceLayout(1, mma))[:, None]
    o_j = gl.arange(0, BC, gl.SliceLayout(0, mma))[None, :]
    o_c = gl.arange(0, BC, gl.SliceLayout(1, by_row))[:, None]
    if REVERSE:
        distance = o_j - o_i  # [BC, BC]
        column = scale * gl.exp(log_decay * (o_c + 1))  # [BC, 1]
    else:
        distance = o_i - o_j  # [BC, BC]
        column = gl.exp(log_decay * (BC - 1 - o_c))  # [BC, 1]
    # A head's decay is fixed, so its matrix is built once; masked first: no exponent is positive.
    decay = scale * gl.exp(log_decay * gl.maximum(distance, 0))  # [BC, BC]
    decay = gl.where(distance >= 0, decay, 0.0)

    stage = 0
    phase = 0
    for i_c in range(gl.cdiv(count, BC)):
        row = _first_row(i_c, count, BC, REVERSE)
        a = _matrix(a_tiles.index(stage), BC, BA)
        b = _matrix(b_tiles.index(stage), BC, BA)
        zeros = gl.zeros([BC, BC], gl.float32, mma)
        mbarrier.wait(full.index(stage), phase)
        s = warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)
        for i_w in gl.static_range(2):
            x_tile = _matrix(x_tiles.index(2 * stage + i_w), BC, BX)
            x = x_tile.load(by_row)
            if _is_short(row, count, BC):
                # A weight of zero would not stop what is not finite in the neighbour's rows.
                x = gl.where((o_c + row >= 0) & (o_c + row < count), x, 0.0).to(dtype)
                x_tile.store(x)
            w_tiles.index(2 * stage + i_w).store((x.to(gl.float32) * column).to(dtype))
        s = warpgroup_mma_wait(0, deps=[s])
        p = s * decay
        if _is_short(row, count, BC):
            live_i = (o_i + row >= 0) & (o_i + row < count)
            live_j = (o_j + row >= 0) & (o_j + row < count)
            p = gl.where(live_i & live_j, p, 0.0)
        p_tiles.index(stage).store(p.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(ready.index(stage), count=1)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _entering_state(
    initial,
    segment,
    log_decay,
    outside,
    o_x,
    A: gl.constexpr,
    X: gl.constexpr,
    BA: gl.constexpr,
    BX: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    HAS_SEGMENT: gl.constexpr,
    mma: gl.constexpr,
):
    """Return the state [BA, BX] that enters the segment."""
    o_a = gl.arange(0, BA, gl.SliceLayout(1, mma))[:, None]
    live = (o_a < A) & (o_x < X)
    state = gl.zeros([BA, BX], gl.float32, mma)
    if HAS_SEGMENT:
        p_segment, stride_a, stride_x = segment
        o_state = o_a * stride_a + o_x * stride_x
        state += gl.load(p_segment + o_state, mask=live & (outside > 0), other=0.0)
    if HAS_INITIAL:
        p_initial, stride_a, stride_x = initial
        o_state = o_a * stride_a + o_x * stride_x
        entering = gl.load(p_initial + o_state, mask=live, other=0.0).to(gl.float32)
        state += entering * gl.exp(log_decay * outside.to(gl.float32))
    return state


@gluon.jit
def _carry(
    tiles,
    p_tiles,
    w_tiles,
    s_tiles,
    y_tiles,
    full,
    ready,
    empty,
    y_descriptor,
    p_y,
    initial,
    segment,
    place,
    log_decay,
    scale,
    outside,
    count,
    H,
    i_w: gl.constexpr,
    A: gl.constexpr,
    X: gl.constexpr,
    BC: gl.constexpr,
    BA: gl.constexpr,
    BX: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    HAS_SEGMENT: gl.constexpr,
):
    """Carry the state of the program's value block `i_w` over the segment and write its y."""
    a_tiles, b_tiles, x_tiles = tiles
    i_b, i_h, i_x, start = place
    i_x += i_w * BX
    dtype: gl.constexpr = x_tiles.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BX, 16])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BX, BX // 8], [4, 1], [1, 0])
    o_c = gl.arange(0, BC, gl.SliceLayout(1, mma))[:, None]
    o_x = i_x + gl.arange(0, BX, gl.SliceLayout(0, mma))[None, :]
    o_t = gl.arange(0, BC, gl.SliceLayout(1, by_row))[:, None]
    o_y = i_x + gl.arange(0, BX, gl.SliceLayout(0, by_row))[None, :]
    if REVERSE:
        row_decay = gl.exp(log_decay * (BC - 1 - o_c))  # [BC, 1]
    else:
        row_decay = scale * gl.exp(log_decay * (o_c + 1))  # [BC, 1]
    chunk_decay = gl.exp(log_decay * BC)
    s_tile = s_tiles.index(i_w)
    y_tile = y_tiles.index(i_w)
    y_matrix = _matrix(y_tile, BC, BX)
    state = _entering_state(
        initial,
        segment,
        log_decay,
        outside,
        o_x,
        A,
        X,
        BA,
        BX,
        HAS_INITIAL,
        HAS_SEGMENT,
        mma,
    )
    s_tile.store(state.to(dtype))
    # Decayed ahead of the product that adds to it: the assembler waits for all products in flight
    # where the registers of a finished one are used.
    state = state * chunk_decay

    stage = 0
    phase = 0
    for i_c in range(gl.cdiv(count, BC)):
        a = _matrix(a_tiles.index(stage), BC, BA)
        b = _matrix(b_tiles.index(stage), BC, BA)
        x = _matrix(x_tiles.index(2 * stage + i_w), BC, BX)
        w = w_tiles.index(2 * stage + i_w)
        zeros = gl.zeros([BC, BX], gl.float32, mma)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.wait(full.index(stage), phase)
        y = warpgroup_mma(a, s_tile, zeros, use_acc=False, is_async=True)
        mbarrier.wait(ready.index(stage), phase)
        state = warpgroup_mma(b.permute((1, 0)), w, state, is_async=True)
        y = warpgroup_mma_wait(1, deps=[y])
        y = warpgroup_mma(p_tiles.index(stage), x, y * row_decay, is_async=True)
        # Products end in the order they began: the state is complete while y is in flight.
        state = warpgroup_mma_wait(1, deps=[state])
        s_tile.store(state.to(dtype))
        y = warpgroup_mma_wait(0, deps=[y])
        state = state * chunk_decay
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)

        # The last copy may still be reading the tile: one thread waits for it, all for the thread.
        tma.store_wait(0)
        gl.thread_barrier()
        y_matrix.store(y.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        row = _first_row(i_c, count, BC, REVERSE)
        if _is_short(row, count, BC):
            # Copied whole, the tile would overwrite the neighbour's rows.
            live = (o_t + row >= 0) & (o_t + row < count) & (o_y < X)
            p_row = p_y + (row.to(gl.int64) * H + i_h) * X
            gl.store(p_row + o_t * (H * X) + o_y, y_matrix.load(by_row), mask=live)
        else:
            tma.async_copy_shared_to_global(y_descriptor, [i_b, start + row, i_h, i_x], y_tile)
        stage, phase = _next(stage, phase, STAGES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["scale", "T", "segments_per_row", "segment_length"])
def scan_hopper_kernel(
    a_descriptor,
    b_descriptor,
    x_descriptor,
    y_descriptor,
    p_y,
    p_initial,
    p_segment,
    p_log_decay,
    p_table,
    stride_in,
    stride_ih,
    stride_ia,
    stride_ix,
    stride_sn,
    stride_sh,
    stride_sa,
    stride_sx,
    scale,
    T,
    segments_per_row,
    segment_length,
    H,
    A: gl.constexpr,
    X: gl.constexpr,
    BA: gl.constexpr,
    BX: gl.constexpr,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
    PACKED: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    HAS_SEGMENT: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Hand out the shared memory and the roles; REGISTERS are those of the three worker roles."""
    NX: gl.constexpr = (X + 2 * BX - 1) // (2 * BX)
    i_p = gl.program_id(0)
    i_x = i_p % NX * (2 * BX)
    i_h = i_p // NX % H
    i_n, i_b, start, count, outside, slot = locate_segment(
        p_table, i_p // (NX * H), T, segments_per_row, segment_length, PACKED, REVERSE
    )
    p_y += (i_b * T + start) * H * X
    if HAS_INITIAL:
        p_initial += i_n * stride_in + i_h.to(gl.int64) * stride_ih
        initial = (p_initial, stride_ia, stride_ix)
    else:
        initial = ()
    if HAS_SEGMENT:
        p_segment += slot * stride_sn + i_h.to(gl.int64) * stride_sh
        segment = (p_segment, stride_sa, stride_sx)
    else:
        segment = ()
    # The copy engine takes 32-bit coordinates and makes 64-bit addresses of them.
    place = (i_b.to(gl.int32), i_h, i_x, start.to(gl.int32))
    log_decay = gl.load(p_log_decay + i_h)

    dtype: gl.constexpr = a_descriptor.dtype
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BC], dtype)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BX], dtype)
    s_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BA, BX], dtype)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = (
        gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BA], a_descriptor.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, BC, 1, BA], b_descriptor.layout),
        gl.allocate_shared_memory(dtype, [STAGES * 2, 1, BC, 1, BX], x_descriptor.layout),
    )
    p_tiles = gl.allocate_shared_memory(dtype, [STAGES, BC, BC], p_layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, BC, BX], w_layout)
    s_tiles = gl.allocate_shared_memory(dtype, [2, BA, BX], s_layout)
    y_tiles = gl.allocate_shared_memory(dtype, [2, 1, BC, 1, BX], y_descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(ready.index(i), count=1)
        # One arrival of each warpgroup that reads the buffer.
        mbarrier.init(empty.index(i), count=3)
    fence_async_shared()
    gl.thread_barrier()

    descriptors = (a_descriptor, b_descriptor, x_descriptor)
    # fmt: off
    # Constants stay constants only where the arguments are written into the call.
    gl.warp_specialize([
        (_carry, (tiles, p_tiles, w_tiles, s_tiles, y_tiles, full, ready, empty, y_descriptor, p_y,
                  initial, segment, place, log_decay, scale, outside, count, H, 0,
                  A, X, BC, BA, BX, STAGES, REVERSE, HAS_INITIAL, HAS_SEGMENT)),
        (_carry, (tiles, p_tiles, w_tiles, s_tiles, y_tiles, full, ready, empty, y_descriptor, p_y,
                  initial, segment, place, log_decay, scale, outside, count, H, 1,
                  A, X, BC, BA, BX, STAGES, REVERSE, HAS_INITIAL, HAS_SEGMENT)),
        (_weigh, (tiles, p_tiles, w_tiles, full, ready, empty, log_decay, scale, count,
                  BC, BA, BX, STAGES, REVERSE)),
        (_produce, (descriptors, tiles, full, empty, place, count, BC, BX, STAGES, REVERSE)),
    ], [4, 4, 1], REGISTERS)
    # fmt: on
