"""One step of training, and validation: from sample indices to a loss that all ranks share."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from launch import segments
from launch.data import (
    Batch,
    SegmentedBatch,
    TokenSource,
    dropout_seeds,
    read_batch,
    stream_order,
)
from launch.distributed import start_copy
from launch.exit_codes import DataError
from launch.optimizer import clipped_step, learning_rate
from launch.progress import progress
from launch.train_state import StepResult, TrainState
from parallel.compile import eagerly
from parallel.data import reshard
from parallel.mesh import full_tensor


def forward_backward(
    state: TrainState, *, batches: Sequence[Batch] | Sequence[SegmentedBatch], num_labels: int
) -> Tensor:
    """Turn the micro-batches of a step into gradients: each forward and backward in turn, summed
    over micro-batches and ranks.

    Args:
        state: the gradients of its parameters are added to.
        batches: this rank's micro-batches, the same number on every rank.
        num_labels: labels of the step over all ranks. Each micro-batch's loss is divided by it, so
            that the SUM of gradients over micro-batches and ranks is that of the mean loss.

    Returns:
        Sum of the loss over this rank's tokens, a float64 scalar on the device.
    """
    if state.segments is not None:
        return segments.forward_backward(state, batches=batches, num_labels=num_labels)
    loss_sum = torch.zeros((), dtype=torch.float64, device=state.ctx.device)
    for number, batch in enumerate(batches, 1):
        with state.accumulating(last=number == len(batches)):
            device = state.ctx.device
            loss = state.wrapped_model(*batch.arguments(device), **batch.options(device))
            (loss / num_labels).backward()
        loss_sum += loss.detach()
    return loss_sum


def train_step(
    state: TrainState, *, forward_backward: Callable[..., Tensor] = forward_backward
) -> StepResult:
    """One optimizer step. If loss or gradients are NaN or Inf on any rank, nothing changes.

    Args:
        state: once its `stop_signals` are not empty on a rank, the result says so on all ranks.
            With segments, the step is then given up.
        forward_backward: called as the function of that name; another one replaces it.

    Raises:
        DataError: tokens outside the vocabulary, or no label to learn from, on any rank.
    """
    ctx = state.ctx
    ctx.enter("reading data", state.step + 1)
    batches = read_step(state)
    num_labels = count_labels(state, batches)
    state.optimizer.zero_grad()
    ctx.enter("forward and backward")
    try:
        loss_sum = forward_backward(state, batches=batches, num_labels=num_labels)
    except segments.Interrupted:
        state.optimizer.zero_grad()
        reshard(state.loss_model)
        return StepResult(None, math.nan, stop_requested=True, interrupted=True)
    ctx.enter("reduction")
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    # If gradients are sharded over ranks, this is the norm of all shards together.
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    sums = reduce_step(state, loss_sum, norm, bool(state.stop_signals))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, state.config)
    # Queued before the host waits for the sums: the device goes on meanwhile.
    wait = start_copy(sums)
    clipped_step(state.optimizer, norm, state.config.training.max_norm, skip=sums[1] > 0)
    loss, nonfinite, stop, writing, grad_norm = wait()
    save_written = state.pending is not None and not writing
    result = StepResult(
        None if nonfinite else loss / num_labels, grad_norm, bool(stop), save_written
    )
    if result.loss is not None:
        state.step += 1
        state.consumed += state.batching.global_batch_size
        state.carried = state.leaving
    return result


def reduce_step(state: TrainState, loss_sum: Tensor, norm: Tensor, stop_requested: bool) -> Tensor:
    """The loss summed over ranks, how many ranks have NaN or Inf, how many were asked to stop, how
    many are writing a checkpoint, all in one reduction; and the gradients' norm: float64 [5]."""
    nonfinite = ~(loss_sum.isfinite() & norm.isfinite())
    writing = state.pending is not None and not state.pending.is_done
    flags = [torch.full_like(loss_sum, flag) for flag in (stop_requested, writing)]
    local = [loss_sum * state.ctx.is_loss_rank, nonfinite.double(), *flags]
    # A NaN loss does not spread to the flags beside it.
    sums = state.ctx.all_reduce(torch.stack(local))
    return torch.cat([sums, norm.double().view(1)])


