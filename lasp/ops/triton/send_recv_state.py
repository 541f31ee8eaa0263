"""Receive a state from the previous rank, add this rank's own, send the sum to the following rank.

The neighbours' memory is mapped here (peer memory); NVLink or PCIe carries the writes. A state goes
in packets of eight bytes: a float32 and the number of the exchange, which tells the reader that the
value has arrived. So no fence separates a value from its flag, a chunk is sent on while the next
ones are still arriving, and a hop costs a few microseconds (NCCL's low-latency protocol does the
same). The host never waits.

Every chunk has three counters on every rank: how often it was received, how often it was sent, and
how often the following rank has consumed it (written by that rank): an inbox holds one state, and
is not written to before it was read.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lasp.ops.triton.launch_config import SEND_CHUNK, SEND_WARPS, send_programs
from lasp.ops.triton.launcher import CachedLaunch


@triton.jit
def _check_clock(begun, limit_seconds):
    if (tl.extra.cuda.globaltimer() - begun) // 1000000000 >= limit_seconds:
        tl.inline_asm_elementwise(
            "trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _put(p_outbox, o, m, sent, b_state):
    """Write packets."""
    b_bits = b_state.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(p_outbox + o, (sent.to(tl.int64) << 32) | b_bits, mask=m)


@triton.jit
def _num_missing(b_packets, m, received):
    """How many of the packets have not arrived."""
    return tl.sum((((b_packets >> 32).to(tl.int32) != received) & m).to(tl.int32))


@triton.jit
def _store_release(p, number):
    """Store by one thread. Not an atomic operation: PCIe may not carry these to another GPU."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred %first;
            .reg .u32 %thread;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %first, %thread, 0;
            @%first st.release.sys.global.u32 [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [p.to(tl.uint64, bitcast=True), number],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["limit_seconds"])
def send_recv_state_kernel(
    p_local, p_factor, p_state_in, p_inbox, p_counters, p_previous, p_outbox,
    num_floats, num_chunks, stride, num_factors, limit_seconds,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, RECEIVES: tl.constexpr, SENDS: tl.constexpr,
    HAS_FACTOR: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    p_received = p_counters
    p_sent = p_counters + stride
    p_consumed = p_counters + 2 * stride
    for i in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        o = i * CHUNK + tl.arange(0, CHUNK)
        m = o < num_floats
        if WAITS:
            begun = tl.extra.cuda.globaltimer()
        # All loads first: beside a kernel that keeps the memory busy, each takes microseconds.
        if SENDS:
            b_state_out = tl.load(p_local + o, mask=m)
            sent = tl.load(p_sent + i) + 1
        if RECEIVES:
            received = tl.load(p_received + i) + 1
            b_packets = tl.load(p_inbox + o, mask=m, volatile=True)
            if HAS_FACTOR:
                if SIZE % CHUNK == 0:
                    b_factor = tl.load(p_factor + i * CHUNK // SIZE % num_factors)
                else:
                    b_factor = tl.load(p_factor + o // SIZE % num_factors, mask=m)
        if SENDS:
            # The following rank must have read the last state from its inbox.
            consumed = tl.atomic_add(p_consumed + i, 0, sem="acquire", scope="sys")
            if WAITS:
                while consumed - (sent - 1) < 0:
                    consumed = tl.atomic_add(p_consumed + i, 0, sem="acquire", scope="sys")
                    _check_clock(begun, limit_seconds)
            tl.debug_barrier()
            if not HAS_FACTOR:
                _put(p_outbox, o, m, sent, b_state_out)
        if RECEIVES:
            if WAITS:
                last = tl.minimum(i * CHUNK + CHUNK, num_floats) - 1
                missing = _num_missing(b_packets, m, received)
                while missing > 0:
                    # Polls one packet, so that a long wait takes no memory bandwidth from others.
                    while (tl.load(p_inbox + last, volatile=True) >> 32).to(tl.int32) != received:
                        _check_clock(begun, limit_seconds)
                    b_packets = tl.load(p_inbox + o, mask=m, volatile=True)
                    missing = _num_missing(b_packets, m, received)
                    _check_clock(begun, limit_seconds)
            b_state_in = (b_packets & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
            if HAS_FACTOR:
                b_state_out += b_factor * b_state_in
                _put(p_outbox, o, m, sent, b_state_out)
            tl.store(p_state_in + o, b_state_in, mask=m)
            tl.store(p_received + i, received)
            # All threads of the program have read.
            tl.debug_barrier()
            if WAITS:
                _store_release(p_previous + 2 * stride + i, received)
            else:
                tl.store(p_previous + 2 * stride + i, received)
        if SENDS:
            tl.store(p_sent + i, sent)


def send_recv_state(
    local: torch.Tensor,
    factor: torch.Tensor | None,
    state_in: torch.Tensor | None,
    own: tuple[torch.Tensor, torch.Tensor],
    previous: tuple[torch.Tensor, torch.Tensor] | None,
    following: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    overlapped: bool = False,
    limit_seconds: int = 600,
) -> None:
    """Receive state_in from the previous rank, send factor * state_in + local to the following one.

    Args:
        local: [B, H, D, E] float32, contiguous.
        factor: float32, one value per head, [H, 1, 1], or per row and head, [B, H, 1, 1] (any shape
            of H or B * H elements). None: zero for all; `local` is sent before anything arrives.
        state_in: gets what was received, like `local`; None if nothing is.
        own, previous, following: (inbox [n] int64, counters [at least n / 1024 + 3] int32) of this
            rank and of its neighbours, the same n >= local.numel() on all; all zero at first.
            previous None: nothing is received; following None: nothing is sent.
        overlapped: run beside other kernels, on few multiprocessors. Programs hold theirs while
            they wait.
        limit_seconds: timeout of the wait for a neighbour; the kernel then traps, which ends this
            process with a CUDA error at its next call, instead of spinning forever.
    """
    batch, num_heads, D, E = local.shape
    n, chunks = local.numel(), triton.cdiv(local.numel(), SEND_CHUNK)
    stride = triton.cdiv(own[0].numel(), SEND_CHUNK)
    receives, sends = previous is not None, following is not None
    has_factor = factor is not None and receives and sends
    num_factors = factor.numel() if has_factor else 1
    if has_factor:
        assert num_factors in (num_heads, batch * num_heads), (factor.shape, local.shape)
        assert factor.dtype == torch.float32, factor.dtype
        factor = factor.contiguous()
    numbers = (n, chunks, stride, num_factors, limit_seconds)
    launch = _send_recv_launch(numbers, D * E, (receives, sends, has_factor))
    launch(
        min(send_programs(local.device, overlapped), chunks),
        local,
        factor if has_factor else local,
        state_in if receives else local,
        *own,
        (previous or own)[1],
        (following or own)[0],
    )


@functools.lru_cache(maxsize=256)
def _send_recv_launch(numbers: tuple[int, ...], size: int, flags: tuple[bool, ...]) -> CachedLaunch:
    constants = dict(SIZE=size, CHUNK=SEND_CHUNK)
    constants |= dict(zip(("RECEIVES", "SENDS", "HAS_FACTOR"), flags, strict=True))
    # The interpreter runs one rank after the other, so nothing is awaited, and it has no clock.
    constants["WAITS"] = not triton.knobs.runtime.interpret
    return CachedLaunch(send_recv_state_kernel, numbers, constants, num_warps=SEND_WARPS)
