"""What a training run consists of, and the outcome of a step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO

import torch
from torch import Tensor, nn

from lasp import SequenceShard
from launch.build import LossModel
from launch.checkpoint.pending import PendingSave
from launch.checkpoint.store import CheckpointStore
from launch.config import Config
from launch.data import Segments, TokenSource, step_samples
from launch.distributed import DistContext
from launch.resolve import Batching
from launch.tokenizer import Tokenizer
from parallel.data import accumulate


@dataclass
class TrainState:
    """Everything a step needs; `step` and `consumed` are the whole of its position.

    Attributes:
        shard: this rank's tokens of a sequence.
        segments: how a sequence divides, if it is processed in segments.
        loss_model: holds `model`.
        wrapped_model: `loss_model` as data parallelism runs it; itself if there are no other ranks.
        lock: of the dump folder, on rank 0.
        step: steps taken.
        consumed: samples consumed, over all ranks.
        saved_step: the step of the newest checkpoint on disk; None if there is none.
        failed_saves: checkpoints in a row that could not be written.
        pending: a checkpoint that is being written.
        carried: with training.carry_state, the states after the last step of each micro-batch, on
            the rank that holds a sequence's first tokens; None if the next step starts without.
        leaving: those of the step that is being taken.
        stop_signals: signals that asked this process to stop.
        host_copies: host memory that its tensors are copied to, by name.
    """

    config: Config
    ctx: DistContext
    batching: Batching
    tokenizer: Tokenizer | None
    train_source: TokenSource
    val_source: TokenSource | None
    shard: SequenceShard
    model: nn.Module
    loss_model: LossModel
    wrapped_model: nn.Module
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    lock: IO[str] | None = None
    segments: Segments | None = None
    step: int = 0
    consumed: int = 0
    saved_step: int | None = None
    failed_saves: int = 0
    pending: PendingSave | None = None
    carried: list[list[Tensor]] | None = None
    leaving: list[list[Tensor]] | None = None
    stop_signals: list[int] = field(default_factory=list)
    host_copies: dict[str, Tensor] = field(default_factory=dict)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """`parallel.data.accumulate`, as configured; `last`: of the step's backwards."""
        parallelism = self.config.parallelism
        return accumulate(
            self.wrapped_model,
            last=last,
            every=parallelism.fsdp_reduce_every_micro_batch,
            keep_gathered=parallelism.fsdp_reshard_after_forward == "never",
        )

    def own_samples(self, indices: list[int]) -> list[list[int]]:
        """Of the samples of a step, those of this rank's micro-batches."""
        return step_samples(
            indices,
            local_batch_size=self.config.training.local_batch_size,
            dp_rank=self.ctx.info.dp_rank,
            dp=self.ctx.dims.dp,
        )


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on all ranks.

    Attributes:
        loss: nats per token; None if the step was skipped because of NaN or Inf.
        grad_norm: of the whole job, before clipping.
        stop_requested: on any rank.
        save_written: every rank has written its part of the pending checkpoint.
        interrupted: the step was given up between two segments, because a rank was asked to stop.
    """

    loss: float | None
    grad_norm: float
    stop_requested: bool
    save_written: bool = False
    interrupted: bool = False
