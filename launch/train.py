"""Train a linear-attention language model on sequences sharded over ranks.

    torchrun --nproc_per_node 2 launch/train.py --job.config_file launch/configs/quickstart.toml

Every flag of `launch/config.py` overrides the file. Exit codes: 0 done; 75 stopped by SIGTERM,
SIGINT or SIGHUP with all steps saved (run the same command again, with checkpoint.resume auto or
must); 143 stopped likewise with checkpoints switched off, nothing saved; 69 another rank died or
hangs, or torchrun died; 70 no valid checkpoint or one of another model; 72 NaN or infinite loss;
73 a config or data that cannot be trained on or that differs between ranks, hosts that cannot reach
each other, or a dry run that does not fit; 74 checkpoints cannot be written; 130 interrupted before
training began; 1 anything else, with a traceback. torchrun itself exits with 1 and shows the ranks'
codes; launch/torchrun.py exits with the code of the rank that failed first.
"""

import dataclasses
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lasp import SequenceShard
from launch.build import apply_data_parallel, build_model, get_family, model_config
from launch.checkpoint.save_resume import (
    check_disk,
    check_saves,
    finish_save,
    resume_run,
    start_save,
)
from launch.checkpoint.store import CheckpointStore
from launch.config import Config, load_config
from launch.data import RandomSource, Segments, data_facts, stream_length
from launch.distributed import (
    DistContext,
    RankInfo,
    get_rank_info,
    meet_ranks,
    open_dist_context,
    refuse_start,
    report_error,
)
from launch.dump_folder import check_shared, open_dump_folder
from launch.exit_codes import (
    DISK_FAILED,
    INTERRUPTED,
    REQUEUE,
    TERMINATED,
    ConfigError,
    NonFiniteError,
    UserError,
)
from launch.files import is_file
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
from launch.mixture import open_mixture
from launch.optimizer import build_optimizer, update_scales
from launch.prepare_data import prepare
from launch.profiling import profiled
from launch.resolve import (
    Batching,
    batching,
    check_parallelism,
    check_shape,
    describe,
)
from launch.tokenizer import ByteTokenizer, Tokenizer
from launch.toml_config import to_toml
from launch.train_state import StepResult, TrainState
from launch.trainer import step_indices, train_step, validate
from parallel.compile import eagerly
from parallel.mesh import full_tensor

# Signals after which a run saves and ends.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Bytes that generating a sample needs besides the weights: the largest matrix once more, states,
# logits.
_SAMPLE_RESERVE = 2 << 30


def main(argv: list[str]) -> int:
    """Run a command line; return the exit code."""
    config: Config | None = None
    try:
        config = load_config(argv)
        info = get_rank_info(config)
        batch = batching(config, info)
        check_parallelism(config, info)
    except UserError as error:
        return report_error(refuse_start(error, config))
    try:
        if config.job.dry_run:
            meet_ranks(config, info)
            text, fits = dry_run(config, info, batch) if info.rank == 0 else ("", True)
            print(text, end="\n" * bool(text))
            return 0 if fits else ConfigError.exit_code
        with open_dist_context(info, config) as ctx:
            return train(config, ctx, batch)
    except UserError as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("error: interrupted before training began", file=sys.stderr, flush=True)
        return INTERRUPTED


def dry_run(config: Config, info: RankInfo, batch: Batching) -> tuple[str, bool]:
    """The resolved config with what follows from it, and False if a rank's memory is known to be
    too small. Nothing is written."""
    # Imported here: it loads machinery that no training run needs.
    from launch.memory_estimate import fake_ranks, format_estimate

    check_packages(config)
    tokenizer: Tokenizer | None = None
    if config.data.source == "folder":
        tokenizer = open_mixture(config.data_folders).tokenizer
    elif config.data.source == "stdlib":
        tokenizer = ByteTokenizer()
    shape = model_config(config, tokenizer)
    check_shape(config, shape, info.dims.tp)
    memory = None
    if config.job.dry_run_gpus:
        memory = config.job.dry_run_gpu_memory
    elif info.device.type == "cuda":
        memory = torch.cuda.get_device_properties(info.device).total_memory / 2**30
    summary = describe(config, info, shape, batch)
    with fake_ranks() if info.dims.world_size > 1 or memory else nullcontext():
        estimate, fits = format_estimate(config, info, shape, memory)
    return f"{to_toml(config)}\n{summary}\n{estimate}", fits


