"""The tokens before a chunk, its halo, over ranks: what a causal convolution needs of other ranks.

The tokens travel along the chain of chunks (`lasp.shard`): each chunk sends the last `count` tokens
before the next chunk's first one, and a chunk with fewer tokens first waits for its own halo, of
which it sends a part on. So nothing has to be known about the lengths of other shards, and one
small message crosses each boundary between ranks. With packed documents it holds the tokens of the
document that crosses the boundary; if none does, there is no message.

In the backward the gradient of each message takes the way back. What a chunk passed on is added to
the gradient of its own halo, the rest is the gradient of its tokens.

Ranks post their messages in the order of the chunks, in the backward from the last. This avoids a
circular wait, even if a backend runs the messages of a rank one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import torch
import torch.distributed as dist

from lasp import shard
from lasp.context import CPContext
from lasp.exchange import ChunkChain, consistency
from lasp.exchange.comm import send
from lasp.ops.host_values import document_boundaries
from lasp.partition import local_partition

__all__ = ["halo_bwd", "halo_fwd"]


class _Chunk(NamedTuple):
    """A chunk of this rank.

    Attributes:
        number: in the global sequence.
        length: tokens.
        before, after: tokens that cross its left boundary, and its right one: at most `count`.
    """

    number: int
    length: int
    before: int
    after: int

    @property
    def passed_on(self) -> int:
        """Tokens of its halo among those that leave it."""
        return max(self.after - self.length, 0)


def halo_fwd(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    count: int,
    needs_grad: bool,
    context: CPContext,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `count` tokens before each chunk of this rank, [B, chunks * count, ...]: zeros before the
    start of the sequence or of the document. And the number of the call, int64 [1] on the host, for
    the check of the backward; None without ranks.

    Raises:
        ValueError: boundaries or lengths that do not fit; on every rank if ranks disagree.
    """
    chunks, call_number = _checked_chunks(x, cu_seqlens, count, needs_grad, context)
    halo = x.new_zeros(x.shape[0], len(chunks) * count, *x.shape[2:])
    halos = halo.split([count] * len(chunks), 1)
    messages = _Messages(context)
    for chunk, of_chunk, tokens in zip(chunks, halos, _by_chunk(x, chunks), strict=True):
        if chunk.before:
            into = of_chunk[:, count - chunk.before :]
            messages.receive(chunk.number - 1, chunk.number, into)
        if chunk.after:
            own = chunk.after - chunk.passed_on
            message = tokens[:, max(chunk.length - own, 0) :]
            if chunk.passed_on:
                messages.wait()
                message = torch.cat([of_chunk[:, count - chunk.passed_on :], message], 1)
            messages.send(message, chunk.number, chunk.number + 1)
    messages.finish()
    return halo, call_number


def halo_bwd(
    dhalo: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    call_number: torch.Tensor | None,
    *,
    seq_len: int,
    count: int,
    context: CPContext,
) -> torch.Tensor:
    """The gradient of x, [B, seq_len, ...], from that of the halo; `call_number` as `halo_fwd`
    returned it."""
    if context.group is not None:
        consistency.start_backward_check(
            context.group, "exchange_previous_tokens", call_number
        ).wait()
    chunks = _local_chunks(seq_len, cu_seqlens, count, context)
    dx = dhalo.new_zeros(dhalo.shape[0], seq_len, *dhalo.shape[2:])
    dhalos = dhalo.split([count] * len(chunks), 1)
    messages = _Messages(context)
    received = []
    for chunk, of_halo, of_tokens in zip(
        chunks[::-1], dhalos[::-1], _by_chunk(dx, chunks)[::-1], strict=True
    ):
        dmessage = dhalo.new_empty(dhalo.shape[0], chunk.after, *dhalo.shape[2:])
        if chunk.after:
            messages.receive(chunk.number + 1, chunk.number, dmessage)
        if chunk.before:
            of_halo = of_halo[:, count - chunk.before :]
            if chunk.passed_on:
                messages.wait()
                of_halo = of_halo.clone()
                of_halo[:, chunk.before - chunk.passed_on :] += dmessage[:, : chunk.passed_on]
            messages.send(of_halo, chunk.number, chunk.number - 1)
        received.append((chunk, of_tokens, dmessage))
    messages.finish()
    for chunk, of_tokens, dmessage in received:
        own = dmessage[:, chunk.passed_on :]
        # Without documents, tokens before the first one count as sent: they have no gradient.
        of_tokens[:, chunk.length - own.shape[1] :] = own
    return dx


