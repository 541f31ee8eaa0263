"""Saving a run and going on from what was saved, on any mesh.

Every rank writes the pieces that it holds into one staging folder; once all have succeeded, the
first rank commits it (launch/checkpoint.py). In the background ("async") the pieces are copied to
host memory first, a thread of each rank writes them, and the commit happens at the first step after
all threads are through: ranks agree on that in the sums that they exchange at each step anyway.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from launch import random_state
from launch.checkpoint import Checkpoint, seal_file, tensor_file
from launch.config import to_toml
from launch.errors import CheckpointError
from launch.optimization import load_model_tensors, load_optimizer_tensors, optimizer_tensors
from launch.pieces import Piece, piece_of, write_pieces

if TYPE_CHECKING:
    from launch.step import Run

__all__ = ["PendingSave", "find_checkpoint", "finish_save", "resume", "start_save"]

Pieces = dict[str, dict[str, Piece]]


class PendingSave:
    """One rank's part of a checkpoint that is being written.

    Args:
        step: of the checkpoint.
        staging: its folder.
        write: writes this rank's files there, and returns their manifest entries.
        background: in a thread, else now.
    """

    def __init__(
        self, step: int, staging: Path, write: Callable[[], list[dict[str, Any]]], background: bool
    ) -> None:
        self.step = step
        self.staging = staging
        self.files: list[dict[str, Any]] = []
        self.problem: str | None = None
        self._unexpected: BaseException | None = None
        self._write = write
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True)
        if background:
            self._thread.start()
        else:
            self._run()

    @property
    def is_through(self) -> bool:
        """Whether this rank has nothing left to write."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is."""
        if self._thread.ident is not None:
            self._thread.join()

    def raise_unexpected(self) -> None:
        """Raise what the disk is not to blame for."""
        if self._unexpected is not None:
            raise self._unexpected

    def _run(self) -> None:
        try:
            self.files = self._write()
        except (OSError, SafetensorError) as error:
            self.problem = str(error)
        except BaseException as error:
            self.problem, self._unexpected = repr(error), error


def start_save(run: Run, *, background: bool) -> None:
    """Begin a checkpoint of this step; `finish_save` ends it.

    Raises:
        CheckpointError: a valid checkpoint of this step exists.
    """
    world, began = run.world, time.perf_counter()
    pieces = own_pieces(run)
    writes = any(pieces.values())
    everyone = world.gather([writes, random_state.capture(world.device)])
    writers = [rank for rank, (each, _) in enumerate(everyone) if each]

    def begin() -> list[str | None]:
        try:
            return [str(run.store.begin(run.step)), None]
        except OSError as error:
            return [None, str(error)]

    staging, problem = world.first_decides(begin)
    if staging is None:
        _count_failure(run, problem)
        return
    if background:
        _copy_to_host(run, pieces)
    state = saved_state(run, [each for _, each in everyone]) if world.is_first else None
    number = writers.index(world.rank) + 1 if writes else 0

    def write() -> list[dict[str, Any]]:
        paths = []
        if number:
            for group, each in pieces.items():
                paths.append(Path(staging) / tensor_file(group, number, len(writers)))
                write_pieces(paths[-1], each)
        if state is not None:
            paths.append(Path(staging) / "state.json")
            paths[-1].write_text(json.dumps(state), encoding="utf-8")
        return [seal_file(path) for path in paths]

    run.pending = PendingSave(run.step, Path(staging), write, background)
    if background and world.is_first:
        seconds = time.perf_counter() - began
        print(f"checkpoint of step {run.step}: copied in {seconds:.2f} s, writing", flush=True)


def finish_save(run: Run) -> bool:
    """Wait for the pending checkpoint and commit it; whether it is on disk, the same everywhere."""
    pending, world = run.pending, run.world
    if pending is None:
        return False
    run.pending = None
    with world.patience(run.config):
        pending.wait()
        reports = world.gather([pending.problem, pending.files])
        pending.raise_unexpected()

        def commit() -> list[str | None]:
            problems = [problem for problem, _ in reports if problem is not None]
            if problems:
                run.store.discard(pending.staging)
                return [None, problems[0]]
            files = [entry for _, entries in reports for entry in entries]
            try:
                return [str(run.store.commit(pending.step, pending.staging, files)), None]
            except OSError as error:
                return [None, str(error)]

        path, problem = world.first_decides(commit)
    if path is None:
        _count_failure(run, problem)
        return False
    run.saved_step = pending.step
    if world.is_first:
        print(f"checkpoint: {path}", flush=True)
    return True