def read_step(state: TrainState) -> list[Batch] | list[SegmentedBatch] | DataError:
    """This rank's micro-batches of the next step, or what is wrong with its data."""
    parts = state.own_samples(step_indices(state))
    try:
        return [read(state, state.train_source, part, with_dropout=True) for part in parts]
    except DataError as error:
        return error


def step_indices(state: TrainState) -> list[int]:
    """The samples of the next step, over all ranks."""
    count = state.batching.global_batch_size
    if state.config.training.carry_state:
        return stream_order(state.consumed, count, state.train_source.num_samples)
    return state.train_source.order(state.consumed, count, state.config.training.seed)


def read(
    state: TrainState, source: TokenSource, indices: list[int], *, with_dropout: bool = False
) -> Batch | SegmentedBatch:
    """This rank's shard of some samples; in segments if the run has them, their labels counted."""
    seeds = None
    if with_dropout and state.model.config.dropout:
        seeds = dropout_seeds(indices, state.step, state.config.training.seed)
    pad_id = None if state.tokenizer is None else state.tokenizer.pad_id
    options = dict(pad_id=pad_id, varlen=state.config.training.varlen)
    parts = state.segments
    if parts is None:
        batch = read_batch(source, indices, state.shard, **options)
        return dataclasses.replace(batch, dropout_seeds=seeds)

    def read_segment(index: int) -> Batch:
        shard, first = parts.shard(index), parts.start(index)
        batch = read_batch(source, indices, shard, first=first, **options)
        return dataclasses.replace(batch, dropout_seeds=seeds)

    return SegmentedBatch(read_segment, parts.count).with_labels_counted()


def count_labels(state: TrainState, batches: list[Batch] | list[SegmentedBatch] | DataError) -> int:
    """Labels of the step that are not ignored, over all ranks.

    Raises:
        DataError: the data of a rank is bad, or there is no such label; on all ranks.
    """
    ctx, error = state.ctx, batches if isinstance(batches, DataError) else None
    local = 0 if error else sum(each.num_labels for each in batches)
    total, bad = ctx.sum_numbers(local * ctx.is_loss_rank, error is not None, dtype=torch.int64)
    if bad:
        ctx.all_or_raise(lambda: _raise(error))
    if not total:
        text = f"step {state.step + 1}: every label is ignored (samples {step_indices(state)[:8]})."
        ctx.fail(DataError(text))
    return total


def _raise(error: DataError | None) -> None:
    if error is not None:
        raise error


@torch.no_grad()
def validate(state: TrainState) -> float:
    """Loss in nats per token over the first samples of the validation split."""
    ctx = state.ctx
    # Read before the first forward: a rank with bad data fails before others block in the ring.
    batches = ctx.all_or_raise(lambda: list(_validation_batches(state)))
    with eagerly(state.model.blocks):
        loss_sum = sum(
            batch_loss(state, batch).item()
            for batch in progress(batches, "validation", enabled=ctx.is_rank0)
        )
    reshard(state.loss_model)
    labels = sum(batch.num_labels for batch in batches)
    local = loss_sum * ctx.is_loss_rank, labels * ctx.is_loss_rank
    loss_sum, labels = ctx.sum_numbers(*local, dtype=torch.float64)
    if not labels:
        ctx.fail(DataError("validation: every label is ignored; use other validation data."))
    return loss_sum / labels


def batch_loss(state: TrainState, batch: Batch | SegmentedBatch) -> Tensor:
    """Sum of the loss over this rank's tokens."""
    if isinstance(batch, SegmentedBatch):
        return segments.evaluate(state, batch)
    return state.loss_model(*batch.arguments(state.ctx.device))


def _validation_batches(state: TrainState) -> Iterator[Batch | SegmentedBatch]:
    config, source, dp = state.config, state.val_source, state.ctx.dims.dp
    assert source is not None
    local = config.training.local_batch_size
    # The same samples on any mesh with the same global batch.
    indices = source.first(config.validation.steps * state.batching.global_batch_size)
    count = len(indices)
    # Strided, so that a last incomplete batch is spread evenly; a rank may get none.
    own = indices[state.ctx.info.dp_rank :: dp]
    for first in range(0, len(own), local):
        yield read(state, source, own[first : first + local])
    # If weights are gathered for a forward, every rank must take part in every forward.
    for _ in range(-(-len(own) // local), -(-count // (local * dp))):
        yield read(state, source, [0]).without_labels()
