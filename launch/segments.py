"""A step over sequences in segments: what `parallel.streaming` needs of the launcher, the progress
lines of a step that takes minutes, and stopping between two segments."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from launch.data import SegmentedBatch, stream_offset
from launch.distributed import start_copy
from launch.metrics import clock
from launch.progress import LineTimer
from launch.train_state import TrainState
from parallel.streaming import (
    RunSegment,
    backward_in_segments,
    loss_in_segments,
    move_states,
)

# A backward takes twice the time of a forward.
_FORWARD, _BOTH = 1, 3


class Interrupted(Exception):  # noqa: N818 (no error: the run was asked to stop)
    """Ranks were asked to stop and give up the step, all at the same segment."""


def forward_backward(
    state: TrainState, *, batches: Sequence[SegmentedBatch], num_labels: int
) -> Tensor:
    """`launch.trainer.forward_backward` for sequences in segments.

    Raises:
        Interrupted: a rank was asked to stop; on all ranks. Gradients are incomplete.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=state.ctx.device)
    training, segments = state.config.training, state.segments
    assert segments is not None
    watch = _Watch(state, len(batches))
    position, carried = stream_position(state), state.carried
    if position == 0:
        carried = None
    leaving: list[list[Tensor]] = []
    for number, batch in enumerate(batches, 1):

        def accumulating(last: bool, is_last_batch: bool = number == len(batches)):
            return state.accumulating(last=last and is_last_batch)

        loss, last_states = backward_in_segments(
            segment_runner(state, batch, position),
            batch.num_segments,
            gradient=training.segment_gradient,
            loss_scale=1 / num_labels,
            initial_states=None if carried is None else carried[number - 1],
            shard=segments.shard(0),
            keep_on=training.segment_states,
            accumulate=accumulating,
            after_segment=watch.after_segment,
        )
        watch.batches_done = number
        loss_sum += loss
        if training.carry_state:
            leaving.append(move_states(last_states, segments.shard(segments.count - 1)))
    state.leaving = leaving if training.carry_state else None
    return loss_sum


def stream_position(state: TrainState) -> int:
    """The position of the step's first tokens in their stream; 0 without training.carry_state."""
    if not state.config.training.carry_state:
        return 0
    count, num_samples = state.batching.global_batch_size, state.train_source.num_samples
    return stream_offset(state.consumed, count, num_samples) * state.config.training.seq_len


def evaluate(state: TrainState, batch: SegmentedBatch) -> Tensor:
    """Sum of the loss over this rank's tokens, without gradients."""
    assert state.segments is not None
    run = segment_runner(state, batch)
    return loss_in_segments(run, batch.num_segments, shard=state.segments.shard(0))[0]


def segment_runner(state: TrainState, batch: SegmentedBatch, first: int = 0) -> RunSegment:
    """The function that runs a segment of a micro-batch; `first` is the position of its first
    token."""
    segments, device = state.segments, state.ctx.device
    assert segments is not None

    # Zero tensors rather than None for the first segment: compiled blocks then see one kind of
    # call. A last validation batch may have fewer sequences than others.
    initial_states = functools.cache(state.model.initial_states)

    def run(index: int, states: Sequence[Tensor] | None, *, states_only: bool):
        part = batch.read(index)
        zeros = initial_states(len(part.inputs))
        if states is None or not part.continues:
            with_grad = torch.is_grad_enabled()
            states = [each.detach().requires_grad_(with_grad) for each in zeros.layers]
        position = first + segments.start(index)
        before = dataclasses.replace(zeros, layers=list(states), position=position)
        inputs, labels, shard, cu_seqlens = part.arguments(device)
        more = part.options(device)
        if states_only or not torch.is_grad_enabled():
            labels = None if states_only else labels
            return state.loss_model(inputs, labels, shard, cu_seqlens, before, **more)
        return state.wrapped_model(inputs, labels, shard, cu_seqlens, before, **more)

    return run


class _Watch:
    """Called after every segment of a step: prints progress, lets the host run ahead of the device
    by one segment at most, and raises Interrupted on all ranks after one of them got a signal."""

    def __init__(self, state: TrainState, num_batches: int) -> None:
        self.batches_done = 0
        self._state = state
        self._num_batches = num_batches
        self._stopping: Callable[[], list[float]] | None = None
        self._timer = LineTimer()

    def after_segment(self, done: int, total: int) -> None:
        ctx = self._state.ctx
        flag = torch.full((1,), float(bool(self._state.stop_signals)), device=ctx.device)
        # The reduction of the segment before is read, which has long ended on the device.
        stopping, self._stopping = self._stopping, start_copy(ctx.all_reduce(flag))
        if stopping is not None and stopping()[0]:
            raise Interrupted
        if ctx.is_rank0 and self._timer.is_due():
            print(self._line(done, total), flush=True)

    def _line(self, done: int, total: int) -> str:
        state, training = self._state, self._state.config.training
        share = self._share(done, total)
        seconds = time.monotonic() - self._timer.began
        rate = share * state.batching.tokens_per_step / seconds
        text = f"step {state.step + 1}: segment {done:,}/{total:,}"
        if training.segment_gradient == "exact":
            text += " of both passes"
        if self._num_batches > 1:
            text += f", micro-batch {self.batches_done + 1}/{self._num_batches}"
        return f"{text}  tok/s: {rate:,.0f}  [{clock(seconds)}<{clock(seconds / share - seconds)}]"

    def _share(self, done: int, total: int) -> float:
        """The share of the step's work that is done."""
        forwards = total // 2
        if self._state.config.training.segment_gradient == "truncated":
            forwards = 0
        work = min(done, forwards) * _FORWARD + max(0, done - forwards) * _BOTH
        full = forwards * _FORWARD + (total - forwards) * _BOTH
        return (self.batches_done + work / full) / self._num_batches
