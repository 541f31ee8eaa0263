"""One step of training, and validation: from sample indices to a loss that all ranks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lasp import SequenceShard
from lasp.tnl import TNL
from launch.checkpoint import CheckpointStore
from launch.config import Config
from launch.data import IGNORE, Batch, TokenSource, read_batch, sample_order, step_samples
from launch.errors import DataError, UserError
from launch.optimization import learning_rate
from launch.plan import Batching
from launch.saving import PendingSave
from launch.tokenizer import Tokenizer
from launch.world import World
from parallel.compile import eagerly
from parallel.data import accumulate, reshard
from parallel.loss import chunked_cross_entropy
from parallel.mesh import full_tensor

__all__ = ["LossModel", "Outcome", "Run", "step_indices", "take_step", "validate"]


class LossModel(nn.Module):
    """The model with its loss, so that data parallelism sees one forward."""

    def __init__(
        self, model: TNL, chunk_size: int, dtype: torch.dtype | None, compiled: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._chunk_size = chunk_size
        self._dtype = dtype
        self._compiled = compiled

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor,
        shard: SequenceShard,
        boundaries: tuple[int, ...] | None,
    ) -> Tensor:
        """Sum of the loss over this rank's tokens, a float32 scalar."""
        enabled = self._dtype is not None
        # Numbers until here: FSDP brings every tensor that it is given to the GPU, and the operator
        # wants these on the host.
        cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
        with torch.autocast(inputs.device.type, self._dtype, enabled=enabled):
            hidden = self.model(inputs, shard=shard, return_hidden=True, cu_seqlens=cu_seqlens)
            return chunked_cross_entropy(
                hidden,
                self.model.head_weight,
                labels,
                ignore_index=IGNORE,
                chunk_size=self._chunk_size,
                compiled=self._compiled,
            )


@dataclass
class Run:
    """Everything a step needs. `step` and `consumed` are all of its position."""

    config: Config
    world: World
    batching: Batching
    tokenizer: Tokenizer | None
    train_source: TokenSource
    val_source: TokenSource | None
    shard: SequenceShard
    # `loss_model` holds `model`; `trained` is `loss_model`, wrapped if there are other ranks.
    model: TNL
    loss_model: LossModel
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    step: int = 0
    consumed: int = 0
    # The step that is on disk, None before the first checkpoint.
    saved_step: int | None = None
    failed_saves: int = 0
    # A checkpoint that is being written, and the host memory that its tensors were copied to.
    pending: PendingSave | None = None
    host_copies: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What all ranks agree on after a step.

    Attributes:
        loss: None if the step was not taken.
        grad_norm: of the whole job, before clipping.
        stop_requested: of any rank.
        save_is_through: every rank has written its part of the pending checkpoint.
    """

    loss: float | None
    grad_norm: float
    stop_requested: bool
    save_is_through: bool = False


def take_step(run: Run, stop_requested: bool) -> Outcome:
    """One optimizer step. If loss or gradients are not finite on any rank, nothing changes.

    Raises:
        DataError: tokens outside the vocabulary, or no label to learn from, on any rank.
    """
    config, world = run.config, run.world
    batches = read_step(run)
    valid = count_labels(run, batches)
    run.optimizer.zero_grad()
    # Loss, norm and flags stay on the device until the step's one look at it, below.
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    layout = config.parallelism
    for number, batch in enumerate(batches, 1):
        with accumulate(
            run.trained,
            last=number == len(batches),
            every=layout.fsdp_reduce_every_micro_batch,
            keep_gathered=layout.fsdp_reshard_after_forward == "never",
        ):
            loss = run.trained(*on_device(run, batch))
            # Divided by the tokens of the whole job: gradients are then summed over ranks.
            (loss / valid).backward()
        loss_sum += loss.detach()
    # Of gradients that are cut over ranks this is the norm of the whole.
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    nonfinite = ~(loss_sum.isfinite() & norm.isfinite())
    writing = run.pending is not None and not run.pending.is_through
    flags = [torch.full_like(loss_sum, flag) for flag in (stop_requested, writing)]
    mine = [loss_sum * world.counts, nonfinite.double(), *flags]
    # A NaN in the sum of losses leaves the sums of flags beside it alone.
    sums = world.summed(torch.stack(mine))
    loss_total, nonfinite, stop, writing, grad_norm = torch.cat(
        [sums, norm.double().view(1)]
    ).tolist()
    through = run.pending is not None and not writing
    if nonfinite:
        return Outcome(None, grad_norm, bool(stop), through)
    # (A norm below the limit would be multiplied by one.)
    if 0 < config.training.max_norm < grad_norm:
        torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), config.training.max_norm, norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, config)
    run.optimizer.step()
    run.step += 1
    run.consumed += run.batching.global_batch_size
    return Outcome(loss_total / valid, grad_norm, bool(stop), through)


def read_step(run: Run) -> list[Batch] | DataError:
    """This rank's micro-batches of the next step, or what is wrong with its data."""
    training = run.config.training
    indices = step_indices(run)
    parts = step_samples(
        indices,
        local_batch_size=training.local_batch_size,
        dp_rank=run.world.place.dp_rank,
        dp=run.world.dims.dp,
    )
    try:
        return [read(run, run.train_source, part) for part in parts]
    except DataError as error:
        return error


