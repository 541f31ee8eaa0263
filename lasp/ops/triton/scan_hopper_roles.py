"""The roles of the warps of the Hopper scan: what `scan_hopper_kernel` is made of.

States are held transposed, [columns, keys]. Rounded to 16 bits they are then, register for
register, the left operand of y^T = state^T a^T, and never pass through shared memory. All other
operands are there. A product with an operand in registers is waited for at once: triton 3.6 and
its assembler might reuse the registers while it is in flight.
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

from lasp.ops.triton.hopper_parts import begin_score, exp2


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
def produce(
    descriptors,
    columns,
    tiles,
    barriers,
    place,
    BC: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
):
    """Fill buffers; rows outside the tensors arrive as zeros, neighbours' rows as they are."""
    full, weighed, ready, empty = barriers
    i_b, i_h, start, count = place
    # The first two operands are alike, and so are the others.
    nbytes: gl.constexpr = (
        2 * descriptors[0].block_type.nbytes
        + (len(descriptors) - 2) * descriptors[2].block_type.nbytes
    )
    stage = 0
    phase = 1
    for i_c in range(gl.cdiv(count, BC)):
        t = start + _first_row(i_c, count, BC, REVERSE)
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, nbytes)
        for i in gl.static_range(len(descriptors)):
            tma.async_copy_global_to_shared(
                descriptors[i], [i_b, t, i_h, columns[i]], bar, tiles[i].index(stage)
            )
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _store_score(
    p_tile,
    s,
    positions,
    rate,
    scale,
    row,
    count,
    REVERSE: gl.constexpr,
    mma: gl.constexpr,
):
    """End the product and store P = decay * (a b^T), zero beyond the segment."""
    BC: gl.constexpr = p_tile.shape[0]
    # Made anew for every chunk from what is in shared memory: the registers that would keep the
    # decay belong to the states.
    o_i = positions.load(gl.SliceLayout(1, mma))[:, None]
    o_j = positions.load(gl.SliceLayout(0, mma))[None, :]
    if REVERSE:
        distance = o_j - o_i  # [BC, BC]
    else:
        distance = o_i - o_j  # [BC, BC]
    decay = exp2(rate * distance)
    decay = gl.where(distance >= 0.0, decay * scale, 0.0)  # [BC, BC]
    p = warpgroup_mma_wait(0, deps=[s]) * decay
    if _is_short(row, count, BC):
        live_i = (o_i + row >= 0) & (o_i + row < count)
        live_j = (o_j + row >= 0) & (o_j + row < count)
        p = gl.where(live_i & live_j, p, 0.0)
    p_tile.store(p.to(p_tile.dtype))


