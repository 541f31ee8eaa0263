"""Save a run, and resume it on any mesh.

Every rank writes its shards into one staging folder; once all have succeeded, rank 0 commits it
(launch/checkpoint/store.py). In the background ("async"), shards are first copied to host memory, a
thread of each rank writes them, and the commit happens at the first step after all threads are
done: the ranks learn that from the reduction that they do at each step anyway.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch import random_state
from launch.checkpoint.compare import check_changes, sample_identity
from launch.checkpoint.manifest import seal_file, tensor_file
from launch.checkpoint.parts import DamagedError
from launch.checkpoint.pending import PendingSave
from launch.checkpoint.shards import TensorFiles, TensorShard, shard_of, write_shards
from launch.checkpoint.store import Checkpoint, DiskError, check_writable, inspect
from launch.data_digests import data_identity
from launch.exit_codes import CheckpointError
from launch.optimizer import load_model_tensors, load_optimizer_tensors, optimizer_tensors
from launch.toml_config import to_toml
from launch.train_state import TrainState

# What a run that has taken steps resumes from state.json.
_POSITION = ("consumed_samples", "sample_identity", "random")


def start_save(state: TrainState, *, background: bool) -> None:
    """Begin a checkpoint of this step; `finish_save` ends it.

    Raises:
        CheckpointError: a valid checkpoint of this step exists.
    """
    ctx, began = state.ctx, time.perf_counter()
    shards = local_shards(state)
    has_shards = any(shards.values())
    nbytes = sum(shard.local.nbytes for each in shards.values() for shard in each.values())
    # Every rank needs its number among those that write.
    reports = ctx.gather([has_shards, nbytes])
    writers = [rank for rank, (writes, _) in enumerate(reports) if writes]
    total = sum(each for _, each in reports)
    random_states = ctx.gather_on_rank0(random_state.capture(ctx.device))

    staging = _path_from_rank0(state, lambda: state.store.begin(state.step, total))
    if staging is None:
        return
    if background:
        _copy_to_host(state, shards)
    elif ctx.device.type == "cuda":
        # The threads that write copy on the default stream.
        torch.cuda.current_stream(ctx.device).synchronize()
    saved = state_json(state, random_states) if ctx.is_rank0 else None
    number = writers.index(ctx.rank) + 1 if has_shards else 0

    def write() -> list[dict[str, Any]]:
        files = []
        if saved is not None:
            path = staging / "state.json"
            path.write_text(json.dumps(saved), encoding="utf-8")
            files.append(seal_file(path))
        if number:
            names = {group: tensor_file(group, number, len(writers)) for group in shards}
            files += write_shards({staging / names[group]: shards[group] for group in shards})
        return files

    state.pending = PendingSave(state.step, staging, write, background)
    if background and ctx.is_rank0:
        seconds = time.perf_counter() - began
        print(f"checkpoint of step {state.step}: copied in {seconds:.2f} s, writing", flush=True)


def finish_save(state: TrainState) -> bool:
    """Wait for the pending checkpoint and commit it. True, on all ranks, if it is on disk."""
    pending, ctx = state.pending, state.ctx
    if pending is None:
        return False
    state.pending = None
    with ctx.long_timeout(state.config):
        pending.wait()
        reports = ctx.gather_on_rank0([pending.problem, pending.files])
        pending.raise_unexpected()

        def commit() -> Path:
            problems = [problem for problem, _ in reports if problem is not None]
            if problems:
                state.store.discard(pending.staging)
                raise OSError(problems[0])
            files = [entry for _, entries in reports for entry in entries]
            return state.store.commit(pending.step, pending.staging, files)

        path = _path_from_rank0(state, commit)
    if path is None:
        return False
    state.saved_step, state.failed_saves = pending.step, 0
    if ctx.is_rank0:
        print(f"checkpoint: {path}", flush=True)
    return True


def _path_from_rank0(state: TrainState, function: Callable[[], Path]) -> Path | None:
    """The path that `function` returns on rank 0; None, counted as a failed save, on OSError."""

    def attempt() -> list[str | None]:
        try:
            return [str(function()), None]
        except OSError as error:
            return [None, str(error)]

    path, problem = state.ctx.on_rank0(attempt)
    if path is not None:
        return Path(path)
    state.failed_saves += 1
    if state.ctx.is_rank0:
        print(f"warning: checkpoint {state.failed_saves} not written: {problem}", flush=True)
    return None


def check_disk(state: TrainState) -> None:
    """Check, before the first step, that checkpoints can be written. Raises DiskError."""
    config = state.config
    if not config.checkpoint.enable or state.step >= config.training.steps:
        return
    weights = state.model.state_dict().values()
    # Weights and two moments of the same dtype.
    nbytes = 3 * sum(each.numel() * each.element_size() for each in weights)
    state.ctx.on_rank0(lambda: check_writable(state.store.folder, nbytes))


def check_saves(state: TrainState) -> None:
    """Raise DiskError, on all ranks, after checkpoint.max_failed_saves failures in a row."""
    limit = state.config.checkpoint.max_failed_saves
    if limit and state.failed_saves >= limit:
        kept = "nothing is saved"
        if state.saved_step is not None:
            kept = f"the newest checkpoint is that of step {state.saved_step}"
        text = (
            f"{state.failed_saves} checkpoints in a row could not be written, {kept}, this is step "
            f"{state.step}: free space on the disk of {state.store.folder} and run the command "
            "again, or allow more failures with checkpoint.max_failed_saves."
        )
        state.ctx.fail(DiskError(text))


def local_shards(state: TrainState) -> dict[str, dict[str, TensorShard]]:
    """The shards of weights and optimizer state that this rank writes, by group and name."""
    groups = {
        "model": dict(state.model.state_dict()),
        "optimizer": optimizer_tensors(state.model, state.optimizer),
    }
    shards: dict[str, dict[str, TensorShard]] = {}
    for group, tensors in groups.items():
        held = {
            name: shard_of(value, is_rank0=state.ctx.is_rank0) for name, value in tensors.items()
        }
        shards[group] = {name: shard for name, shard in held.items() if shard.is_writer}
    if state.config.training.carry_state:
        shards["states"] = carried_shards(state)
    return shards


def carried_shards(state: TrainState) -> dict[str, TensorShard]:
    """The carried states that this rank writes, by sequence of the step and layer."""
    shards: dict[str, TensorShard] = {}
    if state.carried is None or not state.shard.is_first:
        return shards
    for sequences, layers in zip(own_sequences(state), state.carried, strict=True):
        for row, sequence in enumerate(sequences):
            for layer, states in enumerate(layers):
                shards[f"{sequence}.{layer}"] = _own_heads(state, states[row])
    return shards


def own_sequences(state: TrainState) -> list[list[int]]:
    """Which sequences of a step each of this rank's micro-batches has, counted from 0."""
    return state.own_samples(list(range(state.batching.global_batch_size)))


