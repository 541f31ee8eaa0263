"""Relay kernel: take a state from the rank before, add this rank's own, hand it to the rank after.

The neighbours' memory is mapped here, and NVLink carries what is written there. A state goes in
packets of eight bytes: a float32 and the number of the exchange, which tells the reader that the
value has come. So nothing is awaited between a value and its flag, a chunk travels on while the
next ones are still coming, and a hop costs a few microseconds (NCCL's low-latency protocol works so
too). The host waits for nothing.

Every chunk has three counters on every rank: how often it was received, how often it was sent, and
how often the next rank has consumed it (written by that rank): an inbox holds one state, and is not
written to before it has been read.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from lasp.ops.triton.launch import Bound
from lasp.ops.triton.tiles import decay_or_zeros

# Floats per counter and per turn of a program: 1 MiB of state makes 64 chunks.
CHUNK = 4096


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
def _missing(b_packets, m, received):
    """How many of the packets have not come."""
    return tl.sum((((b_packets >> 32).to(tl.int32) != received) & m).to(tl.int32))


@triton.jit
def _store_release(p, number):
    """By one thread. No atomic operation: PCIe may carry none to another GPU."""
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


@triton.jit(do_not_specialize=["length", "limit_seconds"])
def relay_kernel(
    p_local,
    p_log_decay,
    p_entering,
    p_inbox,
    p_counters,
    p_previous,
    p_outbox,
    length,
    num_floats,
    num_chunks,
    stride,
    H,
    limit_seconds,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    RECEIVES: tl.constexpr,
    SENDS: tl.constexpr,
    PASSES: tl.constexpr,
    WAITS: tl.constexpr,
):
    p_received = p_counters
    p_sent = p_counters + stride
    p_consumed = p_counters + 2 * stride
    for i in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        o = i * CHUNK + tl.arange(0, CHUNK)
        m = o < num_floats
        if WAITS:
            begun = tl.extra.cuda.globaltimer()
        # All loads first: beside a kernel that keeps the memory busy each takes microseconds.
        if SENDS:
            b_leaving = tl.load(p_local + o, mask=m)
            sent = tl.load(p_sent + i) + 1
        if RECEIVES:
            received = tl.load(p_received + i) + 1
            b_packets = tl.load(p_inbox + o, mask=m, volatile=True)
            if SENDS and PASSES:
                if SIZE % CHUNK == 0:
                    b_log_decay = tl.load(p_log_decay + i * CHUNK // SIZE % H)
                else:
                    b_log_decay = tl.load(p_log_decay + o // SIZE % H, mask=m)
        if SENDS:
            # The last state has to be out of the next rank's inbox.
            consumed = tl.atomic_add(p_consumed + i, 0, sem="acquire", scope="sys")
            if WAITS:
                while consumed - (sent - 1) < 0:
                    consumed = tl.atomic_add(p_consumed + i, 0, sem="acquire", scope="sys")
                    _check_clock(begun, limit_seconds)
            tl.debug_barrier()
            if not (RECEIVES and PASSES):
                _put(p_outbox, o, m, sent, b_leaving)
        if RECEIVES:
            if WAITS:
                last = tl.minimum(i * CHUNK + CHUNK, num_floats) - 1
                missing = _missing(b_packets, m, received)
                while missing > 0:
                    # Asks for one packet, so that a long wait keeps no one else from the memory.
                    while (tl.load(p_inbox + last, volatile=True) >> 32).to(tl.int32) != received:
                        _check_clock(begun, limit_seconds)
                    b_packets = tl.load(p_inbox + o, mask=m, volatile=True)
                    missing = _missing(b_packets, m, received)
                    _check_clock(begun, limit_seconds)
            b_entering = (b_packets & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
            if SENDS and PASSES:
                b_leaving += tl.exp(b_log_decay * length) * b_entering
                _put(p_outbox, o, m, sent, b_leaving)
            tl.store(p_entering + o, b_entering, mask=m)
            tl.store(p_received + i, received)
            # All of the program has read.
            tl.debug_barrier()
            if WAITS:
                _store_release(p_previous + 2 * stride + i, received)
            else:
                tl.store(p_previous + 2 * stride + i, received)
        if SENDS:
            tl.store(p_sent + i, sent)


def relay(
    local: torch.Tensor,
    log_decay: torch.Tensor | None,
    length: int,
    entering: torch.Tensor | None,
    mine: tuple[torch.Tensor, torch.Tensor],
    previous: tuple[torch.Tensor, torch.Tensor] | None,
    following: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    passes: bool,
    programs: int,
    limit_seconds: int = 600,
) -> None:
    """Take what the rank before sends, and send local + exp(log_decay * length) * that.

    Args:
        local: [B, H, D, E] float32, contiguous.
        log_decay: [H] float32; None: no decay.
        entering: gets what was received, like `local`.
        mine, previous, following: (inbox [n] int64, counters [at least n / 1024 + 3] int32) of this
            rank and of its neighbours, the same n >= local.numel() on all; all zero at first.
            previous None: nothing is received; following None: nothing is sent.
        passes: False: `local` alone is sent, before anything is received.
        programs: at most so many run, and hold as many multiprocessors while they wait.
        limit_seconds: a neighbour that takes longer has died. The kernel then traps, which ends
            this process with a CUDA error at its next call; else it would spin for ever.
    """
    _, num_heads, D, E = local.shape
    num_floats, chunks = local.numel(), triton.cdiv(local.numel(), CHUNK)
    stride = triton.cdiv(mine[0].numel(), CHUNK)
    numbers = (length, num_floats, chunks, stride, num_heads, limit_seconds)
    modes = (previous is not None, following is not None, passes)
    bound = _bind(numbers, D * E, modes)
    outbox = (following or mine)[0]
    log_decay = decay_or_zeros(log_decay, num_heads, local.device)
    entering = local if entering is None else entering
    counters_before = (previous or mine)[1]
    bound(min(programs, chunks), local, log_decay, entering, *mine, counters_before, outbox)


@functools.lru_cache(maxsize=256)
def _bind(numbers: tuple[int, ...], size: int, modes: tuple[bool, ...]) -> Bound:
    """The kernel without its tensors."""
    constants = dict(SIZE=size, CHUNK=CHUNK)
    constants |= dict(zip(("RECEIVES", "SENDS", "PASSES"), modes, strict=True))
    # The interpreter runs one rank after the other, so nothing is awaited, and it has no clock.
    constants["WAITS"] = not triton.knobs.runtime.interpret
    return Bound(relay_kernel, numbers, constants, num_warps=8)