def train(config: Config, ctx: DistContext, batch: Batching) -> int:
    """Set up, resume, train and save; return the exit code."""
    state = set_up(config, ctx, batch)
    ctx.enter("reading a checkpoint")
    found, refused = resume_run(state)
    if found is not None:
        # As after the step that was saved.
        update_scales(state.model, config)
    if ctx.is_rank0:
        print(describe(config, ctx.info, state.model.config, batch))
        for reason in refused:
            print(f"refused:     {reason}")
        print(f"resume:      {found.path if found else 'from scratch'}", flush=True)
    check_disk(state)
    log = ctx.all_or_raise(lambda: open_log(state) if ctx.is_rank0 else None)
    state.stop_signals = catch_stop_signals()
    try:
        code = run_steps(state, log)
    except UserError:
        # All ranks raise it together, so they can still commit the checkpoint being written.
        finish_save(state)
        if log is not None:
            log.close()
        raise
    if log is not None:
        log.close()
        print(f"metrics: {log.path}  loss curve: {plot_loss(log.path)}", flush=True)
    if code == 0 and config.sample.enable and state.tokenizer is not None:
        print_sample(state)
    return code


def set_up(config: Config, ctx: DistContext, batch: Batching) -> TrainState:
    """Folders, data, model and optimizer of a run before its first step."""
    training, parallelism = config.training, config.parallelism
    ctx.on_rank0(lambda: check_packages(config))
    if config.data.source == "stdlib":
        ctx.on_rank0(lambda: prepare_library(config))
    tokenizer, shape, train_source, val_source = ctx.all_or_raise(lambda: open_data(config))
    ctx.compare({f"model.{name}": value for name, value in dataclasses.asdict(shape).items()})
    if config.data.source != "random":
        sources = {"train": train_source} | ({"val": val_source} if val_source else {})
        ctx.compare(ctx.all_or_raise(lambda: data_facts(config.data_folders, sources)))
    ctx.all_or_raise(lambda: check_shape(config, shape, ctx.dims.tp))
    if training.carry_state:
        ctx.all_or_raise(lambda: stream_length(batch.global_batch_size, train_source.num_samples))
    folder = Path(config.job.dump_folder)
    lock = ctx.all_or_raise(lambda: open_dump_folder(folder) if ctx.is_rank0 else None)
    if config.checkpoint.enable:
        check_shared(ctx, folder)

    torch.manual_seed(training.seed)
    loss_model = ctx.all_or_raise(lambda: build_model(config, ctx, shape))
    wrapped_model = apply_data_parallel(loss_model, config, ctx)

    def split(tokens: int) -> SequenceShard:
        method, layout = parallelism.context_parallel_method, parallelism.context_parallel_layout
        return SequenceShard.split(tokens, ctx.cp_group, method, layout)

    segments = None
    if training.segment_len:
        segments = Segments(training.seq_len, training.segment_len, split)
    return TrainState(
        config=config,
        ctx=ctx,
        batching=batch,
        tokenizer=tokenizer,
        train_source=train_source,
        val_source=val_source,
        shard=split(training.seq_len),
        model=loss_model.model,
        loss_model=loss_model,
        wrapped_model=wrapped_model,
        optimizer=build_optimizer(loss_model.model, config),
        store=CheckpointStore(config.checkpoint_folder, config.checkpoint.keep_latest_k),
        lock=lock,
        segments=segments,
    )


