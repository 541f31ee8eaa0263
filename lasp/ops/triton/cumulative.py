"""What kernels read of a decay per token: its cumulative sums (`lasp.ops.triton.decay`).

A kernel needs what remains between any two tokens, exp of a sum of log decays. It gets it as a
difference of two entries of one cumulative sum over the whole sequence, in float64: of 10^6 tokens
that forget at once, 1e8 in all, a difference is right to 1e-8. Sums over segments, documents, and
chunks aligned to either end of them are such differences: nothing else has to be computed.
"""

import triton
import triton.language as tl


@triton.jit
def row_of_decay(p_cumulative, i_b, i_h, T, H):
    """The cumulative sums of a batch row and head."""
    return p_cumulative + (i_b * H + i_h) * (T + 1).to(tl.int64)


@triton.jit
def decay_of_segment(p_log_decay, i_b, i_h, start, T, H, BY_TOKEN: tl.constexpr):
    """(pointer, log decay) of a head in a segment: to the cumulative sums from token `start` on,
    and zero, for a decay per token; else as given, and the constant."""
    if BY_TOKEN:
        p_log_decay = row_of_decay(p_log_decay, i_b, i_h, T, H) + start
        b_log_decay = tl.full([], 0.0, tl.float32)
    else:
        b_log_decay = tl.load(p_log_decay + i_h)
    return p_log_decay, b_log_decay


@triton.jit
def remaining(p_from, p_to):
    """exp of the log decays between two entries of the cumulative sums."""
    return tl.exp((tl.load(p_to) - tl.load(p_from)).to(tl.float32))


@triton.jit
def chunk_of_decay(p_cumulative, t, count, o_c, BC: tl.constexpr):
    """Of tokens t + o_c of a segment of `count`, whose cumulative sums begin at `p_cumulative`:
    the sums up to each, before the first that is inside, and up to the last.

    A token outside gets the sum of the one next to it that is inside.
    """
    o_t = tl.minimum(tl.maximum(t + o_c, 0), count - 1)
    b_sums = tl.load(p_cumulative + 1 + o_t)  # [BC]
    before = tl.load(p_cumulative + tl.maximum(t, 0))
    last = tl.load(p_cumulative + tl.minimum(t + BC, count))
    return b_sums, before, last
