"""The chained scan in Gluon: short sequences, states and all, in one launch (see `scan_chained`).

A program is one head's segment of 256 tokens, which it holds whole in shared memory. It publishes
its segment's own state; with the other programs of the head it adds up what enters each segment,
every program some rows of all these states; and meanwhile it makes what needs no state. The scan
is that of o, or those of dq, dv and dk are in one launch, one after the other.

The programs of one head wait for each other, up to 16 that take a multiprocessor each. They are
neighbours in the grid, and a GPU starts a grid's programs in order: of the programs that hold a
multiprocessor, at most those of one head wait for others that do not yet. Whatever else runs has
to leave these 16 in the end. A flag is raised by writing the number of the launch to it, which no
other launch has: whatever its memory held before, nothing has to be cleared.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasp.ops.triton.hopper_parts import begin_score, exp2


@gluon.jit
def _publish(p_flag, number):
    """Let whoever waits for the flag see all that this program has written."""
    gl.thread_barrier()
    gl.atomic_xchg(p_flag, number, sem="release", scope="gpu")


@gluon.jit
def _wait_until(p_flags, number):
    """Spin until the flags, one per thread, have this number, and see what came before them."""
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred %missing;
            .reg .b64 %seen;
        again:
            ld.acquire.gpu.global.b64 %seen, [$1];
            setp.ne.b64 %missing, %seen, $2;
            @%missing bra again;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,l",
        [p_flags.to(gl.uint64, bitcast=True), number],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.thread_barrier()


@gluon.jit
def _fetch(tile, p_x, stride, row, count, DIM: gl.constexpr, by_row: gl.constexpr):
    """Begin to copy the tile's rows from `row` on; zeros beyond the segment and the head."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    o_t = row + gl.arange(0, ROWS, gl.SliceLayout(1, by_row))[:, None]
    o_x = gl.arange(0, COLUMNS, gl.SliceLayout(0, by_row))[None, :]
    live = o_t < count
    if DIM < COLUMNS:
        live = live & (o_x < DIM)
    async_copy.async_copy_global_to_shared(tile, p_x + o_t * stride + o_x, mask=live)


@gluon.jit
def _arrive(NUM_OUTSTANDING: gl.constexpr):
    """Wait until all but the newest copies have landed, and show them to the tensor cores."""
    async_copy.wait_group(NUM_OUTSTANDING)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _add_state(state, b_tile, x_tile, positions, rate, scale, distance):
    """state + (b * decay)^T x of a chunk whose first row is `distance` from the state's place."""
    operand: gl.constexpr = gl.DotOperandLayout(0, state.type.layout, 2)
    # Rows beyond the segment are zeros.
    distance = gl.maximum(distance - positions[1].load(gl.SliceLayout(0, operand)), 0.0)
    decay = scale * exp2(rate * distance)
    b_t = b_tile.permute((1, 0)).load(operand).to(gl.float32) * decay[None, :]
    state = warpgroup_mma(b_t.to(b_tile.dtype), x_tile, state, is_async=True)
    return warpgroup_mma_wait(0, deps=[state])


@gluon.jit
def _add_score(
    y,
    p,
    others,
    x_tile,
    positions,
    factors,
    DISTANCE: gl.constexpr,
    mma_p: gl.constexpr,
):
    """(y + (decay * p) x in halves, others): p = a b^T, a's first row DISTANCE after that of b, x.

    `factors` are the rate of decay and the scale, `others` products in flight, done at the end.
    """
    rate, scale = factors
    BR: gl.constexpr = p.shape[0]
    BC: gl.constexpr = p.shape[1]
    of_row: gl.constexpr = gl.SliceLayout(1, mma_p)
    of_column: gl.constexpr = gl.SliceLayout(0, mma_p)
    if DISTANCE < BC:
        o_i = DISTANCE + gl.arange(0, BR, of_row)[:, None]
        o_j = gl.arange(0, BC, of_column)[None, :]
        distance = positions[0].load(of_row)[:, None] - positions[1].load(of_column)[None, :]
        decay = gl.where(o_i >= o_j, exp2(rate * (distance + DISTANCE)), 0.0)
        p = p * (decay * scale)
    else:
        # Every row comes after every column: a factor for each, and no exponent is positive.
        row = scale * exp2(rate * (DISTANCE - BC + positions[0].load(of_row)))
        column = exp2(rate * (BC - positions[1].load(of_column)))
        p = p * row[:, None] * column[None, :]
    p = gl.convert_layout(p.to(x_tile.dtype), gl.DotOperandLayout(0, mma_p, 2))
    y_l = warpgroup_mma(p, x_tile.slice(0, BC, 1), y[0], is_async=True)
    y_r = warpgroup_mma(p, x_tile.slice(BC, BC, 1), y[1], is_async=True)
    return warpgroup_mma_wait(0, deps=(y_l, y_r) + others)


