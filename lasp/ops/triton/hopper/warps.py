"""The roles of the Hopper scan's warps (see `kernel`): load, score and state.

States are held transposed, [columns, keys]. Rounded to 16 bits they are then, register for
register, the left operand of y^T = state^T a^T, and never pass through shared memory, where all
other operands are. A product with an operand in registers is waited for at once: Triton and its
assembler might reuse the registers while it is in flight.
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

from lasp.ops.triton.cumulative import chunk_of_decay
from lasp.ops.triton.hopper.language import async_load, async_store, barrier, reinterpret


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _begin_score(a, b, mma: gl.constexpr):
    """Begin the product a b^T of tiles in shared memory."""
    ROWS: gl.constexpr = a.shape[0]
    COLUMNS: gl.constexpr = b.shape[0]
    b_zeros = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    return warpgroup_mma(a, b.permute((1, 0)), b_zeros, use_acc=False, is_async=True)


@gluon.jit
def _matrix(tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """View a tile of TMA's shape [1, ROWS, 1, COLUMNS] as a matrix."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], tile.dtype)
    return reinterpret(tile, tile.dtype, [ROWS, COLUMNS], layout)


@gluon.jit
def _first_row(i_c, count, BC: gl.constexpr, REVERSE: gl.constexpr):
    """Row of chunk `i_c` in its segment, which may lie before it.

    Chunks are aligned to the start of the scan, so only the last can be partial, and its outgoing
    state is not used.
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
    """Advance around the ring of buffers; the phase of its barriers flips in every round."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def load_warp(
    descriptors, columns, tiles, barriers, where,
    BC: gl.constexpr, STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Fill the buffers. Rows outside the tensors arrive as zeros, other segments' rows as data."""
    full, w_ready, p_ready, empty = barriers
    i_b, i_h, start, count = where
    # The first two operands have one shape, and so have the others.
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
            async_load(descriptors[i], [i_b, t, i_h, columns[i]], bar, tiles[i].index(stage))
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _store_score(
    p_tile,
    b_s, positions, rate, scale, row, count,
    REVERSE: gl.constexpr, BY_TOKEN: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """End the product and store P = decay * (a b^T), zero beyond the segment."""
    BC: gl.constexpr = p_tile.shape[0]
    # Computed again for every chunk from positions in shared memory: the states need the registers
    # that would hold the decay.
    if BY_TOKEN:
        b_sum_i = positions.index(1).load(gl.SliceLayout(1, mma))[:, None]
        b_sum_j = positions.index(1).load(gl.SliceLayout(0, mma))[None, :]
        b_between = b_sum_j - b_sum_i if REVERSE else b_sum_i - b_sum_j  # [BC, BC]
        b_p = warpgroup_mma_wait(0, deps=[b_s]) * _exp2(gl.minimum(b_between, 0.0))
        b_p *= scale
    o_i = positions.index(0).load(gl.SliceLayout(1, mma))[:, None]
    o_j = positions.index(0).load(gl.SliceLayout(0, mma))[None, :]
    b_distance = o_j - o_i if REVERSE else o_i - o_j  # [BC, BC]
    if BY_TOKEN:
        b_p = gl.where(b_distance >= 0.0, b_p, 0.0)
    else:
        b_decay = _exp2(rate * b_distance)
        b_decay = gl.where(b_distance >= 0.0, b_decay * scale, 0.0)  # [BC, BC]
        b_p = warpgroup_mma_wait(0, deps=[b_s]) * b_decay
    if _is_short(row, count, BC):
        m_i = (o_i + row >= 0) & (o_i + row < count)
        m_j = (o_j + row >= 0) & (o_j + row < count)
        b_p = gl.where(m_i & m_j, b_p, 0.0)
    p_tile.store(b_p.to(p_tile.dtype))


@gluon.jit
def _zero_rows_outside(tile, row, count, by_row: gl.constexpr):
    """Zero the rows of a chunk that are outside the segment.

    A weight of zero would not: another segment's rows may be infinite or NaN.
    """
    BC: gl.constexpr = tile.shape[0]
    BX: gl.constexpr = by_row.size_per_thread[1] * by_row.threads_per_warp[1]
    o_t = row + gl.arange(0, BC, gl.SliceLayout(1, by_row))[:, None]
    for i_x in gl.static_range(tile.shape[1] // BX):
        part = tile.slice(i_x * BX, BX, 1)
        b_x = part.load(by_row)
        part.store(gl.where((o_t >= 0) & (o_t < count), b_x, 0.0).to(tile.dtype))


@gluon.jit
def _load_decays(decay, i_c, count, o_c, BC: gl.constexpr, REVERSE: gl.constexpr):
    """Cumulative log decays of chunk `i_c`: up to each token, before the first and up to the last
    that are inside the segment."""
    return chunk_of_decay(decay, _first_row(i_c, count, BC, REVERSE), count, o_c, BC)


@gluon.jit
def _store_decays(decays, positions, decay_tiles, slot, scale, REVERSE: gl.constexpr):
    """Store the decays of a chunk's rows and of a state across it, and for the score warps the sums
    of log2 decays and the decays of x."""
    row_decays, chunk_decays = decay_tiles
    b_sums, before, last = decays
    b_from_start = (b_sums - before).to(gl.float32)
    b_enters = gl.exp(b_from_start)
    b_leaves = gl.exp((last - b_sums).to(gl.float32))
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    b_chunk_decay = gl.full([1], gl.exp((last - before).to(gl.float32)), gl.float32, one)
    chunk_decays.index(slot).store(b_chunk_decay)
    positions.index(1).store(b_from_start * 1.4426950408889634)
    if REVERSE:
        row_decays.index(slot).store(b_leaves)
        positions.index(2).store(b_enters * scale)
    else:
        row_decays.index(slot).store(b_enters * scale)
        positions.index(2).store(b_leaves)


@gluon.jit
def score_warps(
    tiles,
    p_tiles,
    w_tiles, positions, decay_tiles, barriers, where, factors,
    BC: gl.constexpr, BA: gl.constexpr, BX: gl.constexpr, STAGES: gl.constexpr,
    REVERSE: gl.constexpr, PAIR: gl.constexpr, BY_TOKEN: gl.constexpr,
):  # fmt: skip
    """Compute P and w, the decayed x, of every chunk; in a short one, zero the rows outside it."""
    full, w_ready, p_ready, empty = barriers
    i_b, i_h, start, count = where
    decay, scale = factors
    dtype: gl.constexpr = p_tiles.dtype
    NP: gl.constexpr = p_tiles.shape[0] // STAGES
    NW: gl.constexpr = w_tiles.shape[4] // BX
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BC, 16])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BX, BX // 8], [4, 1], [1, 0])
    by_token: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    of_column: gl.constexpr = gl.SliceLayout(1, by_row)
    o_t = gl.arange(0, BC, by_token)
    if BY_TOKEN:
        rate = 1.0
        decays = _load_decays(decay, 0, count, o_t, BC, REVERSE)
    else:
        rate = decay * 1.4426950408889634
    positions.index(0).store(o_t.to(gl.float32))
    barrier()
    o_c = gl.arange(0, BC, of_column)[:, None]
    # Constant, or replaced in every chunk.
    if REVERSE:
        b_column = scale * _exp2(rate * (o_c + 1))  # [BC, 1]
    else:
        b_column = _exp2(rate * (BC - 1 - o_c))  # [BC, 1]

    stage = 0
    phase = 0
    for i_c in range(gl.cdiv(count, BC)):
        row = _first_row(i_c, count, BC, REVERSE)
        a = _matrix(tiles[0].index(stage), BC, BA)
        b = _matrix(tiles[1].index(stage), BC, BA)
        x = _matrix(tiles[2].index(stage), BC, NW * BX)
        w = _matrix(w_tiles.index(stage), BC, NW * BX)
        if BY_TOKEN:
            # Before the chunk has landed: what is read of the decays was loaded a chunk ago.
            slot = stage + STAGES * phase
            _store_decays(decays, positions, decay_tiles, slot, scale, REVERSE)
            barrier()
            i_next = gl.minimum(i_c + 1, gl.cdiv(count, BC) - 1)
            decays = _load_decays(decay, i_next, count, o_t, BC, REVERSE)
        mbarrier.wait(full.index(stage), phase)
        b_score = _begin_score(a, b, mma)
        if BY_TOKEN:
            b_column = positions.index(2).load(of_column)[:, None]
        # No state leaves a short chunk: w needs no mask.
        for i_w in gl.static_range(NW):
            b_w = x.slice(i_w * BX, BX, 1).load(by_row).to(gl.float32) * b_column
            w.slice(i_w * BX, BX, 1).store(b_w.to(dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(w_ready.index(stage), count=1)
        _store_score(
            p_tiles.index(NP * stage), b_score, positions, rate, scale, row, count,
            REVERSE, BY_TOKEN, mma,
        )  # fmt: skip
        if _is_short(row, count, BC):
            _zero_rows_outside(x, row, count, by_row)
            if PAIR:
                _zero_rows_outside(b, row, count, by_row)
        fence_async_shared()
        barrier()
        mbarrier.arrive(p_ready.index(NP * stage), count=1)
        if PAIR:
            c = _matrix(tiles[3].index(stage), BC, BA)
            b_score = _begin_score(c, x, mma)
            p_tile = p_tiles.index(NP * stage + 1)
            _store_score(
                p_tile, b_score, positions, rate, scale, row, count, REVERSE, BY_TOKEN, mma
            )
            fence_async_shared()
            barrier()
            mbarrier.arrive(p_ready.index(NP * stage + 1), count=1)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _load_state_in(
    initial, segment, outside, outside_decay, i_a, i_x,
    A: gl.constexpr, X: gl.constexpr, KEYS: gl.constexpr, BX: gl.constexpr,
    HAS_INITIAL: gl.constexpr, HAS_SEGMENT: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Return a block of the state that enters the segment, transposed: [BX, KEYS]."""
    o_a = i_a + gl.arange(0, KEYS, gl.SliceLayout(0, mma))[None, :]
    o_x = i_x + gl.arange(0, BX, gl.SliceLayout(1, mma))[:, None]
    m_state = (o_a < A) & (o_x < X)
    b_state = gl.zeros([BX, KEYS], gl.float32, mma)
    if HAS_SEGMENT:
        p_segment, stride_a, stride_x = segment
        o_state = o_a * stride_a + o_x * stride_x
        b_state += gl.load(p_segment + o_state, mask=m_state & (outside > 0), other=0.0)
    if HAS_INITIAL:
        p_initial, stride_a, stride_x = initial
        o_state = o_a * stride_a + o_x * stride_x
        b_initial = gl.load(p_initial + o_state, mask=m_state, other=0.0).to(gl.float32)
        b_state += b_initial * outside_decay
    return b_state


@gluon.jit
def _add_product(b_y, b_state, a, i_a: gl.constexpr, PART: gl.constexpr, mma: gl.constexpr):
    """Return b_y [BX, BC] + b_state [BX, KEYS] a^T, for keys from `i_a` on of a [BC, BA].

    PART keys at a time: rounded to 16 bits, they are held in registers until the product is done.
    """
    KEYS: gl.constexpr = b_state.shape[1]
    BX: gl.constexpr = b_state.shape[0]
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    if PART < KEYS:
        # Every thread splits its own registers.
        b_parts = b_state.reshape([BX, 2, KEYS // 2]).permute((0, 2, 1)).split()
    else:
        b_parts = (b_state,)
    for i in gl.static_range(KEYS // PART):
        b_rounded = gl.convert_layout(b_parts[i].to(a.dtype), operand)
        a_part = a.slice(i_a + i * PART, PART, 1).permute((1, 0))
        b_y = warpgroup_mma(b_rounded, a_part, b_y, use_acc=i_a + i > 0, is_async=True)
        b_y = warpgroup_mma_wait(0, deps=[b_y])
    return b_y


@gluon.jit
def _store_part(b_y, tile, p_dots, row, count, T):
    BX: gl.constexpr = b_y.shape[0]
    BC: gl.constexpr = b_y.shape[1]
    b_products = b_y * tile.permute((1, 0)).load(b_y.type.layout).to(gl.float32)
    # Rows 8 apart are in one thread. Lanes exchange the others, so that each sums those of a token.
    b_halves = gl.sum(b_products.reshape([BX // 16, 2, 8, BC]), axis=1)
    by_token: gl.constexpr = gl.BlockedLayout([1, 8, BC // 32], [1, 1, 32], [4, 1, 1], [2, 1, 0])
    b_dots = gl.sum(gl.convert_layout(b_halves, by_token), axis=1)
    of_token: gl.constexpr = gl.SliceLayout(1, by_token)
    o_w = gl.arange(0, BX // 16, gl.SliceLayout(1, of_token))[:, None]
    o_t = row + gl.arange(0, BC, gl.SliceLayout(0, of_token))[None, :]
    gl.store(p_dots + o_w * T + o_t, b_dots, mask=(o_t >= 0) & (o_t < count))


@gluon.jit
def _store_dots(b_y, tile, p_dots, i_y, row, count, T, PARTS: gl.constexpr):
    """Store the dot products of the columns of b_y [BX, BC] with the rows of a tile [BC, BX].

    Those of each warp's 16 rows of b_y are apart: no warp waits for another. PARTS is 1, or 2 for a
    half of the columns at a time, which needs fewer registers.
    """
    BX: gl.constexpr = b_y.shape[0]
    WIDTH: gl.constexpr = b_y.shape[1] // PARTS
    if PARTS == 2:
        parts = b_y.reshape([BX, 2, WIDTH]).permute((0, 2, 1)).split()
    else:
        parts = (b_y,)
    p_dots += i_y // 16 * T
    for i in gl.static_range(PARTS):
        part = tile.slice(i * WIDTH, WIDTH, 0)
        _store_part(parts[i], part, p_dots, row + i * WIDTH, count, T)


@gluon.jit
def state_warps(
    operands, scratch, barriers, y_descriptor, p_y, state_in, where, factors, i_x, H, dots,
    i_w: gl.constexpr, i_p: gl.constexpr, i_t: gl.constexpr, A: gl.constexpr, X: gl.constexpr,
    BC: gl.constexpr, BA: gl.constexpr, BX: gl.constexpr, BLOCKS: gl.constexpr,
    PART: gl.constexpr, STAGES: gl.constexpr, REVERSE: gl.constexpr, HAS_INITIAL: gl.constexpr,
    HAS_SEGMENT: gl.constexpr, BY_TOKEN: gl.constexpr,
):  # fmt: skip
    """Take the states of BLOCKS value blocks through the segment and write their y.

    The tiles of `operands` are a, b, x and w: y = decay * (a state) + P x, and state = decay *
    state + b^T w. `i_w` is the warpgroup (0 or 1) and `i_p` its P; the blocks begin at column `i_x`
    of the tensors and `i_t` of the tiles of x and w. `dots`: tiles whose rows meet those of y, from
    column `i_t` on, and where the dot products go; empty for none.
    """
    a_tiles, b_tiles, x_tiles, w_tiles = operands
    p_tiles, y_tiles, row_decays, chunk_decays = scratch
    full, w_ready, p_ready, empty = barriers
    initial, segment, outside, outside_decay = state_in
    i_b, i_h, start, count = where
    decay, scale = factors
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
    if not BY_TOKEN:
        if REVERSE:
            b_row_decay = gl.exp(decay * (BC - 1 - o_c))  # [BC]
        else:
            b_row_decay = scale * gl.exp(decay * (o_c + 1))  # [BC]
        # Read from shared memory in every chunk: there are no registers left for it.
        row_decays.index(i_w).store(b_row_decay)
        chunk_decay = gl.exp(decay * BC)
    y_tile = y_tiles.index(i_w)
    y_matrix = _matrix(y_tile, BC, BX)
    states = ()
    # fmt: off
    for i in gl.static_range(BLOCKS * NA):
        states += (_load_state_in(
            initial, segment, outside, outside_decay, i % NA * KEYS, i_x + i // NA * BX,
            A, X, KEYS, BX, HAS_INITIAL, HAS_SEGMENT, mma),)
    # fmt: on
    barrier()

    stage = 0
    phase = 0
    for i_c in range(gl.cdiv(count, BC)):
        row = _first_row(i_c, count, BC, REVERSE)
        a = _matrix(a_tiles.index(stage), BC, BA)
        b = _matrix(b_tiles.index(stage), BC, BA)
        x = _matrix(x_tiles.index(stage), BC, x_tiles.shape[4])
        w = _matrix(w_tiles.index(stage), BC, w_tiles.shape[4])
        p = p_tiles.index(NP * stage + i_p).permute((1, 0))
        slot = stage + STAGES * phase
        mbarrier.wait(full.index(stage), phase)
        new_states = ()
        for i in gl.static_range(BLOCKS):
            b_y = gl.zeros([BX, BC], gl.float32, mma_y)
            for i_a in gl.static_range(NA):
                b_y = _add_product(b_y, states[i * NA + i_a], a, i_a * KEYS, PART, mma_y)
            if i == 0:
                mbarrier.wait(w_ready.index(stage), phase)
            w_part = w.slice(i_t + i * BX, BX, 1).permute((1, 0))
            products = ()
            for i_a in gl.static_range(NA):
                if BY_TOKEN:
                    chunk_decay = chunk_decays.index(slot).load(gl.SliceLayout(1, mma))[:, None]
                b_state = states[i * NA + i_a] * chunk_decay
                b_part = b.slice(i_a * KEYS, KEYS, 1)
                products += (warpgroup_mma(w_part, b_part, b_state, is_async=True),)
            i_r = slot if BY_TOKEN else i_w
            b_y = b_y * row_decays.index(i_r).load(of_row)[None, :]
            if i == 0:
                mbarrier.wait(p_ready.index(NP * stage + i_p), phase)
            x_part = x.slice(i_t + i * BX, BX, 1).permute((1, 0))
            products += (warpgroup_mma(x_part, p, b_y, is_async=True),)
            products = warpgroup_mma_wait(0, deps=products)
            b_y = products[NA]
            for i_a in gl.static_range(NA):
                new_states += (products[i_a],)
            if len(dots) > 0:
                tile = _matrix(dots[0].index(stage), BC, dots[0].shape[4])
                tile = tile.slice(i_t + i * BX, BX, 1)
                _store_dots(b_y, tile, dots[1], i_x + i * BX, row, count, dots[2], BLOCKS)
            barrier()
            if i == BLOCKS - 1:
                mbarrier.arrive(empty.index(stage), count=1)

            # The last copy may still be reading: one thread waits for it, all wait for the thread.
            tma.store_wait(0)
            barrier()
            y_matrix.permute((1, 0)).store(b_y.to(dtype))
            fence_async_shared()
            barrier()
            i_y = i_x + i * BX
            if _is_short(row, count, BC):
                # Copied whole, the tile would overwrite another segment's rows.
                m_y = (o_t + row >= 0) & (o_t + row < count) & (o_y + i_y < X)
                p_row = p_y + (row.to(gl.int64) * H + i_h) * X + i_y
                gl.store(p_row + o_t * (H * X) + o_y, y_matrix.load(by_row), mask=m_y)
            else:
                async_store(y_descriptor, [i_b, start + row, i_h, i_y], y_tile)
        states = new_states
        stage, phase = _next(stage, phase, STAGES)
    tma.store_wait(0)
