"""Train a TransNormerLLM on sequences cut over ranks.

    torchrun --nproc_per_node 2 launch/train.py --job.config_file launch/configs/quickstart.toml

Every flag of `launch/config.py` overrides the file. Exit codes: 0 done; 75 stopped by SIGTERM with
all steps saved (run the same command again, with checkpoint.resume auto or must); 143 stopped by
SIGTERM with checkpoints switched off, nothing saved; 70 a damaged or foreign checkpoint; 72 NaN or
infinite loss; 73 a config or data that cannot be trained on, or a dry run of what does not fit; 74
the last checkpoint could not be written; 1 anything else, with a traceback. torchrun itself exits
with 1 and shows the ranks' codes. With --max_restarts, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1:
otherwise a restarted job may meet the addresses of the one before it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lasp import SequenceShard
from lasp.tnl import TNL
from launch.build import build_model, over_ranks
from launch.checkpoint import CheckpointStore
from launch.config import Config, load_config, to_toml
from launch.data import (
    DataFolder,
    RandomSource,
)
from launch.errors import (
    REQUEUE,
    TERMINATED,
    ConfigError,
    EchoError,
    NonFiniteError,
    UserError,
)
from launch.generate import sample_text
from launch.metrics import (
    MetricsLog,
    Speedometer,
    check_packages,
    format_line,
    loss_metrics,
    peak_flops,
    peak_memory,
    plot_loss,
)
from launch.optimization import build_optimizer
from launch.plan import (
    Batching,
    batching,
    check_layout,
    check_tensor_parallel,
    describe,
    model_config,
)
from launch.prepare_data import prepare
from launch.profiling import profiled
from launch.saving import find_checkpoint, finish_save, resume, start_save
from launch.step import Outcome, Run, step_indices, take_step, validate
from launch.tokenizer import ByteTokenizer, Tokenizer
from launch.world import Place, World, find_place, open_world
from parallel.compile import eagerly
from parallel.mesh import full_tensor

_DISK_FAILED = 74
# Bytes besides the weights that a sample may take: the largest matrix, gathered; states, logits.
_SAMPLE_RESERVE = 2 << 30


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(argv)
        place = find_place(config)
        batch = batching(config, place)
        check_layout(config, place)
        if config.job.dry_run:
            if not is_first:
                return 0
            plan, fits = dry_run(config, place, batch)
            print(plan)
            return 0 if fits else ConfigError.exit_code
    except UserError as error:
        # Every rank sees the same config: one of them says so.
        if is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    try:
        with open_world(place, config) as world:
            return train(config, world, batch)
    except EchoError as error:
        return error.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def dry_run(config: Config, place: Place, batch: Batching) -> tuple[str, bool]:
    """The resolved config and the plan, and whether it fits the memory of a rank, as far as that is
    known; nothing is written, no socket opened."""
    # Not at the top: it brings machinery that no run needs.
    from launch.estimate import fake_ranks, format_estimate

    check_packages(config)
    tokenizer: Tokenizer | None = None
    if config.data.source == "folder":
        tokenizer = DataFolder(config.data_folder).tokenizer
    elif config.data.source == "stdlib":
        tokenizer = ByteTokenizer()
    shape = model_config(config, tokenizer)
    check_tensor_parallel(shape, place.dims.tp)
    memory = None
    if config.job.dry_run_gpus:
        memory = config.job.dry_run_gpu_memory
    elif place.device.type == "cuda":
        memory = torch.cuda.get_device_properties(place.device).total_memory / 2**30
    plan = describe(config, place, shape, batch)
    with fake_ranks() if place.dims.world_size > 1 or memory else nullcontext():
        holds, fits = format_estimate(config, place, shape, memory)
    return f"{to_toml(config)}\n{plan}\n{holds}", fits


def train(config: Config, world: World, batch: Batching) -> int:
    """From an opened world to the last checkpoint; the exit code."""
    run = set_up(config, world, batch)
    found, refused = find_checkpoint(run)
    if found is not None:
        world.agree(lambda: resume(run, found))
    if world.is_first:
        print(describe(config, world.place, run.model.config, batch))
        for reason in refused:
            print(f"refused:     {reason}")
        print(f"resume:      {found.path if found else 'from scratch'}", flush=True)
    log = world.agree(lambda: open_records(run) if world.is_first else None)
    stop_requested = catch_sigterm()
    try:
        code = take_steps(run, log, stop_requested)
    except UserError:
        # All ranks are here together: what was complete at its step is kept.
        finish_save(run)
        if log is not None:
            log.close()
        raise
    if log is not None:
        log.close()
        print(f"metrics: {log.path}  loss curve: {plot_loss(log.path)}", flush=True)
    if code == 0 and config.sample.enable and run.tokenizer is not None:
        print_sample(run)
    return code


def set_up(config: Config, world: World, batch: Batching) -> Run:
    """Folders, data, model and optimizer."""
    training = config.training
    world.first_decides(lambda: check_packages(config))
    if config.data.source == "stdlib":
        world.first_decides(lambda: prepare_library(config))
    tokenizer, model_shape, train_source, val_source = world.agree(lambda: open_data(config))
    world.agree(lambda: check_tensor_parallel(model_shape, world.dims.tp))
    world.first_decides(lambda: make_folder(config))

    torch.manual_seed(training.seed)
    loss_model = build_model(config, world, model_shape)
    return Run(
        config=config,
        world=world,
        batching=batch,
        tokenizer=tokenizer,
        train_source=train_source,
        val_source=val_source,
        shard=SequenceShard.split(
            training.seq_len,
            world.cp_group,
            config.parallelism.context_parallel_method,
            config.parallelism.context_parallel_layout,
        ),
        model=loss_model.model,
        loss_model=loss_model,
        trained=over_ranks(loss_model, config, world),
        optimizer=build_optimizer(loss_model.model, config),
        store=CheckpointStore(config.checkpoint_folder, config.checkpoint.keep_latest_k),
    )


def make_folder(config: Config) -> None:
    """dump_folder. Raises ConfigError if it cannot be made."""
    folder = Path(config.job.dump_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"job.dump_folder {folder} cannot be made: {error.strerror}.") from None


def open_records(run: Run) -> MetricsLog:
    """config.toml and metrics.jsonl, once nothing can refuse the run: they may be an earlier run's.

    Raises:
        ConfigError: one of them cannot be written.
    """
    folder = Path(run.config.job.dump_folder)
    try:
        log = MetricsLog(run.config, run.step)
        (folder / "config.toml").write_text(to_toml(run.config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"job.dump_folder {folder} cannot be written: {error}.") from None
    return log


def prepare_library(config: Config) -> None:
    """Tokenize the standard library, unless an earlier run did."""
    if not config.data_folder.exists():
        print(f"preparing the standard library's sources in {config.data_folder}", flush=True)
        prepare(config.data_folder)


def open_data(config: Config):
    """(tokenizer, model config, training samples, validation samples or None)."""
    seq_len, seed = config.training.seq_len, config.training.seed
    if config.data.source == "random":
        shape = model_config(config, None)
        source = RandomSource(seq_len, shape.vocab_size, seed)
        held_out = RandomSource(seq_len, shape.vocab_size, seed + 1)
        return None, shape, source, held_out if config.validation.enable else None
    folder = DataFolder(config.data_folder)
    shape = model_config(config, folder.tokenizer)
    source = folder.source("train", seq_len, shape.vocab_size)
    held_out = None
    if config.validation.enable:
        held_out = folder.source("val", seq_len, shape.vocab_size)
    return folder.tokenizer, shape, source, held_out


def take_steps(run: Run, log: MetricsLog | None, stop_requested: list[int]) -> int:
    """Train to the last step, or to the step at which a rank was asked to stop."""
    config, world = run.config, run.world
    steps = config.training.steps
    speed = Speedometer(
        run.batching.tokens_per_step,
        # Documents are of many lengths: what softmax layers spend on them is left out.
        run.model.config.flops_per_token(
            training=True, seq_len=None if config.training.varlen else config.training.seq_len
        ),
        world.dims.world_size,
        peak_flops(world.device),
    )
    nonfinite_tries, warm = 0, False
    with profiled(config, world) as after_step:
        while run.step < steps:
            began = time.perf_counter()
            outcome = take_step(run, bool(stop_requested))
            if outcome.loss is None:
                nonfinite_tries += 1
                report_nonfinite(run, nonfinite_tries, outcome)
            else:
                nonfinite_tries = 0
                speed.add_step(time.perf_counter() - began)
                after_step()
                if not warm:
                    world.set_timeout(config.comm.train_timeout_seconds)
                    warm = True
                report_step(run, log, outcome, speed)
            done = run.step == steps or outcome.stop_requested
            due = outcome.loss is not None and run.step % config.checkpoint.interval == 0
            if done or due or outcome.save_is_through:
                finish_save(run)
            # Before the first step there is no optimizer state to save, and nothing to lose.
            unsaved = run.step not in (0, run.saved_step)
            if (done or due) and config.checkpoint.enable and unsaved:
                in_background = config.checkpoint.async_mode == "async" and not done
                start_save(run, background=in_background)
                if not in_background and not finish_save(run) and done:
                    return _DISK_FAILED
            if outcome.stop_requested and run.step < steps:
                lost = unsaved and not config.checkpoint.enable
                advice = "nothing was saved" if lost else "run the command again"
                if not lost and config.checkpoint.resume not in ("auto", "must"):
                    # As it stands it asks for a beginning that this run has left behind.
                    advice += " with --checkpoint.resume auto"
                if world.is_first:
                    print(f"stopped by SIGTERM after step {run.step}: {advice}", flush=True)
                return TERMINATED if lost else REQUEUE
    return 0


def report_step(run: Run, log: MetricsLog | None, outcome: Outcome, speed: Speedometer) -> None:
    """Validate where it is due; print and record the step where that is due."""
    config, step, steps = run.config, run.step, run.config.training.steps
    val_loss = None
    if run.val_source is not None and (step % config.validation.freq == 0 or step == steps):
        with run.world.patience(config):
            val_loss = validate(run)
    if log is None or (step % config.metrics.log_freq and step != steps and val_loss is None):
        return
    metrics: dict[str, Any] = {
        "step": step,
        **loss_metrics(outcome.loss, run.train_source.bytes_per_token),
        "grad_norm": outcome.grad_norm,
        "lr": run.optimizer.param_groups[0]["lr"],
        **speed.read(steps - step),
        "memory": peak_memory(run.world.device),
        "tokens": run.consumed * config.training.seq_len,
    }
    print(format_line(metrics, steps), flush=True)
    if val_loss is not None:
        measured = loss_metrics(val_loss, run.val_source.bytes_per_token)
        metrics |= {f"val_{name}": value for name, value in measured.items()}
        text = "  ".join(f"{name}: {value:.4f}" for name, value in measured.items())
        print(f"validation at step {step}:  {text}", flush=True)
    log.write(metrics)


def report_nonfinite(run: Run, tries: int, outcome: Outcome) -> None:
    """Say that a step was not taken; end the run when it keeps failing, on every rank alike."""
    limit = run.config.training.max_nonfinite_steps
    text = (
        f"step {run.step + 1}: loss or gradients are NaN or infinite (gradient norm "
        f"{outcome.grad_norm}), nothing was changed; try {tries} of {limit}, samples "
        f"{step_indices(run)[:8]}"
    )
    if tries >= limit:
        run.world.fail(NonFiniteError(text))
    if run.world.is_first:
        print(f"warning: {text}", flush=True)


def catch_sigterm() -> list[int]:
    """Fills up with the signals that asked this process to stop.

    The handler only takes note: all ranks agree on a step to stop at, in `take_step`.
    """
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return received


def print_sample(run: Run) -> None:
    """Continue the sample prompt, to see what was learnt."""
    wanted = run.config.sample
    with run.world.patience(run.config):
        # The first rank may still be closing its records.
        model = whole_model(run)
    if model is None:
        return
    with eagerly(model.blocks):
        text = sample_text(
            model,
            run.tokenizer,
            wanted.prompt,
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            seed=run.config.training.seed,
        )
    print(f"sample of step {run.step}:\n{text}", flush=True)


def whole_model(run: Run) -> TNL | None:
    """On the first rank, a model with all weights, whatever they are cut over; all ranks call, once
    the last step is saved. None on the others; on all, with a sentence, where it does not fit."""
    state = run.model.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return run.model if run.world.is_first else None
    # Only steps need these, and there are none to come: they make room for the weights.
    run.optimizer.zero_grad()
    run.optimizer.state.clear()
    if not run.world.first_decides(lambda: has_room(run)):
        return None
    model = None
    if run.world.is_first:
        with run.world.device:
            model = TNL(run.model.config)
    for name, value in state.items():
        # One at a time: only the first rank ever holds more than its part and one whole matrix.
        value = full_tensor(value)
        if model is not None:
            model.get_parameter(name).detach().copy_(value)
    return model


def has_room(run: Run) -> bool:
    """Whether this rank's device holds all weights beside its part of them; says so if not."""
    config, device = run.config, run.world.device
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, wanted = torch.cuda.mem_get_info(device)[0], 4 * run.model.config.num_parameters()
    if wanted + _SAMPLE_RESERVE <= free:
        return True
    text = f"no sample: all weights take {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    if config.checkpoint.enable:
        text += f"; see launch/generate.py --checkpoint {config.checkpoint_folder}"
    print(text, flush=True)
    return False


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's shutdown: a gloo thread that drops the tensor of the last
    # collective during it aborts the process, and a finished job would be reported as failed.
    os._exit(code)