@gluon.jit
def _finish(y_tile, y, a_tile, s_tile, row, mma_p: gl.constexpr):
    """Store y + row * (a s), half of the columns after the other: registers are short."""
    BR: gl.constexpr = a_tile.shape[0]
    BC: gl.constexpr = y[0].shape[1]
    for i in gl.static_range(2):
        z = gl.zeros([BR, BC], gl.float32, mma_p)
        s_half = s_tile.slice(i * BC, BC, 1)
        z = warpgroup_mma(a_tile, s_half, z, use_acc=False, is_async=True)
        z = warpgroup_mma_wait(0, deps=[z])
        z = y[i] + z * row[:, None]
        y_tile.slice(i * BC, BC, 1).store(z.to(y_tile.dtype))


@gluon.jit
def _write(p_y, stride, tile, row, count, DIM: gl.constexpr, by_row: gl.constexpr):
    """Copy the tile to the rows from `row` on."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    o_t = row + gl.arange(0, ROWS, gl.SliceLayout(1, by_row))[:, None]
    o_x = gl.arange(0, COLUMNS, gl.SliceLayout(0, by_row))[None, :]
    gl.store(p_y + o_t * stride + o_x, tile.load(by_row), mask=(o_t < count) & (o_x < DIM))


@gluon.jit
def _scan_segment(
    operands,
    strides,
    p_y,
    stride_yt,
    initial,
    p_local,
    p_entering,
    p_flags,
    number,
    log_decay,
    rate,
    scale,
    count,
    reverse,
    i_p,
    i_e,
    i_y,
    i_b,
    i_h,
    A: gl.constexpr,
    X: gl.constexpr,
    D: gl.constexpr,
    SEGMENT: gl.constexpr,
    SEGMENTS: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
):
    """Scan the segment whose a, b and x begin at `operands`, in the order of the scan."""
    p_a, p_b, p_x = operands
    stride_at, stride_bt, stride_xt = strides
    p_initial, stride_in, stride_ih, stride_ia, stride_ix = initial
    BC: gl.constexpr = 64
    BR: gl.constexpr = 128
    gl.static_assert(SEGMENT == 2 * BR)
    # Rows of the states that this program adds up.
    ROWS: gl.constexpr = D // SEGMENTS
    dtype: gl.constexpr = p_a.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    mma_p: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BC, 16])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    state_by_row: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    by_thread: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    position_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, D], dtype)

    a_tiles = gl.allocate_shared_memory(dtype, [2, BR, D], tile)
    b_tiles = gl.allocate_shared_memory(dtype, [4, BC, D], tile)
    x_tiles = gl.allocate_shared_memory(dtype, [4, BC, D], tile)
    s_tile = gl.allocate_shared_memory(dtype, [D, D], tile)
    # Of rows and of columns. Decays are made of them wherever they are needed, and from shared
    # memory, or the assembler makes them early and keeps them: registers are short.
    row_positions = gl.allocate_shared_memory(gl.float32, [BR], position_layout)
    column_positions = gl.allocate_shared_memory(gl.float32, [BC], position_layout)
    row_positions.store(gl.arange(0, BR, by_thread).to(gl.float32))
    column_positions.store(gl.arange(0, BC, by_thread).to(gl.float32))
    positions = (row_positions, column_positions)
    factors = (rate, scale)
    for c in gl.static_range(4):
        _fetch(b_tiles.index(c), p_b, stride_bt, c * BC, count, A, by_row)
        _fetch(x_tiles.index(c), p_x, stride_xt, c * BC, count, X, by_row)
        async_copy.commit_group()
    for r in gl.static_range(2):
        _fetch(a_tiles.index(r), p_a, stride_at, r * BR, count, A, by_row)
        async_copy.commit_group()

    # The state of this segment alone. In reverse it is a gradient, which holds the scale, and of
    # the place before the segment's first token: one decay more on the way out, one less in.
    state = gl.zeros([D, D], gl.float32, mma)
    state_scale = gl.where(reverse == 1, scale, 1.0)
    for c in gl.static_range(4):
        _arrive(5 - c)
        distance = count - 1 + reverse - c * BC
        state = _add_state(
            state, b_tiles.index(c), x_tiles.index(c), positions, rate, state_scale, distance
        )
    o_a = gl.arange(0, D, gl.SliceLayout(1, mma))[:, None]
    o_x = gl.arange(0, D, gl.SliceLayout(0, mma))[None, :]
    gl.store(p_local + i_p.to(gl.int64) * (D * D) + o_a * D + o_x, state, mask=i_e < SEGMENTS - 1)

    # The first rows, as far as they need no other segment.
    _arrive(1)
    a_0 = a_tiles.index(0)
    a_1 = a_tiles.index(1)
    zeros = gl.zeros([BR, BC], gl.float32, mma_p)
    p = begin_score(a_0, b_tiles.index(0), mma_p)
    p = warpgroup_mma_wait(0, deps=[p])
    _publish(p_flags + i_p, number)
    y = (zeros, zeros)
    p_next = begin_score(a_0, b_tiles.index(1), mma_p)
    y_l, y_r, p = _add_score(y, p, (p_next,), x_tiles.index(0), positions, factors, 0, mma_p)

    # Some rows of the states that enter the segments of this head.
    o_p = i_p - i_e + gl.arange(0, 256, by_thread) % SEGMENTS
    numbers = gl.zeros([256], gl.int64, by_thread) + number
    _wait_until(p_flags + o_p, numbers)
    p_head = (i_p - i_e).to(gl.int64) * (D * D)
    o_a = i_e * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, state_by_row))[:, None]
    o_x = gl.arange(0, D, gl.SliceLayout(0, state_by_row))[None, :]
    terms = ()
    for e in gl.static_range(SEGMENTS - 1):
        p_term = p_local + p_head + e * (D * D) + o_a * D + o_x
        terms += (gl.load(p_term, cache_modifier=".cg"),)
    p_entering += p_head
    entering = gl.zeros([ROWS, D], gl.float32, state_by_row)
    if HAS_INITIAL:
        p_initial += i_b * stride_in + i_h * stride_ih
        p_initial += o_a * stride_ia + o_x * stride_ix
        live = (o_a < A) & (o_x < X) & (i_y == 0)
        entering += gl.load(p_initial, mask=live, other=0.0).to(gl.float32)
    y_0 = _add_score((y_l, y_r), p, (), x_tiles.index(1), positions, factors, -BC, mma_p)
    segment_decay = gl.exp(log_decay * SEGMENT)
    for e in gl.static_range(SEGMENTS):
        gl.store(p_entering + e * (D * D) + o_a * D + o_x, entering.to(dtype))
        if e < SEGMENTS - 1:
            entering = entering * segment_decay + terms[e]

    # The other rows.
    _arrive(0)
    p = begin_score(a_1, b_tiles.index(0), mma_p)
    p = warpgroup_mma_wait(0, deps=[p])
    p_ready = p_flags + gl.num_programs(0)
    _publish(p_ready + i_p, number)
    y = (zeros, zeros)
    p_next = begin_score(a_1, b_tiles.index(1), mma_p)
    y_l, y_r, p = _add_score(y, p, (p_next,), x_tiles.index(0), positions, factors, 2 * BC, mma_p)
    _wait_until(p_ready + o_p, numbers)
    _fetch(s_tile, p_entering + i_e * (D * D), D, 0, D, D, by_row)
    async_copy.commit_group()
    p_next = begin_score(a_1, b_tiles.index(2), mma_p)
    y_l, y_r, p = _add_score(
        (y_l, y_r), p, (p_next,), x_tiles.index(1), positions, factors, BC, mma_p
    )
    p_next = begin_score(a_1, b_tiles.index(3), mma_p)
    y_l, y_r, p = _add_score(
        (y_l, y_r), p, (p_next,), x_tiles.index(2), positions, factors, 0, mma_p
    )
    y_1 = _add_score((y_l, y_r), p, (), x_tiles.index(3), positions, factors, -BC, mma_p)
    _arrive(0)

    # What enters. y takes the place of b, which nobody reads any more.
    y_tiles = b_tiles._reinterpret(dtype, [2, BR, D], tile)
    o_r = gl.arange(0, BR, gl.SliceLayout(1, mma_p))
    row = gl.where(reverse == 1, 1.0, scale) * gl.exp(log_decay * (o_r + 1 - reverse))
    _finish(y_tiles.index(0), y_0, a_0, s_tile, row, mma_p)
    gl.thread_barrier()
    _write(p_y, stride_yt, y_tiles.index(0), 0, count, X, by_row)
    row *= gl.exp(log_decay * BR)
    _finish(y_tiles.index(1), y_1, a_1, s_tile, row, mma_p)
    gl.thread_barrier()
    _write(p_y, stride_yt, y_tiles.index(1), BR, count, X, by_row)


@gluon.jit
def _choose(i, first, second, third):
    """The i-th of three tuples."""
    chosen = ()
    for j in gl.static_range(len(first)):
        chosen += (gl.where(i == 0, first[j], gl.where(i == 1, second[j], third[j])),)
    return chosen


@gluon.jit(do_not_specialize=["number", "scale", "T"])
def scan_chained_kernel(
    number,
    p_q,
    p_k,
    p_v,
    p_do,
    p_o,
    p_dk,
    p_dv,
    p_initial,
    p_local,
    p_entering,
    p_log_decay,
    p_flags,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_in,
    stride_ih,
    stride_ia,
    stride_ix,
    scale,
    T,
    H,
    A: gl.constexpr,
    X: gl.constexpr,
    D: gl.constexpr,
    SEGMENT: gl.constexpr,
    SEGMENTS: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    GRADIENTS: gl.constexpr,
):
    """o; with GRADIENTS, where A is X, dq in the place of o, dv and dk. `stride_o` is that of do.

    SEGMENTS is a power of two; the last ones may have no tokens.
    """
    # The segments of a head are neighbours, in the order of the scan.
    i_p = gl.program_id(0)
    i_e = i_p % SEGMENTS
    strides_q = (stride_qb, stride_qt, stride_qh)
    strides_k = (stride_kb, stride_kt, stride_kh)
    strides_v = (stride_vb, stride_vt, stride_vh)
    strides_o = (stride_ob, stride_ot, stride_oh)
    if GRADIENTS:
        # dq = scan(do, v, k), and in reverse dv = scan(k, q, do) and dk = scan(v, do, q).
        programs = gl.num_programs(0) // 3
        i_y = i_p // programs
        i_r = i_p % programs // SEGMENTS
        reverse = gl.minimum(i_y, 1)
        p_a, p_b, p_x, p_y = _choose(
            i_y, (p_do, p_v, p_k, p_o), (p_k, p_q, p_do, p_dv), (p_v, p_do, p_q, p_dk)
        )
        stride_ab, stride_at, stride_ah = _choose(i_y, strides_o, strides_k, strides_v)
        stride_bb, stride_bt, stride_bh = _choose(i_y, strides_v, strides_q, strides_o)
        stride_xb, stride_xt, stride_xh = _choose(i_y, strides_k, strides_o, strides_q)
    else:
        i_y = 0
        i_r = i_p // SEGMENTS
        reverse = 0
        p_a, p_b, p_x, p_y = p_q, p_k, p_v, p_o
        stride_ab, stride_at, stride_ah = strides_q
        stride_bb, stride_bt, stride_bh = strides_k
        stride_xb, stride_xt, stride_xh = strides_v
    i_h = (i_r % H).to(gl.int64)
    i_b = (i_r // H).to(gl.int64)
    start = gl.where(reverse == 1, SEGMENTS - 1 - i_e, i_e) * SEGMENT
    count = gl.minimum(gl.maximum(T - start, 0), SEGMENT)
    # Rows in shared memory are in the order of the scan: in reverse, the first is the last token.
    first = (start + reverse * (count - 1)).to(gl.int64)
    forth = 1 - 2 * reverse
    stride_yt = H * X
    # Less is nothing too, and never infinity times zero.
    log_decay = gl.maximum(gl.load(p_log_decay + i_h), -1e4)
    rate = log_decay * 1.4426950408889634
    p_a += i_b * stride_ab + first * stride_at + i_h * stride_ah
    p_b += i_b * stride_bb + first * stride_bt + i_h * stride_bh
    p_x += i_b * stride_xb + first * stride_xt + i_h * stride_xh
    p_y += ((i_b * T + first) * H + i_h) * X
    stride_at *= forth
    stride_bt *= forth
    stride_xt *= forth
    stride_yt *= forth

    # fmt: off
    _scan_segment(
        (p_a, p_b, p_x), (stride_at, stride_bt, stride_xt), p_y, stride_yt,
        (p_initial, stride_in, stride_ih, stride_ia, stride_ix),
        p_local, p_entering, p_flags, number,
        log_decay, rate, scale, count, reverse, i_p, i_e, i_y, i_b, i_h,
        A, X, D, SEGMENT, SEGMENTS, HAS_INITIAL,
    )
    # fmt: on
