"""Forward and backward over one sequence of any length, segment by segment, at constant memory.

The past of a linear-attention model is a state of constant size, so the gradient of a sequence
needs the activations of only one segment at a time:

    pass 1   segments in order, without gradients: keeps the states that enter each segment
    pass 2   segments from last to first: forward again, from the states that were kept, and
             backward; the gradients of the states that entered are those of the states that the
             segment before returned

The loss and every gradient are those of one pass over the sequence. The cost is that of
recomputing every block (forward, forward, backward), and no block needs to be recomputed within a
segment. (The method is known as sequence accumulation.)

With context parallelism, every segment is cut over the ranks. The rank with the last tokens of a
segment sends the states to the rank with the first tokens of the next one, and gets their gradients
back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist

from lasp import SequenceShard

__all__ = ["RunSegment", "backward_in_segments", "loss_in_segments", "move_states"]

States = Sequence[torch.Tensor]


class RunSegment(Protocol):
    """The user's function: one segment's forward."""

    def __call__(
        self, index: int, states: States | None, *, states_only: bool
    ) -> tuple[torch.Tensor | None, States]:
        """(sum of the loss over the segment's tokens, states after its last token).

        Args:
            index: of the segment, from 0.
            states: those before its first token, as this function returned them, detached; None on
                the first segment if there are no initial ones, and on all ranks but the one that
                holds the segment's first tokens.
            states_only: the loss is not needed and may be None.
        """


def backward_in_segments(
    run: RunSegment,
    num_segments: int,
    *,
    gradient: Literal["exact", "truncated"] = "exact",
    loss_scale: float = 1.0,
    initial_states: States | None = None,
    shard: SequenceShard | None = None,
    keep_on: Literal["device", "host"] = "device",
    accumulate: Callable[[bool], AbstractContextManager[Any]] | None = None,
    after_segment: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Add the gradients of the loss of a sequence to those of the parameters.

        def run(index, states, *, states_only):
            hidden, states = model(segments[index], states=states)
            return loss_of(hidden, labels[index]), states

        loss, states = backward_in_segments(run, len(segments))

    Args:
        run: see `RunSegment`. It must compute the same states in both passes: no dropout, no noise.
        num_segments: of the sequence; they may differ in length.
        gradient: "exact": as if the sequence were one segment. "truncated": a single pass; states
            go from segment to segment and gradients do not (truncated backpropagation through
            time).
        loss_scale: the gradients are those of loss_scale times the sum of the losses.
        initial_states: before the first segment; no gradient reaches them. Read on the first rank.
        shard: that of a segment, if ranks share the sequence; every rank of its group makes this
            call. All segments but the last must have tokens on the same ranks.
        keep_on: where pass 1 keeps the states, [num_segments - 1] times their size: "device", or
            "host", in pinned memory if they are on a GPU.
        accumulate: its result is entered around the forward and backward of a segment in the pass
            with gradients, and gets True for the last one; see `parallel.data.accumulate`.
        after_segment: called as (done, total) after every segment of a pass, and may raise: then
            the gradients are incomplete.

    Returns:
        (sum of the loss over this rank's tokens, a float64 scalar on the loss's device; the states
        after the last segment, detached: on the last rank with tokens, those of the sequence).

    Raises:
        ValueError: num_segments below 1, an unknown option, or no loss where one is needed.
    """
    _check(num_segments, gradient, keep_on)
    call = _Call(
        run,
        num_segments,
        loss_scale,
        _Handover(shard),
        accumulate or (lambda last: contextlib.nullcontext()),
        after_segment or (lambda done, total: None),
    )
    states = call.handover.entering(initial_states)
    return _exact(call, states, keep_on) if gradient == "exact" else _truncated(call, states)


def loss_in_segments(
    run: RunSegment,
    num_segments: int,
    *,
    initial_states: States | None = None,
    shard: SequenceShard | None = None,
    after_segment: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of a sequence without gradients; arguments and result of `backward_in_segments`."""
    _check(num_segments, "exact", "device")
    handover = _Handover(shard)
    states, losses = handover.entering(initial_states), []
    with torch.no_grad():
        for index in range(num_segments):
            loss, leaving = run(index, states, states_only=False)
            losses.append(_summand(loss))
            if index < num_segments - 1:
                states = handover.forward(leaving)
            if after_segment is not None:
                after_segment(index + 1, num_segments)
    return torch.stack(losses).sum(), list(leaving)


def move_states(states: States, shard: SequenceShard | None) -> list[torch.Tensor]:
    """The states after a sequence, on the rank that holds the first tokens of the next one; on
    other ranks, tensors of the same shapes. Every rank of the shard's group makes this call.

    Args:
        states: after the sequence, or after its last segment.
        shard: of the sequence, or of its last segment.
    """
    moved = _Handover(shard).forward(states)
    return list(states) if moved is None else moved


def _check(num_segments: int, gradient: str, keep_on: str) -> None:
    if num_segments < 1:
        raise ValueError(f"num_segments is {num_segments}: there must be at least 1.")
    if gradient not in ("exact", "truncated"):
        raise ValueError(f"gradient is {gradient!r}: it must be exact or truncated.")
    if keep_on not in ("device", "host"):
        raise ValueError(f"keep_on is {keep_on!r}: it must be device or host.")


class _Call(NamedTuple):
    """The arguments of `backward_in_segments` that both gradients need."""

    run: RunSegment
    num_segments: int
    loss_scale: float
    handover: _Handover
    accumulate: Callable[[bool], AbstractContextManager[Any]]
    after_segment: Callable[[int, int], None]


def _exact(call: _Call, states: States | None, keep_on: str):
    last, total = call.num_segments - 1, 2 * call.num_segments - 1
    kept = _StatesStore(keep_on)
    with torch.no_grad():
        for index in range(last):
            kept.append(states)
            _, leaving = call.run(index, states, states_only=True)
            states = call.handover.forward(leaving)
            call.after_segment(index + 1, total)
        kept.append(states)
    losses, last_states = [], []
    gradients: list[torch.Tensor] | None = None
    for index in reversed(range(call.num_segments)):
        entering = _leaves(kept.pop())
        with call.accumulate(index == 0):
            loss, leaving = call.run(index, entering, states_only=False)
            losses.append(_summand(loss))
            roots, seeds = [loss], [torch.full_like(loss, call.loss_scale)]
            if gradients is not None:
                for state, each in zip(leaving, gradients, strict=True):
                    # False: the model is frozen, or a document ended here.
                    if state.requires_grad:
                        roots.append(state)
                        seeds.append(each)
            torch.autograd.backward(roots, seeds)
        if index == last:
            last_states = [state.detach() for state in leaving]
        if index:
            gradients = call.handover.backward(entering, like=leaving)
        # The next segment needs their memory.
        del loss, leaving, roots, seeds, entering
        call.after_segment(total - index, total)
    return torch.stack(losses).sum(), last_states


def _truncated(call: _Call, states: States | None):
    losses = []
    for index in range(call.num_segments):
        with call.accumulate(index == call.num_segments - 1):
            # Leaves as in the exact gradient, so that compiled code serves both.
            loss, leaving = call.run(index, _leaves(states), states_only=False)
            losses.append(_summand(loss))
            loss.backward(torch.full_like(loss, call.loss_scale))
        leaving = [state.detach() for state in leaving]
        del loss
        if index < call.num_segments - 1:
            states = call.handover.forward(leaving)
        call.after_segment(index + 1, call.num_segments)
    return torch.stack(losses).sum(), leaving


def _summand(loss: torch.Tensor | None) -> torch.Tensor:
    """A segment's loss for the sum over all: float64, without gradient."""
    if loss is None:
        raise ValueError("run returned no loss: only with states_only=True it may be None.")
    return loss.detach().double()


def _leaves(states: States | None) -> list[torch.Tensor] | None:
    return None if states is None else [state.detach().requires_grad_() for state in states]


class _StatesStore:
    """A stack of states, in the order of segments.

    Args:
        keep_on: "host" copies CUDA tensors to pinned memory. Both copies run on the current stream:
            the states of TNL-1b are 18 MB, a third of a millisecond.
    """

    def __init__(self, keep_on: str) -> None:
        self._to_host = keep_on == "host"
        self._kept: list[list[tuple[torch.Tensor, torch.device]] | None] = []

    def append(self, states: States | None) -> None:
        self._kept.append(None if states is None else [self._store(state) for state in states])

    def pop(self) -> list[torch.Tensor] | None:
        states = self._kept.pop()
        if states is None:
            return None
        return [state.to(device, non_blocking=True) for state, device in states]

    def _store(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.device]:
        kept = state.detach()
        if self._to_host and kept.is_cuda:
            # torch's allocator of pinned memory keeps it for the next step.
            copy = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
            kept = copy.copy_(kept, non_blocking=True)
        return kept, state.device


class _Handover:
    """Moves states from the rank with a segment's last tokens to the one with its first tokens, and
    their gradients back."""

    def __init__(self, shard: SequenceShard | None) -> None:
        self._group = None if shard is None else shard.group
        self._is_first = shard is None or shard.is_first
        self._holds_last = shard is None or shard.is_last
        # In zigzag the first rank holds the last tokens too.
        self._sends = shard is not None and shard.size > 1 and shard.layout == "contiguous"
        if self._sends:
            assert self._group is not None
            ranks = dist.get_process_group_ranks(self._group)
            # Of packed documents, ranks after the last token have no state.
            lengths = shard.lengths or (1,) * shard.size
            last = max((rank for rank, tokens in enumerate(lengths) if tokens), default=0)
            self._first, self._last = ranks[0], ranks[last]
            self._holds_last = shard.rank == last

    def entering(self, states: States | None) -> States | None:
        """Initial states, on the rank that uses them."""
        return states if self._is_first else None

    def forward(self, leaving: States) -> list[torch.Tensor] | None:
        """The states that enter the next segment, on the rank that holds its first tokens."""
        states = [state.detach() for state in leaving]
        if self._sends:
            states = self._move(states, self._last, self._first)
        return states if self._is_first else None

    def backward(self, entering: States | None, like: States) -> list[torch.Tensor] | None:
        """The gradients of the states that the segment before returned, on the rank that returned
        them; None where there are none."""
        gradients: list[torch.Tensor] | None = None
        if entering is not None and any(state.grad is not None for state in entering):
            gradients = [
                torch.zeros_like(state) if state.grad is None else state.grad for state in entering
            ]
        if self._sends:
            if gradients is None:
                gradients = [torch.zeros_like(state) for state in like]
            gradients = self._move(gradients, self._first, self._last)
        return gradients if self._holds_last else None

    def _move(self, tensors: list[torch.Tensor], source: int, target: int) -> list[torch.Tensor]:
        """On `target`, the tensors of `source`: one message per dtype."""
        assert self._group is not None
        if dist.get_rank() not in (source, target):
            return tensors
        moved = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            parts = [tensors[i] for i in places]
            if dist.get_rank() == source:
                message = torch.cat([part.flatten() for part in parts])
                dist.send(message, target, self._group)
                continue
            message = parts[0].new_empty(sum(part.numel() for part in parts))
            dist.recv(message, source, self._group)
            split = message.split([part.numel() for part in parts])
            for i, values, part in zip(places, split, parts, strict=True):
                moved[i] = values.view(part.shape)
        return moved