def open_log(state: TrainState) -> MetricsLog:
    """Write config.toml and open metrics.jsonl. Called once nothing can refuse the run any more,
    because these files may belong to an earlier run.

    Raises:
        ConfigError: one of them cannot be written.
    """
    folder = Path(state.config.job.dump_folder)
    for path in (folder / "metrics.jsonl", folder / "config.toml"):
        if path.exists() and not is_file(path):
            raise ConfigError(f"{path} is not a regular file: use another job.dump_folder.")
    try:
        log = MetricsLog(state.config, state.step)
        (folder / "config.toml").write_text(to_toml(state.config), encoding="utf-8")
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
        source = RandomSource(shape.vocab_size, seed)
        held_out = RandomSource(shape.vocab_size, seed + 1)
        return None, shape, source, held_out if config.validation.enable else None
    mixture = open_mixture(config.data_folders)
    shape = model_config(config, mixture.tokenizer)
    verify = config.data.verify
    source = mixture.source("train", seq_len, shape.vocab_size, verify=verify)
    held_out = None
    if config.validation.enable:
        held_out = mixture.source("val", seq_len, shape.vocab_size, verify=verify)
    return mixture.tokenizer, shape, source, held_out


def run_steps(state: TrainState, log: MetricsLog | None) -> int:
    """Train to the last step, or until a rank is asked to stop; return the exit code."""
    config, ctx, training = state.config, state.ctx, state.config.training
    flops = get_family(config.model.family).flops_per_token(
        state.model.config,
        training=True,
        # Documents differ in length: what softmax layers spend on them is left out.
        seq_len=None if training.varlen else training.seq_len,
    )
    speed = Speedometer(
        state.batching.tokens_per_step, flops, ctx.dims.world_size, peak_flops(ctx.device)
    )
    failures, is_first = 0, True
    with profiled(config, ctx) as after_step:
        while state.step < training.steps:
            began = time.perf_counter()
            result = train_step(state)
            if result.loss is not None:
                failures = 0
                speed.add_step(time.perf_counter() - began)
                after_step()
                if is_first:
                    ctx.set_timeout(config.comm.train_timeout_seconds)
                    is_first = False
                report_step(state, log, result, speed)
            elif not result.interrupted:
                failures += 1
                report_nonfinite(state, failures, result)
            if not save_if_due(state, result):
                return DISK_FAILED
            if result.stop_requested and state.step < training.steps:
                return report_stop(state)
    return 0


def save_if_due(state: TrainState, result: StepResult) -> bool:
    """Commit a checkpoint that has been written, and save another if it is due. False if the last
    checkpoint of the run could not be written."""
    checkpoint = state.config.checkpoint
    is_last = result.stop_requested or state.step == state.config.training.steps
    due = is_last or (result.loss is not None and state.step % checkpoint.interval == 0)
    if due or result.save_written:
        state.ctx.enter("saving a checkpoint")
        finish_save(state)
    # Before the first step there is no optimizer state to save, and nothing to lose.
    if due and checkpoint.enable and state.step not in (0, state.saved_step):
        background = checkpoint.async_mode == "async" and not is_last
        with state.ctx.long_timeout(state.config):
            start_save(state, background=background)
        is_written = background or finish_save(state)
        if is_last:
            return is_written
    check_saves(state)
    return True


def report_stop(state: TrainState) -> int:
    """Print what was saved and how to go on; return the exit code."""
    checkpoint = state.config.checkpoint
    is_lost = not checkpoint.enable and state.step not in (0, state.saved_step)
    advice = "nothing was saved" if is_lost else "run the command again"
    if not is_lost and checkpoint.resume not in ("auto", "must"):
        # The command as it stands asks for the start of this run.
        advice += " with --checkpoint.resume auto"
    if state.ctx.is_rank0:
        # Which signal another rank got is not known here.
        names = [signal.Signals(each).name for each in state.stop_signals[:1]]
        cause = names[0] if names else "a signal to another rank"
        print(f"stopped by {cause} after step {state.step}: {advice}", flush=True)
    return TERMINATED if is_lost else REQUEUE