def step_indices(run: Run) -> list[int]:
    """The samples of the next step, over all ranks."""
    return sample_order(
        run.consumed,
        run.batching.global_batch_size,
        run.train_source.num_samples,
        run.config.training.seed,
    )


def read(run: Run, source: TokenSource, indices: list[int]) -> Batch:
    pad_id = None if run.tokenizer is None else run.tokenizer.pad_id
    return read_batch(source, indices, run.shard, pad_id=pad_id, varlen=run.config.training.varlen)


def count_labels(run: Run, batches: list[Batch] | DataError) -> int:
    """Labels that count, over all ranks: what the loss is divided by."""
    problem = batches if isinstance(batches, DataError) else None
    valid = 0 if problem else sum(int((each.labels != IGNORE).sum()) for each in batches)
    valid, bad = run.world.total(valid * run.world.counts, problem is not None, dtype=torch.int64)
    if bad:
        run.world.agree(lambda: _raise(problem))
    if not valid:
        text = f"step {run.step + 1}: every label is ignored (samples {step_indices(run)[:8]})."
        run.world.fail(DataError(text))
    return valid


def _raise(problem: UserError | None) -> None:
    if problem is not None:
        raise problem


def on_device(
    run: Run, batch: Batch
) -> tuple[Tensor, Tensor, SequenceShard, tuple[int, ...] | None]:
    """The arguments of `LossModel` for a batch."""
    device = run.world.device
    return (
        batch.inputs.to(device, non_blocking=True),
        batch.labels.to(device, non_blocking=True),
        run.shard,
        batch.boundaries,
    )


def nothing_to_predict(run: Run, source: TokenSource) -> Batch:
    """A batch without labels."""
    batch = read(run, source, [0])
    return dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORE))


@torch.no_grad()
def validate(run: Run) -> float:
    """Loss in nats per token over the first samples of the validation split."""
    config, world = run.config, run.world
    source = run.val_source
    assert source is not None
    local, dp = config.training.local_batch_size, world.dims.dp
    # The same samples on any mesh, as long as the global batch is.
    count = min(config.validation.steps * run.batching.global_batch_size, source.num_samples)
    # Strided, so that a last incomplete batch is spread evenly; a rank may get none.
    mine = list(range(world.place.dp_rank, count, dp))
    # Read before the first forward: a rank that finds bad data must not leave others in a ring.
    batches = world.agree(
        lambda: [read(run, source, mine[i : i + local]) for i in range(0, len(mine), local)]
    )
    # Where weights are gathered for a forward, every rank must come to every forward.
    for _ in range(len(batches), -(-count // (local * dp))):
        batches.append(nothing_to_predict(run, source))
    with eagerly(run.model.blocks):
        loss_sum = sum(run.loss_model(*on_device(run, batch)).item() for batch in batches)
    reshard(run.loss_model)
    valid = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    counted = loss_sum * world.counts, valid * world.counts
    loss_sum, valid = world.total(*counted, dtype=torch.float64)
    if not valid:
        world.fail(DataError("validation: every label is ignored; use other validation data."))
    return loss_sum / valid