def _own_heads(state: TrainState, local: Tensor) -> TensorShard:
    """This rank's heads [H / tp, K, D] of a state."""
    heads, *others = local.shape
    tp = state.ctx.dims.tp
    offset = (state.ctx.rank % tp * heads, 0, 0)
    return TensorShard(local, (heads * tp, *others), offset, is_writer=True)


def load_carried(state: TrainState, tensors: TensorFiles) -> bool:
    """Read the states that this rank's next step starts from; False if they are of other
    sequences, or there are none."""
    template = state.model.initial_states(state.config.training.local_batch_size).layers
    count, layers = state.batching.global_batch_size, len(template)
    if set(tensors) != {f"{sequence}.{n}" for sequence in range(count) for n in range(layers)}:
        return False
    carried: list[list[Tensor]] = []
    for sequences in own_sequences(state):
        own = [layer.clone() for layer in template]
        for row, sequence in enumerate(sequences):
            for layer, states in enumerate(own):
                stored = tensors[f"{sequence}.{layer}"]
                shard = _own_heads(state, states[row])
                if tuple(stored.shape) != shard.shape:
                    raise ValueError(f"states {sequence}.{layer} are {tuple(stored.shape)}")
                shard.local.copy_(stored[shard.region])
        carried.append(own)
    state.carried = carried
    return True


def _copy_to_host(state: TrainState, shards: dict[str, dict[str, TensorShard]]) -> None:
    """Replace the shards' tensors by copies that the next step does not change."""
    on_gpu = state.ctx.device.type == "cuda"
    for group, each in shards.items():
        for name, shard in each.items():
            copy = state.host_copies.get(f"{group}/{name}")
            if copy is None:
                copy = torch.empty_like(shard.local, device="cpu", pin_memory=on_gpu)
                # Pinning memory takes longer than the copy: it is done once per run.
                state.host_copies[f"{group}/{name}"] = copy
            copy.copy_(shard.local, non_blocking=on_gpu)
            each[name] = dataclasses.replace(shard, local=copy)
    if on_gpu:
        torch.cuda.current_stream(state.ctx.device).synchronize()


