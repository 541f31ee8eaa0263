"""The loss of a model by position: what each token costs, given how many tokens came before it.

Positions count the context that the model has seen: from the first token of the sequence, or of the
document where documents are kept apart. Bucket 0 is position 0, bucket b the positions
2^(b-1) <= p < 2^b. Sums are float64, counts are exact, and every label counts once.

Shapes: B sequences, T tokens of this rank, K buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launch.data import IGNORE, Batch, Segments, TokenSource, read_batch
from launch.distributed import DistContext
from launch.evaluation.setup import Evaluated
from parallel.streaming import loss_in_segments


class PositionLosses:
    """Sums of losses and numbers of labels by bucket, on a device.

    Args:
        length: positions are below it.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self._length = length
        self.num_buckets = (length - 1).bit_length() + 1
        self.sums = torch.zeros(self.num_buckets, dtype=torch.float64, device=device)
        self.counts = torch.zeros(self.num_buckets, dtype=torch.int64, device=device)
        self._starts = torch.tensor([1 << n for n in range(self.num_buckets - 1)], device=device)

    def add(self, losses_BT: Tensor, labels_BT: Tensor, positions_T: Tensor) -> None:
        """Add the losses of some tokens; those whose label is IGNORE do not count."""
        bucket_T = torch.bucketize(positions_T, self._starts, right=True)
        valid_BT = labels_BT != IGNORE
        losses_BT = losses_BT.double().masked_fill(~valid_BT, 0)
        # Bucket by bucket: a scatter on a GPU would add in another order each time.
        for bucket in range(self.num_buckets):
            inside_T = bucket_T == bucket
            self.sums[bucket] += losses_BT.masked_fill(~inside_T, 0).sum()
            self.counts[bucket] += (valid_BT & inside_T).sum()

    def reduce(self, ctx: DistContext) -> None:
        """Add up over all ranks, on every rank."""
        if not ctx.is_loss_rank:
            self.sums.zero_()
            self.counts.zero_()
        ctx.all_reduce(self.sums)
        ctx.all_reduce(self.counts)

    @property
    def num_labels(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Nats per token over all positions; there must be a label."""
        return float(self.sums.sum()) / self.num_labels

    def table(self) -> list[dict[str, Any]]:
        """A row for each bucket with a label: positions from <= p < to, tokens, mean loss."""
        rows = []
        pairs = zip(self.sums.tolist(), self.counts.tolist(), strict=True)
        for bucket, (total, count) in enumerate(pairs):
            first = 1 << bucket - 1 if bucket else 0
            if count:
                last = min(1 << bucket, self._length)
                rows.append({"from": first, "to": last, "tokens": count, "loss": total / count})
        return rows


@dataclass(frozen=True)
class LossTask:
    """Which samples are read, and how.

    Attributes:
        source: of the samples.
        segments: how a sample divides into forwards; a single one is the sample itself.
        num_samples: the first ones of the source.
        batch_size: samples of one forward.
        varlen: keep documents apart.
    """

    source: TokenSource
    segments: Segments
    num_samples: int
    batch_size: int
    varlen: bool

    def own_batches(self, ctx: DistContext) -> list[list[int]]:
        """The samples of this rank, batch by batch. Ranks may have different numbers of them."""
        own = range(ctx.info.dp_rank, self.num_samples, ctx.dims.dp)
        return [list(own[n : n + self.batch_size]) for n in range(0, len(own), self.batch_size)]


def check_samples(task: LossTask, ctx: DistContext) -> None:
    """Read this rank's tokens once: a rank with bad data must fail before others wait for it.

    Raises:
        DataError: tokens outside the vocabulary.
    """
    parts = task.segments
    for indices in task.own_batches(ctx):
        for index in indices:
            for part in range(parts.count):
                first = parts.start(part)
                for start, stop in parts.shard(part).ranges:
                    task.source.sample(index, first + start, first + stop)


@torch.no_grad()
def loss_by_position(
    evaluated: Evaluated,
    task: LossTask,
    after_forward: Callable[[int], None] = lambda tokens: None,
) -> PositionLosses:
    """The losses of the task's samples, summed over all ranks.

    Args:
        after_forward: called with the tokens of each forward of this rank's sequences (over the
            ranks that share them).
    """
    losses = PositionLosses(task.segments.seq_len, evaluated.ctx.device)
    for indices in task.own_batches(evaluated.ctx):
        _add_samples(losses, evaluated, task, indices, after_forward)
    losses.reduce(evaluated.ctx)
    return losses


def _add_samples(
    losses: PositionLosses,
    evaluated: Evaluated,
    task: LossTask,
    indices: list[int],
    after_forward: Callable[[int], None],
) -> None:
    parts, device = task.segments, evaluated.ctx.device
    # Softmax layers have no initial states, and a sample in one forward needs none.
    zeros = evaluated.model.initial_states(len(indices)) if parts.count > 1 else None
    # The first token of the document that goes on from one segment to the next.
    document = 0

    def run(index: int, states: Sequence[Tensor] | None, *, states_only: bool):
        nonlocal document
        first = parts.start(index)
        batch = read_batch(
            task.source,
            indices,
            parts.shard(index),
            first=first,
            pad_id=evaluated.pad_id,
            varlen=task.varlen,
        )
        before = None
        if zeros is not None:
            entering = zeros.layers if states is None or not batch.continues else list(states)
            before = dataclasses.replace(zeros, layers=entering, position=first)
        out = evaluated.loss_model(*batch.arguments(device), before, per_token=True)
        token_losses, leaving = (out, []) if before is None else out
        positions, document = _positions(batch, first, document, device)
        losses.add(token_losses, batch.labels.to(device), positions)
        after_forward(len(indices) * batch.shard.total)
        return token_losses.double().sum(), leaving

    loss_in_segments(run, parts.count, shard=parts.shard(0))


def _positions(batch: Batch, first: int, document: int, device: torch.device) -> tuple[Tensor, int]:
    """The position of each token of a batch in its document, [T], and where the last document
    starts.

    Args:
        first: the batch's first token in the sequence.
        document: where the document before that token starts.
    """
    positions = batch.shard.positions(device) + first
    if batch.cu_seqlens is None:
        return positions, 0
    inside = [first + start for start in batch.cu_seqlens[1:-1]]
    starts = [document if batch.continues else first, *inside]
    starts_D = torch.tensor(starts, device=device)
    own = torch.bucketize(positions, starts_D, right=True) - 1
    return positions - starts_D[own], starts[-1]