def report_step(
    state: TrainState, log: MetricsLog | None, result: StepResult, speed: Speedometer
) -> None:
    """Validate if it is due; print and record the step if that is due."""
    config, step, steps = state.config, state.step, state.config.training.steps
    val_loss = None
    if state.val_source is not None and (step % config.validation.freq == 0 or step == steps):
        state.ctx.enter("validation")
        with state.ctx.long_timeout(config):
            val_loss = validate(state)
    if log is None or (step % config.metrics.log_freq and step != steps and val_loss is None):
        return
    metrics: dict[str, Any] = {
        "step": step,
        **loss_metrics(result.loss, state.train_source.bytes_per_token),
        "grad_norm": result.grad_norm,
        "lr": state.optimizer.param_groups[0]["lr"],
        **speed.read(steps - step),
        "memory": peak_memory(state.ctx.device),
        "tokens": state.consumed * config.training.seq_len,
    }
    print(format_line(metrics, steps), flush=True)
    if val_loss is not None:
        source = state.val_source
        measured = loss_metrics(val_loss, source.bytes_per_token, source.words_per_token)
        metrics |= {f"val_{name}": value for name, value in measured.items()}
        text = "  ".join(f"{name}: {value:.4f}" for name, value in measured.items())
        print(f"validation at step {step}:  {text}", flush=True)
    log.write(metrics)


def report_nonfinite(state: TrainState, failures: int, result: StepResult) -> None:
    """Warn that a step was skipped; end the run, on every rank, if it keeps failing."""
    limit = state.config.training.max_nonfinite_steps
    text = (
        f"step {state.step + 1}: loss or gradients are NaN or infinite (gradient norm "
        f"{result.grad_norm}), nothing was changed; try {failures} of {limit}, samples "
        f"{step_indices(state)[:8]}"
    )
    if failures >= limit:
        state.ctx.fail(NonFiniteError(text))
    if state.ctx.is_rank0:
        print(f"warning: {text}", flush=True)


def catch_stop_signals() -> list[int]:
    """A list that receives the signals which asked this process to stop: SIGTERM, SIGINT (Ctrl-C)
    and SIGHUP (the terminal closed).

    The handler only notes them: all ranks agree on the step to stop at, in `train_step`.
    """
    received: list[int] = []
    for number in STOP_SIGNALS:
        # A process started by nohup ignores SIGHUP, and goes on doing so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    return received


def print_sample(state: TrainState) -> None:
    """Continue the sample prompt, to show what was learnt."""
    sample = state.config.sample
    state.ctx.enter("sampling")
    with state.ctx.long_timeout(state.config):
        # Rank 0 may still be closing its log.
        model = full_model(state)
    if model is None:
        return
    with eagerly(model.blocks):
        text = sample_text(
            model,
            get_family(state.config.model.family),
            state.tokenizer,
            sample.prompt,
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            top_k=sample.top_k,
            seed=state.config.training.seed,
        )
    print(f"sample of step {state.step}:\n{text}", flush=True)


def full_model(state: TrainState) -> nn.Module | None:
    """On rank 0, a model with full weights; None on the others, and on all if it does not fit.

    All ranks call it, after the last step is saved: it drops gradients and moments.
    """
    tensors = state.model.state_dict()
    if not any(isinstance(value, DTensor) for value in tensors.values()):
        return state.model if state.ctx.is_rank0 else None
    # No step follows that needs them, and the weights need the room.
    state.optimizer.zero_grad()
    state.optimizer.state.clear()
    if not state.ctx.on_rank0(lambda: has_room(state)):
        return None
    model = None
    if state.ctx.is_rank0:
        with state.ctx.device:
            model = get_family(state.config.model.family).build(state.model.config)
    for name, value in tensors.items():
        # One at a time: only rank 0 ever holds more than its shards and one full matrix.
        value = full_tensor(value)
        if model is not None:
            model.get_parameter(name).detach().copy_(value)
    return model


def has_room(state: TrainState) -> bool:
    """True if this rank's device can hold full weights beside its shards; prints a line if not."""
    config, device = state.config, state.ctx.device
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    needed = 4 * get_family(config.model.family).num_parameters(state.model.config)
    if needed + _SAMPLE_RESERVE <= free:
        return True
    text = f"no sample: full weights take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    if config.checkpoint.enable:
        text += f"; see launch/generate.py --checkpoint {config.checkpoint_folder}"
    print(text, flush=True)
    return False


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips the interpreter's shutdown: a gloo thread that drops the last collective's tensor during
    # shutdown aborts the process, and a finished job would be reported as failed.
    os._exit(code)