def state_json(state: TrainState, random_states: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of state.json: all that a resumed run needs besides tensors."""
    return {
        "step": state.step,
        "consumed_samples": state.consumed,
        "sample_identity": sample_identity(state),
        "random": random_states,
        "global_batch_size": state.batching.global_batch_size,
        "data": data_identity(state.tokenizer, state.train_source, state.val_source),
        "family": state.config.model.family,
        "model": dataclasses.asdict(state.model.config),
        "tokenizer": None if state.tokenizer is None else state.tokenizer.spec(),
        "config": to_toml(state.config),
    }


def resume_run(state: TrainState) -> tuple[Checkpoint | None, list[str]]:
    """Continue from the checkpoint that checkpoint.resume asks for.

    Files are checked while they are read. If one is damaged, or a rank cannot read it, all ranks go
    on to the next older checkpoint, which overwrites all that was read of this one.

    Returns:
        The checkpoint, None for a run from scratch, and why newer ones were refused.

    Raises:
        CheckpointError: none is valid, or it is of another model.
    """
    failed: dict[str, str] = {}
    while True:
        found, refused = find_checkpoint(state, failed)
        if found is None:
            return None, refused
        loaded: list[Any] = []

        def load(found: Checkpoint = found, loaded: list[Any] = loaded) -> str | None:
            try:
                loaded.extend(load_tensors(state, found))
            except DamagedError as error:
                return str(error)
            return None

        damaged = state.ctx.first(state.ctx.all_or_raise(load))
        if damaged is None:
            saved, has_states = loaded
            resume(state, found, saved, has_states)
            if state.ctx.is_rank0:
                state.store.trust(found.path)
            return found, refused
        _, problem = damaged
        if state.config.checkpoint.resume not in ("auto", "must"):
            state.ctx.fail(CheckpointError(problem))
        failed[str(found.path)] = problem


def find_checkpoint(
    state: TrainState, failed: Mapping[str, str]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, as rank 0 sees it, and why newer ones were refused; `failed`
    are paths of some of them, and why."""
    checkpoint = state.config.checkpoint
    if not checkpoint.enable:
        return None, []

    def find() -> list[Any]:
        found, refused = state.store.find(checkpoint.resume, check=inspect, failed=failed)
        return [None if found is None else [str(found.path), found.step], refused]

    found, refused = state.ctx.on_rank0(find)
    return (None if found is None else Checkpoint(Path(found[0]), found[1])), refused


def load_tensors(state: TrainState, found: Checkpoint) -> tuple[dict[str, Any], bool]:
    """Read this rank's shards of a checkpoint, on any number of ranks and any mesh. One of step 0
    has weights only.

    Returns:
        What state.json holds, and True if there were states for `carry_state`.

    Raises:
        DamagedError: a file is damaged, or this rank cannot read it.
        CheckpointError: it is of another model.
    """
    # What a damaged checkpoint has left.
    state.optimizer.state.clear()
    saved = found.state()
    missing = {"step", *(_POSITION if found.step else ())} - saved.keys()
    if missing:
        raise DamagedError(f"{found.path / 'state.json'} is damaged: it has no {sorted(missing)}.")
    changes = check_changes(state, found.path, saved)
    if changes and state.ctx.is_rank0:
        print("\n".join(changes), flush=True)
    load_model_tensors(state.model, found.open("model"))
    if saved["step"] == 0:
        return saved, False
    load_optimizer_tensors(state.model, state.optimizer, found.open("optimizer"))
    try:
        has_states = state.config.training.carry_state and load_carried(state, found.open("states"))
    except CheckpointError:
        raise
    except ValueError as error:
        raise DamagedError(f"{found.path} cannot be read: {error}.") from None
    return saved, has_states


def resume(state: TrainState, found: Checkpoint, saved: dict[str, Any], has_states: bool) -> None:
    """Continue where a checkpoint was saved, whose tensors have been read."""
    if saved["step"] == 0:
        # Imported weights (launch/convert.py): all else is that of a new run.
        return
    state.step, state.consumed = saved["step"], saved["consumed_samples"]
    is_own = found.path.resolve().parent == state.store.folder.resolve()
    state.saved_step = state.step if is_own else None
    ctx = state.ctx
    try:
        random_state.restore(saved["random"], ctx.rank, ctx.dims.world_size, ctx.device)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{found.path / 'state.json'} has damaged random states: {error}."
        ) from None
    if state.config.training.carry_state and not has_states and ctx.is_rank0:
        print("warning: the checkpoint has no states of these sequences: they start from zero.")
