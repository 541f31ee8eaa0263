"""LASP: the state goes point to point from chunk to chunk (arXiv 2404.02882). The default.

A rank receives one state, adds its own and sends one on: P - 1 hops one after another, one state
sent per rank whatever the length of the sequence, and memory for one received state. In zigzag the
state visits ranks 0 ... P-1, then P-1 ... 0: two of each per rank, 2P - 2 hops. If decay reduces
the incoming state to zero, the rank sends before receiving; if all ranks do, it is one hop.

GPUs of one host that can access each other's memory (peer memory) pass the state on by a kernel
(`lasp.exchange.symmetric_memory`), others by messages of the process group. So a group that spans
hosts sends one message per boundary between hosts and direction, if its order keeps the ranks of a
host together.
"""

from __future__ import annotations

import functools
from collections.abc import Generator

import torch
import torch.distributed as dist

from lasp import replay
from lasp.exchange.comm import send
from lasp.exchange.symmetric_memory import StateBuffer, find_buffer
from lasp.exchange.topology import ChunkChain, Transition

__all__ = ["ring"]


def ring(
    chain: ChunkChain, transitions: list[Transition], *, overlapped: bool
) -> Generator[None, None, list[torch.Tensor | None]]:
    """See `lasp.exchange.start`."""
    buffer = find_buffer(chain.group, transitions[0].local, chain.send_recv_state)
    if buffer is not None:
        return (yield from _in_memory(chain, transitions, buffer, overlapped))
    return (yield from _by_messages(chain, transitions))


def _in_memory(
    chain: ChunkChain, transitions: list[Transition], buffer: StateBuffer, overlapped: bool
):
    states_in, state, messages = [], None, []
    local = chain.local_chunks
    receiving = [
        torch.empty(each.local.shape, dtype=each.local.dtype, device=each.local.device)
        if chain.same_document(chunk - 1, chunk) and chunk - 1 not in local
        else None
        for chunk, each in zip(local, transitions, strict=True)
    ]
    # A waiting kernel beside others gets few multiprocessors and is slower, so overlap only with
    # long kernels. A state that is already known is sent before they start, because all other ranks
    # wait for it.
    overlapped = overlapped and any(each is not None for each in receiving)
    with buffer.on_stream(*(x for each in transitions for x in each), *receiving):
        for chunk, each, state_in in zip(local, transitions, receiving, strict=True):
            receives, goes_on = state_in is not None, chain.same_document(chunk, chunk + 1)
            sends = goes_on and chunk + 1 not in local
            if state is not None:
                # It comes from this rank's other chunk, so the outgoing state is known.
                state_in = state
                each = Transition(each.apply(state_in), None)
            if receives or sends:
                messages += _pass_on(
                    chain,
                    buffer,
                    chunk,
                    each,
                    state_in if receives else None,
                    sends=sends,
                    overlapped=overlapped,
                )
            if goes_on and not sends:
                state = buffer.record_stream(each.apply(state_in))
            states_in.append(state_in)
    if chain.reverse and not overlapped:
        buffer.join()
    yield
    buffer.join()
    for work, _ in messages:
        work.wait()
    return states_in


def _pass_on(
    chain: ChunkChain,
    buffer: StateBuffer,
    chunk: int,
    each: Transition,
    state_in: torch.Tensor | None,
    *,
    sends: bool,
    overlapped: bool,
) -> list[tuple[dist.Work, torch.Tensor]]:
    """Receive and send one chunk's states, in memory where the neighbour has its part of it.

    Returns the messages still under way, each with its tensor.
    """
    put = functools.partial(
        buffer.put, upward=_goes_up(chain, chunk), sends=sends, overlapped=overlapped
    )
    arrives = state_in is not None and chain.group_rank(chunk - 1) not in buffer.ranks
    leaves = sends and chain.group_rank(chunk + 1) not in buffer.ranks
    if not arrives and not leaves:
        put(each, state_in)
        return []
    # A rank that has a buffer has a neighbour in memory.
    assert not (arrives and leaves)
    replay.refuse()
    known = state_in is None or each.factor is None
    messages = []
    if arrives:
        work = _receive(state_in, chain, chunk - 1)
        if sends and not known:
            work.wait()
            put(each, state_in, arrived=True)
            return []
        messages.append((work, state_in))
        if sends:
            put(each, None)
        return messages
    if known:
        messages += _send(each.local, chain, chunk + 1)
    if state_in is not None:
        state_out = None if known else torch.empty_like(state_in)
        put(each, state_in, sends=False, state_out=state_out)
        if state_out is not None:
            messages += _send(state_out, chain, chunk + 1)
    return messages


def _goes_up(chain: ChunkChain, chunk: int) -> bool:
    """True if states enter a chunk from the rank below and leave it to the rank above."""
    if chunk + 1 < chain.num_chunks and chunk + 1 not in chain.local_chunks:
        return chain.group_rank(chunk + 1) > chain.group_rank(chunk)
    return chain.group_rank(chunk - 1) < chain.group_rank(chunk)


def _by_messages(chain: ChunkChain, transitions: list[Transition]):
    replay.refuse()
    # All ranks post their messages in the order of the chunks that send them: this avoids a
    # circular wait, even if a backend runs the messages of a rank one by one.
    states_in, receiving, sending = [], [], []
    state = None
    for chunk, each in zip(chain.local_chunks, transitions, strict=True):
        state_in = work = None
        if chain.same_document(chunk - 1, chunk):
            if chunk - 1 in chain.local_chunks:
                state_in = state
            else:
                state_in = torch.empty_like(each.local, memory_format=torch.contiguous_format)
                work = _receive(state_in, chain, chunk - 1)
                receiving.append(work)
        states_in.append(state_in)
        if not chain.same_document(chunk, chunk + 1):
            continue
        if work is not None and each.factor is not None:
            yield
            receiving.pop().wait()
        state = each.apply(state_in)
        if chunk + 1 not in chain.local_chunks:
            sending += _send(state, chain, chunk + 1)
    yield
    for work in [*receiving, *(work for work, _ in sending)]:
        work.wait()
    return states_in


def _receive(state: torch.Tensor, chain: ChunkChain, chunk: int) -> dist.Work:
    """Start to receive the state that leaves `chunk`."""
    return dist.irecv(state, src=chain.global_rank(chunk), group=chain.group)


def _send(
    state: torch.Tensor, chain: ChunkChain, chunk: int
) -> list[tuple[dist.Work, torch.Tensor]]:
    """Start to send the state that enters `chunk`; what is under way, with the memory it reads."""
    state = state.contiguous()
    work = send(state, chain.global_rank(chunk), chain.group)
    return [] if work is None else [(work, state)]