@gluon.jit
def _wipe(tile, row, count, by_row: gl.constexpr):
    """Zero the rows of a chunk that lie outside the segment.

    A weight of zero would not stop what is not finite in a neighbour's rows.
    """
    BC: gl.constexpr = tile.shape[0]
    BX: gl.constexpr = by_row.size_per_thread[1] * by_row.threads_per_warp[1]
    o_t = row + gl.arange(0, BC, gl.SliceLayout(1, by_row))[:, None]
    for i_x in gl.static_range(tile.shape[1] // BX):
        part = tile.slice(i_x * BX, BX, 1)
        x = part.load(by_row)
        part.store(gl.where((o_t >= 0) & (o_t < count), x, 0.0).to(tile.dtype))


@gluon.jit
def weigh(
    tiles,
    p_tiles,
    w_tiles,
    positions,
    barriers,
    place,
    factors,
    BC: gl.constexpr,
    BA: gl.constexpr,
    BX: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
    PAIR: gl.constexpr,
):
    """Make P and the decayed x of every chunk; in a short one, wipe the rows of x outside it."""
    full, weighed, ready, empty = barriers
    i_b, i_h, start, count = place
    log_decay, scale = factors
    dtype: gl.constexpr = p_tiles.dtype
    NP: gl.constexpr = p_tiles.shape[0] // STAGES
    NW: gl.constexpr = w_tiles.shape[4] // BX
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BC, 16])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BX, BX // 8], [4, 1], [1, 0])
    o_c = gl.arange(0, BC, gl.SliceLayout(1, by_row))[:, None]
    if REVERSE:
        column = scale * gl.exp(log_decay * (o_c + 1))  # [BC, 1]
    else:
        column = gl.exp(log_decay * (BC - 1 - o_c))  # [BC, 1]
    o_i = gl.arange(0, BC, gl.SliceLayout(1, mma))
    positions.store(o_i.to(gl.float32))
    gl.thread_barrier()
    rate = log_decay * 1.4426950408889634

    stage = 0
    phase = 0
    for i_c in range(gl.cdiv(count, BC)):
        row = _first_row(i_c, count, BC, REVERSE)
        a = _matrix(tiles[0].index(stage), BC, BA)
        b = _matrix(tiles[1].index(stage), BC, BA)
        x = _matrix(tiles[2].index(stage), BC, NW * BX)
        w = _matrix(w_tiles.index(stage), BC, NW * BX)
        mbarrier.wait(full.index(stage), phase)
        score = begin_score(a, b, mma)
        # No state leaves a short chunk: the decayed x needs no mask.
        for i_w in gl.static_range(NW):
            decayed = x.slice(i_w * BX, BX, 1).load(by_row).to(gl.float32) * column
            w.slice(i_w * BX, BX, 1).store(decayed.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(weighed.index(stage), count=1)
        _store_score(
            p_tiles.index(NP * stage), score, positions, rate, scale, row, count, REVERSE, mma
        )
        if _is_short(row, count, BC):
            _wipe(x, row, count, by_row)
            if PAIR:
                _wipe(b, row, count, by_row)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(ready.index(NP * stage), count=1)
        if PAIR:
            c = _matrix(tiles[3].index(stage), BC, BA)
            score = begin_score(c, x, mma)
            p_tile = p_tiles.index(NP * stage + 1)
            _store_score(p_tile, score, positions, rate, scale, row, count, REVERSE, mma)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(ready.index(NP * stage + 1), count=1)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _entering_state(
    initial,
    segment,
    log_decay,
    outside,
    i_a,
    i_x,
    A: gl.constexpr,
    X: gl.constexpr,
    KEYS: gl.constexpr,
    BX: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    HAS_SEGMENT: gl.constexpr,
    mma: gl.constexpr,
):
    """Return a block of the state that enters the segment, transposed: [BX, KEYS]."""
    o_a = i_a + gl.arange(0, KEYS, gl.SliceLayout(0, mma))[None, :]
    o_x = i_x + gl.arange(0, BX, gl.SliceLayout(1, mma))[:, None]
    live = (o_a < A) & (o_x < X)
    state = gl.zeros([BX, KEYS], gl.float32, mma)
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
def _add_product(y, state, a, i_a: gl.constexpr, PART: gl.constexpr, mma: gl.constexpr):
    """Return y [BX, BC] + state [BX, KEYS] a^T, for keys from `i_a` on of a [BC, BA].

    PART keys at a time: rounded to 16 bits, they are held in registers until the product is done.
    """
    KEYS: gl.constexpr = state.shape[1]
    BX: gl.constexpr = state.shape[0]
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    if PART < KEYS:
        # Every thread splits its own registers.
        parts = state.reshape([BX, 2, KEYS // 2]).permute((0, 2, 1)).split()
    else:
        parts = (state,)
    for i in gl.static_range(KEYS // PART):
        rounded = gl.convert_layout(parts[i].to(a.dtype), operand)
        a_part = a.slice(i_a + i * PART, PART, 1).permute((1, 0))
        y = warpgroup_mma(rounded, a_part, y, use_acc=i_a + i > 0, is_async=True)
        y = warpgroup_mma_wait(0, deps=[y])
    return y


@gluon.jit
def carry(
    operands,
    scratch,
    barriers,
    y_descriptor,
    p_y,
    entering,
    place,
    factors,
    i_x,
    H,
    i_w: gl.constexpr,
    i_p: gl.constexpr,
    i_t: gl.constexpr,
    A: gl.constexpr,
    X: gl.constexpr,
    BC: gl.constexpr,
    BA: gl.constexpr,
    BX: gl.constexpr,
    COLUMNS: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    HAS_SEGMENT: gl.constexpr,
):
    """Carry the states of COLUMNS value blocks over the segment and write their y.

    The tiles of `operands` are a, b, x and w: y = decay * (a state) + P x, and state = decay *
    state + b^T w. `i_w` says which of the two warpgroups it is, `i_p` which P; the blocks begin at
    column `i_x` of the tensors and `i_t` of the tiles of x and w.
    """
    a_tiles, b_tiles, x_tiles, w_tiles = operands
    p_tiles, y_tiles, row_decays = scratch
    full, weighed, ready, empty = barriers
    initial, segment, outside = entering
    i_b, i_h, start, count = place
    log_decay, scale = factors
    dtype: gl.constexpr = p_tiles.dtype
    KEYS: gl.constexpr = 128
    NA: gl.constexpr = BA // KEYS
    NP: gl.constexpr = p_tiles.shape[0] // STAGES
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    mma_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BC, 16])
    of_row: gl.constexpr = gl.SliceLayout(0, mma_y)
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BX, BX // 8], [4, 1], [1, 0])
    o_c = gl.arange(0, BC, of_row)
    o_t = gl.arange(0, BC, gl.SliceLayout(1, by_row))[:, None]
    o_y = gl.arange(0, BX, gl.SliceLayout(0, by_row))[None, :]
    if REVERSE:
        row_decay = gl.exp(log_decay * (BC - 1 - o_c))  # [BC]
    else:
        row_decay = scale * gl.exp(log_decay * (o_c + 1))  # [BC]
    # From shared memory in every chunk: registers are short.
    row_decays.index(i_w).store(row_decay)
    chunk_decay = gl.exp(log_decay * BC)
    y_tile = y_tiles.index(i_w)
    y_matrix = _matrix(y_tile, BC, BX)
    states = ()
    # fmt: off
    for i in gl.static_range(COLUMNS * NA):
        states += (_entering_state(
            initial, segment, log_decay, outside, i % NA * KEYS, i_x + i // NA * BX,
            A, X, KEYS, BX, HAS_INITIAL, HAS_SEGMENT, mma),)
    # fmt: on
    gl.thread_barrier()

    stage = 0
    phase = 0
    for i_c in range(gl.cdiv(count, BC)):
        row = _first_row(i_c, count, BC, REVERSE)
        a = _matrix(a_tiles.index(stage), BC, BA)
        b = _matrix(b_tiles.index(stage), BC, BA)
        x = _matrix(x_tiles.index(stage), BC, x_tiles.shape[4])
        w = _matrix(w_tiles.index(stage), BC, w_tiles.shape[4])
        p = p_tiles.index(NP * stage + i_p).permute((1, 0))
        mbarrier.wait(full.index(stage), phase)
        carried = ()
        for i in gl.static_range(COLUMNS):
            y = gl.zeros([BX, BC], gl.float32, mma_y)
            for i_a in gl.static_range(NA):
                y = _add_product(y, states[i * NA + i_a], a, i_a * KEYS, PART, mma_y)
            if i == 0:
                mbarrier.wait(weighed.index(stage), phase)
            w_part = w.slice(i_t + i * BX, BX, 1).permute((1, 0))
            products = ()
            for i_a in gl.static_range(NA):
                state = states[i * NA + i_a] * chunk_decay
                b_part = b.slice(i_a * KEYS, KEYS, 1)
                products += (warpgroup_mma(w_part, b_part, state, is_async=True),)
            y = y * row_decays.index(i_w).load(of_row)[None, :]
            if i == 0:
                mbarrier.wait(ready.index(NP * stage + i_p), phase)
            x_part = x.slice(i_t + i * BX, BX, 1).permute((1, 0))
            products += (warpgroup_mma(x_part, p, y, is_async=True),)
            products = warpgroup_mma_wait(0, deps=products)
            y = products[NA]
            for i_a in gl.static_range(NA):
                carried += (products[i_a],)
            gl.thread_barrier()
            if i == COLUMNS - 1:
                mbarrier.arrive(empty.index(stage), count=1)

            # The last copy may still be reading: one thread waits for it, all for the thread.
            tma.store_wait(0)
            gl.thread_barrier()
            y_matrix.permute((1, 0)).store(y.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            i_y = i_x + i * BX
            if _is_short(row, count, BC):
                # Copied whole, the tile would overwrite the neighbour's rows.
                live = (o_t + row >= 0) & (o_t + row < count) & (o_y + i_y < X)
                p_row = p_y + (row.to(gl.int64) * H + i_h) * X + i_y
                gl.store(p_row + o_t * (H * X) + o_y, y_matrix.load(by_row), mask=live)
            else:
                tma.async_copy_shared_to_global(y_descriptor, [i_b, start + row, i_h, i_y], y_tile)
        states = carried
        stage, phase = _next(stage, phase, STAGES)
    tma.store_wait(0)