class _Messages:
    """Messages of one direction; those between two chunks of this rank are copies."""

    def __init__(self, context: CPContext) -> None:
        self._group = context.group
        self._chain = None if context.group is None else ChunkChain(context.group, context.layout)
        self._local: dict[tuple[int, int], torch.Tensor] = {}
        self._receiving: list = []
        self._sending: list = []

    def send(self, message: torch.Tensor, source: int, target: int) -> None:
        """Start to send from one chunk, of this rank, to the next."""
        if self._is_local(target):
            self._local[source, target] = message
            return
        message = message.contiguous()
        work = send(message, self._chain.global_rank(target), self._group)
        if work is not None:
            # Kept together with the tensor that it reads.
            self._sending.append((work, message))

    def receive(self, source: int, target: int, into: torch.Tensor) -> None:
        """Start to receive; `into` is written by the time that `wait` returns."""
        if self._is_local(source):
            into.copy_(self._local.pop((source, target)))
            return
        buffer = torch.empty_like(into, memory_format=torch.contiguous_format)
        work = dist.irecv(buffer, src=self._chain.global_rank(source), group=self._group)
        self._receiving.append((work, buffer, into))

    def wait(self) -> None:
        """Wait until everything that was started has been received."""
        for work, buffer, into in self._receiving:
            work.wait()
            into.copy_(buffer)
        self._receiving.clear()

    def finish(self) -> None:
        """Wait for everything, and count the exchange."""
        self.wait()
        for work, _ in self._sending:
            work.wait()
        if self._group is not None:
            consistency.record_exchange(self._group)

    def _is_local(self, chunk):
        return self._chain is None or chunk in self._chain.local_chunks


def _by_chunk(x, chunks):
    """Views of the tokens of each chunk."""
    return x.split([chunk.length for chunk in chunks], 1)


def _checked_chunks(x, cu_seqlens, count, needs_grad, context):
    """(this rank's chunks, the number of the call); raises ValueError on every rank unless all make
    the same call."""
    if context.group is None:
        return _local_chunks(x.shape[1], cu_seqlens, count, context), None
    chunks = boundaries = problem = None
    try:
        boundaries = document_boundaries(cu_seqlens, None)
        chunks = _local_chunks(x.shape[1], cu_seqlens, count, context)
    except ValueError as error:
        problem = str(error)
    call = {
        "operation": "exchange_previous_tokens",
        "number of previous tokens": count,
        "sizes of x without its tokens": (x.shape[0], *x.shape[2:]),
        "dtype": x.dtype,
        "layout": context.layout,
        "shard_lengths": context.shard_lengths,
        "cu_seqlens": boundaries,
        "whether a gradient is needed": needs_grad,
    }
    check = consistency.PendingCheck(context.group, call, problem=problem)
    check.wait()
    return chunks, check.as_tensor()


def _local_chunks(seq_len, cu_seqlens, count, context) -> tuple[_Chunk, ...]:
    """The chunks that this rank holds, in sequence order.

    Raises:
        ValueError: boundaries or lengths that do not fit this rank's tokens.
    """
    group, _, layout, lengths = context
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    if group is None:
        documents = document_boundaries(cu_seqlens, seq_len)
        lengths = (seq_len,)
    else:
        documents = document_boundaries(cu_seqlens, None)
        local_partition(seq_len, cu_seqlens, context)  # Raises for what does not fit.
    numbers = shard.chunks_of_rank(rank, size, layout)
    last = size * len(numbers)
    if documents is None:
        # The lengths of other shards are not known, nor needed.
        length = shard.chunk_boundaries((seq_len,), layout)[1]
        across = [count if 0 < n < last else 0 for n in range(last + 1)]
        return tuple(_Chunk(n, length, across[n], across[n + 1]) for n in numbers)
    lengths = lengths or shard.split_lengths(documents[-1], size, layout)
    edges = shard.chunk_boundaries(lengths, layout)
    # From the start of the document that a boundary cuts, or from the boundary itself.
    across = [min(count, edge - documents[bisect_right(documents, edge) - 1]) for edge in edges]
    return tuple(_Chunk(n, edges[n + 1] - edges[n], across[n], across[n + 1]) for n in numbers)