def _count_failure(run: Run, problem: str | None) -> None:
    run.failed_saves += 1
    if run.world.is_first:
        print(f"warning: checkpoint {run.failed_saves} not written: {problem}", flush=True)


def own_pieces(run: Run) -> Pieces:
    """What this rank writes of the weights and of the optimizer's state."""
    groups = {
        "model": dict(run.model.state_dict()),
        "optimizer": optimizer_tensors(run.model, run.optimizer),
    }
    pieces: Pieces = {}
    for group, tensors in groups.items():
        held = {
            name: piece_of(value, is_first=run.world.is_first) for name, value in tensors.items()
        }
        pieces[group] = {name: piece for name, piece in held.items() if piece.mine}
    return pieces


def _copy_to_host(run: Run, pieces: Pieces) -> None:
    """Replace the pieces' tensors by copies that the next step leaves alone."""
    on_gpu = run.world.device.type == "cuda"
    for group, each in pieces.items():
        for name, piece in each.items():
            kept = run.host_copies.get(f"{group}/{name}")
            if kept is None:
                kept = torch.empty_like(piece.local, device="cpu", pin_memory=on_gpu)
                # Pinning memory takes longer than the copy: it is done once per run.
                run.host_copies[f"{group}/{name}"] = kept
            kept.copy_(piece.local, non_blocking=on_gpu)
            each[name] = dataclasses.replace(piece, local=kept)
    if on_gpu:
        torch.cuda.current_stream(run.world.device).synchronize()


def saved_state(run: Run, random_states: list[dict[str, Any]]) -> dict[str, Any]:
    """state.json: all that a run goes on from but its tensors."""
    return {
        "step": run.step,
        "consumed_samples": run.consumed,
        "sample_identity": sample_identity(run),
        "random": random_states,
        "model": dataclasses.asdict(run.model.config),
        "tokenizer": None if run.tokenizer is None else run.tokenizer.spec(),
        "config": to_toml(run.config),
    }


def find_checkpoint(run: Run) -> tuple[Checkpoint | None, list[str]]:
    """What to resume from, as rank 0 sees it, and why newer checkpoints were refused."""
    checkpoint = run.config.checkpoint
    if not checkpoint.enable:
        return None, []

    def find() -> list[Any]:
        found, refused = run.store.find(checkpoint.resume)
        return [None if found is None else [str(found.path), found.step], refused]

    found, refused = run.world.first_decides(find)
    return (None if found is None else Checkpoint(Path(found[0]), found[1])), refused


def resume(run: Run, found: Checkpoint) -> None:
    """Continue from a verified checkpoint, on any number of ranks and any mesh.

    Raises:
        CheckpointError: it is of another model, or this rank cannot read it.
    """
    try:
        state = found.state()
        load_model_tensors(run.model, found.open("model"))
        load_optimizer_tensors(run.model, run.optimizer, found.open("optimizer"))
    except CheckpointError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{found.path} cannot be read on every rank: {error}.") from None
    run.step, run.consumed = state["step"], state["consumed_samples"]
    here = found.path.resolve().parent == run.store.folder.resolve()
    run.saved_step = run.step if here else None
    world = run.world
    random_state.restore(state["random"], world.rank, world.dims.world_size, world.device)
    order = sample_identity(run)
    if order != state["sample_identity"] and world.is_first:
        print(
            "warning: training.seed, training.seq_len and the data's samples were "
            f"{state['sample_identity']}, are {order}: samples come in another order, and the "
            f"{run.consumed} that were consumed are counted in it."
        )


def sample_identity(run: Run) -> list[int]:
    """What the order of samples depends on besides the position."""
    training = run.config.training
    return [training.seed, training.seq_len, run.train_source.num_samples]
