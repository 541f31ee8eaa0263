"""The launcher in a single process: dry runs, refusals, bad data, stopping, resuming."""

import json
import math
import os
import random
import re
import signal
import sys
import time

import pytest
import torch

from launch import generate, random_state, train
from launch.checkpoint import save_resume
from launch.checkpoint.store import CheckpointStore, verify
from launch.exit_codes import REQUEUE, TERMINATED
from launch.tokenizer import ByteTokenizer
from launch.train import STOP_SIGNALS
from tests.launch.runs import STEPS, at_step, flags, losses, records, run_here, write_tokens

pytestmark = pytest.mark.usefixtures("one_process")


def weights(folder, step):
    return verify(folder / "checkpoint" / f"step-{step:08d}").tensors("model")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_here(folder, data) == 0
    return folder


def test_a_run_writes_its_metrics_and_prints_its_progress(undisturbed, tmp_path, data, capsys):
    assert run_here(tmp_path / "out", data) == 0
    output = capsys.readouterr().out
    series = losses(tmp_path / "out")
    assert list(series) == list(range(1, STEPS + 1))
    assert series == losses(undisturbed)
    assert series[STEPS] < series[1]
    assert output.count("step: ") == STEPS and f"step: {STEPS}/{STEPS}  loss: " in output
    for word in (
        "accumulation 4",
        "parameters",
        "mesh:",
        "tokens per step =",
        "from scratch",
        "sample of",
    ):
        assert word in output
    first, second, *_, last = records(tmp_path / "out")
    assert last["val_loss"] > 0 and last["tokens"] == STEPS * 4 * 101
    # Two steps of warm-up to the peak, then down to a tenth of it.
    assert [each["lr"] for each in (first, second, last)] == pytest.approx([0.005, 0.01, 0.001])
    assert (tmp_path / "out" / "loss.png").is_file()
    assert (tmp_path / "out" / "config.toml").is_file()


def test_a_dry_run_prints_the_resolved_run_and_writes_nothing(tmp_path, data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*flags(data__folder=data, data__source="folder"), "--job.dry_run"]) == 0
    output = capsys.readouterr().out
    for word in (
        "[training]",
        "seq_len = 101",
        "404 tokens per step",
        "= 1 processes",
        "parameters",
        "GiB",
    ):
        assert word in output
    # Memory is printed once.
    assert re.findall("(?m)^memory.*", output) == ["memory of one rank in GiB:"]
    assert "no effect" not in output
    assert list(tmp_path.iterdir()) == []


TP = "--parallelism.tensor_parallel_degree"


@pytest.mark.parametrize(
    ("argv", "world", "sentence"),
    [
        (["--cp-size", "3"], "2", "cp 3 x tp 1 = 3 does not divide the 2 processes"),
        (
            [
                *("--parallelism.data_parallel_shard_degree", "2"),
                *("--parallelism.data_parallel_method", "ddp"),
            ],
            "2",
            "data_parallel_method ddp shards no weights",
        ),
        (["--training.global_batch_size", "3"], "2", "local_batch_size 1 x data-parallel ranks 2"),
        (["--comm.backend", "nccl"], "1", "0 GPUs"),
        ([TP, "3"], "3", "num_heads 4 does not divide by 3 tensor-parallel ranks (4 = 1 x 3 + 1)"),
        ([TP, "2", "--model.glu_dim", "47"], "2", "glu_dim 47 does not divide by 2"),
        ([TP, "2", "--model.num_layers", "0"], "2", "num_layers is 0"),
        ([TP, "3", "--cp-size", "2"], "4", "cp 2 x tp 3 = 6 does not divide the 4 processes"),
        (
            [TP, "2", "--parallelism.tensor_parallel_shard_sequence", "--training.seq_len=101"],
            "2",
            "training.seq_len 101 is not a multiple of cp 1 x tp 2 = 2",
        ),
        (
            [
                *(TP, "3", "--cp-size", "2", "--training.seq_len", "6", "--model.num_heads", "6"),
                *("--model.dim", "96", "--model.glu_dim", "96"),
                *("--parallelism.context_parallel_layout", "zigzag"),
                "--parallelism.tensor_parallel_shard_sequence",
            ],
            "6",
            # 4 and 2 tokens: neither is a multiple of 3.
            "training.seq_len 6 is not a multiple of cp 2 x tp 3 x 2 (zigzag) = 12",
        ),
        (["--job.dry_run", "--job.dry_run_gpus", "65537"], "1", "it must be at most 65536"),
        (
            [TP, "2", "--cp-size", "2", "--parallelism.data_parallel_method", "ddp"],
            "4",
            "DDP cannot hold sharded weights; use auto or fsdp",
        ),
        (["--training.varlen", "--training.local_batch_size", "2"], "1", "local_batch_size is 2"),
        (["--model.preset", "9b", "--job.dry_run"], "1", "9b"),
        (["--model.vocab_size", "9", "--job.dry_run"], "1", "the tokenizer has 258"),
        ([], "abc", "the environment variable WORLD_SIZE is 'abc'"),
        ([], "0", "WORLD_SIZE is '0', must be a whole number of at least 1"),
        (["--training.seed", str(2**63)], "1", "it must be below 2^63"),
        (["--sample.top_k", "-1"], "1", "sample.top_k is -1"),
        (["--sample.max_new_tokens", "-1"], "1", "sample.max_new_tokens is -1"),
        (["--sample.temperature", "1e-300"], "1", "sample.temperature is 1e-300"),
        (["--sample.prompt", "caf\udce9"], "1", "is not UTF-8"),
        (["--metrics.enable_tensorboard"], "1", "needs the package tensorboard"),
        (["--metrics.enable_wandb"], "1", "needs the package wandb"),
    ],
)
def test_invalid_runs_are_refused_before_a_socket_opens(
    argv, world, sentence, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", world)
    for package in ("torch.utils.tensorboard", "wandb"):
        # Importing it fails, whether it is installed or not.
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("a socket was opened")
    )
    assert train.main(argv) == 73
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_mesh_is_reported_by_rank_0_only(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--cp-size", "3"]) == 73
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        ([], "train.bin holds no tokens"),
        ([range(50)], "train.bin has 50 tokens: one sequence needs training.seq_len + 1 = 102"),
        ([[1] * 300, [9999], [1] * 300], "train.bin: token 9999 at token offset 300 is outside"),
        ([[ByteTokenizer.pad_id] * 900], "every label is ignored"),
    ],
)
def test_bad_data_is_refused_and_never_gives_nan(tmp_path, documents, sentence, capsys):
    data = write_tokens(tmp_path / "data", documents)
    assert run_here(tmp_path / "out", data) == 73
    captured = capsys.readouterr()
    assert sentence in captured.err and "nan" not in captured.out
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        ([], "meta.json is damaged"),
        ({}, "KeyError: 'tokenizer'"),
        ({"tokenizer": None}, "tokenizer kind None"),
        ({"tokenizer": {"kind": "bpe"}}, "BPE tokenizer's description is damaged"),
        ({"tokenizer": {"kind": "byte"}, "train": [1]}, "'train' is [1]"),
        ({"tokenizer": {"kind": "byte"}, "val": {"bytes": "x", "tokens": 3}}, "'val' is"),
    ],
)
def test_a_damaged_meta_json_is_refused(tmp_path, meta, sentence, capsys):
    data = write_tokens(tmp_path / "data", [range(200)])
    (data / "meta.json").write_text(json.dumps(meta))
    assert run_here(tmp_path / "out", data) == 73
    error = capsys.readouterr().err
    assert "meta.json is damaged" in error and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bits_per_byte_need_a_count_of_bytes(tmp_path):
    data = write_tokens(tmp_path / "data", [range(200)])
    tokenizer = ByteTokenizer().spec()
    (data / "meta.json").write_text(json.dumps({"tokenizer": tokenizer, "train": {"tokens": 200}}))
    assert run_here(tmp_path / "out", data, training__steps=1) == 0
    assert "bpb" not in records(tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([], "is not a JSON object"),
        ({"norm_eps": "x"}, "norm_eps is 'x', must be a number"),
        ({"dim": None}, "dim is None, must be a whole number"),
        ({"lrpe_layers": ["a"]}, "lrpe_layers is ['a'], must be a list of whole numbers"),
        ({"dims": 3}, "no config field ['dims']"),
    ],
)
def test_invalid_model_files_are_refused(tmp_path, data, fields, sentence, capsys):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields))
    assert run_here(tmp_path / "out", data, model__config=path) == 73
    assert sentence in capsys.readouterr().err
    path.write_text(json.dumps({"pad_token_id": None, "lrpe_layers": [1], "norm_eps": 1e-5}))
    assert run_here(tmp_path / "out", data, model__config=path, training__steps=1) == 0


def test_a_dump_folder_that_cannot_be_written_is_refused(tmp_path, data, capsys):
    (tmp_path / "out" / "metrics.jsonl").mkdir(parents=True)
    assert run_here(tmp_path / "out", data) == 73
    assert "metrics.jsonl" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "metrics.jsonl"]
    (tmp_path / "file").write_text("")
    assert run_here(tmp_path / "file" / "out", data) == 73
    assert "job.dump_folder" in capsys.readouterr().err


def test_missing_data_is_named(tmp_path, capsys):
    assert run_here(tmp_path / "out", tmp_path / "nowhere") == 73
    assert "nowhere is missing" in capsys.readouterr().err


def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, tmp_path, data, monkeypatch):
    folder = tmp_path / "out"
    states = []

    def draw_and_stop(state):
        # So that the states differ from those of a run that has just built its model.
        torch.rand(3), random.random()
        states.append(random_state.capture(state.ctx.device))
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_step(patch, 3, draw_and_stop)
        assert run_here(folder, data) == REQUEUE
    (stopped_at,) = CheckpointStore(folder / "checkpoint").steps()
    assert stopped_at in (4, 5)
    with monkeypatch.context() as patch:
        at_step(
            patch,
            stopped_at,
            lambda state: states.append(random_state.capture(torch.device("cpu"))),
        )
        assert run_here(folder, data) == 0
    # Random states are resumed too.
    assert len(states) == 2 and states[0] == states[1]
    assert losses(folder) == losses(undisturbed)
    assert same(weights(folder, STEPS), weights(undisturbed, STEPS))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_saves_the_step_in_which_it_arrives(
    tmp_path, data, monkeypatch, capsys, number
):
    # The tests may run where it is ignored, as under nohup.
    signal.signal(number, signal.SIG_DFL)
    at_step(monkeypatch, 2, lambda state: os.kill(os.getpid(), number))
    assert run_here(tmp_path, data) == REQUEUE
    assert f"stopped by {number.name} after step 3" in capsys.readouterr().out
    assert CheckpointStore(tmp_path / "checkpoint").steps() == [3]


def test_a_run_under_nohup_goes_on_after_sighup(tmp_path, data, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda state: os.kill(os.getpid(), signal.SIGHUP))
    assert run_here(tmp_path, data) == 0


def test_sigterm_of_a_run_that_may_not_resume_says_how_to_resume(
    undisturbed, tmp_path, data, monkeypatch, capsys
):
    wanted = dict(checkpoint__resume="never")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        assert run_here(tmp_path, data, **wanted) == REQUEUE
    assert "run the command again with --checkpoint.resume auto" in capsys.readouterr().out
    assert run_here(tmp_path, data, **wanted) == 70
    assert run_here(tmp_path, data, checkpoint__resume="auto") == 0
    assert losses(tmp_path) == losses(undisturbed)


def test_sigterm_at_a_step_that_is_saved_already_saves_nothing(tmp_path, data, monkeypatch):
    def poison_and_stop(state):
        state.wrapped_model.forward = lambda *args: torch.tensor(float("nan"), requires_grad=True)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_here(tmp_path / "out", data, training__steps=2) == 0
    # The same folder by another name.
    (tmp_path / "link").symlink_to(tmp_path / "out")
    named = tmp_path / "link" / "checkpoint" / "step-00000002"
    at_step(monkeypatch, 2, poison_and_stop)
    assert run_here(tmp_path / "out", data, checkpoint__resume=named) == REQUEUE


def test_sigterm_without_checkpoints_says_that_nothing_was_saved(
    tmp_path, data, monkeypatch, capsys
):
    folder = tmp_path / "out"
    at_step(monkeypatch, 3, lambda state: os.kill(os.getpid(), signal.SIGTERM))
    assert run_here(folder, data, "--checkpoint.no-enable") == TERMINATED == 143
    assert "nothing was saved" in capsys.readouterr().out
    assert not (folder / "checkpoint").exists()
    # The next run starts from scratch; the record of this one stays.
    first = (folder / "metrics.jsonl").read_text()
    assert run_here(folder, data, "--checkpoint.no-enable", training__steps=2) == 0
    assert (folder / "metrics-1.jsonl").read_text() == first
    assert list(losses(folder)) == [1, 2]


def test_sigterm_in_a_skipped_first_step_saves_nothing(tmp_path, data, monkeypatch):
    def poison_and_stop(state):
        forward = state.wrapped_model.forward
        state.wrapped_model.forward = lambda *args: forward(*args) * float("nan")
        os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(patch, 0, poison_and_stop)
        assert run_here(folder, data) == REQUEUE
    assert not (folder / "checkpoint").exists()
    assert run_here(folder, data, training__steps=2) == 0


def test_resume_falls_back_to_the_newest_valid(undisturbed, tmp_path, data, capsys):
    folder = tmp_path / "out"
    assert run_here(folder, data, checkpoint__interval=3) == 0
    newest = folder / "checkpoint" / f"step-{STEPS:08d}" / "model.safetensors"
    flipped = bytearray(newest.read_bytes())
    flipped[-1] ^= 1
    newest.write_bytes(flipped)
    capsys.readouterr()
    assert run_here(folder, data, checkpoint__interval=3) == 0
    output = capsys.readouterr().out
    assert f"refused:     {newest}" in output and "step-00000006" in output
    assert losses(folder) == losses(undisturbed)
    assert same(weights(folder, STEPS), weights(undisturbed, STEPS))


def test_a_finished_run_is_left_as_it_is(tmp_path, data, capsys):
    folder = tmp_path / "out"
    assert run_here(folder, data) == 0
    before, config = losses(folder), (folder / "config.toml").read_text()
    assert run_here(folder, data) == 0
    assert losses(folder) == before
    assert run_here(folder, data, checkpoint__resume="never") == 70
    assert "already holds checkpoints" in capsys.readouterr().err
    assert run_here(folder, data, model__dim=64) == 70
    assert "of another model" in capsys.readouterr().err
    # A refused run changes nothing, not even config.toml.
    assert losses(folder) == before and (folder / "config.toml").read_text() == config


def test_nonfinite_steps_change_nothing_and_then_end_the_run(tmp_path, data, monkeypatch, capsys):
    seen = []

    def poison(state):
        forward = state.wrapped_model.forward
        state.wrapped_model.forward = lambda *args: forward(*args) * float("nan")
        tensors = {name: value.clone() for name, value in state.model.state_dict().items()}
        seen.append((state, (state.step, state.consumed, tensors)))

    at_step(monkeypatch, 4, poison)
    assert run_here(tmp_path / "out", data, training__max_nonfinite_steps=2) == 72
    captured = capsys.readouterr()
    assert "step 5: loss or gradients are NaN" in captured.err
    assert "try 1 of 2" in captured.out and "try 2 of 2" in captured.err
    ((after, (step, consumed, before)),) = seen
    assert (after.step, after.consumed) == (step, consumed)
    assert same(before, after.model.state_dict())
    assert list(losses(tmp_path / "out")) == [1, 2, 3, 4]


def test_a_single_nonfinite_step_changes_nothing(undisturbed, tmp_path, data, monkeypatch):
    def poison_once(state):
        forward = state.wrapped_model.forward

        def broken(*args):
            state.wrapped_model.forward = forward
            return forward(*args) * float("inf")

        state.wrapped_model.forward = broken

    done = at_step(monkeypatch, 4, poison_once)
    assert run_here(tmp_path / "out", data) == 0
    assert done
    assert losses(tmp_path / "out") == losses(undisturbed)
    assert same(weights(tmp_path / "out", STEPS), weights(undisturbed, STEPS))


def test_a_loss_curve_that_cannot_be_written_is_only_a_warning(tmp_path, data, capsys):
    (tmp_path / "loss.png").mkdir()
    assert run_here(tmp_path, data, training__steps=1) == 0
    assert "loss.png cannot be written" in capsys.readouterr().out


def test_tokens_are_counted_across_changes_of_the_batch(tmp_path, data):
    assert run_here(tmp_path, data, training__steps=2) == 0
    assert run_here(tmp_path, data, training__steps=3, training__global_batch_size=2) == 0
    assert [each["tokens"] // 101 for each in records(tmp_path)] == [4, 8, 10]


def test_the_log_is_closed_when_a_run_fails(tmp_path, data, monkeypatch):
    def poison(state):
        state.wrapped_model.forward = lambda *args: torch.tensor(float("nan"), requires_grad=True)

    closed = []
    monkeypatch.setattr(train.MetricsLog, "close", lambda log: closed.append(log))
    at_step(monkeypatch, 1, poison)
    assert run_here(tmp_path, data, training__max_nonfinite_steps=1) == 72
    assert len(closed) == 1


def test_a_full_disk_skips_a_checkpoint_and_the_run_goes_on(tmp_path, data, monkeypatch, capsys):
    original = CheckpointStore.commit

    def commit(self, step, *args):
        if step == 3:
            raise OSError(28, "No space left on device")
        return original(self, step, *args)

    monkeypatch.setattr(CheckpointStore, "commit", commit)
    assert run_here(tmp_path / "out", data, checkpoint__interval=3) == 0
    assert "checkpoint 1 not written" in capsys.readouterr().out
    assert CheckpointStore(tmp_path / "out" / "checkpoint").steps() == [6, STEPS]


def test_checkpoints_in_the_background_change_nothing(undisturbed, tmp_path, data, capsys):
    folder = tmp_path / "out"
    wanted = dict(checkpoint__async_mode="async", checkpoint__interval=2)
    assert run_here(folder, data, **wanted) == 0
    output = capsys.readouterr().out
    assert losses(folder) == losses(undisturbed)
    assert CheckpointStore(folder / "checkpoint", 9).steps() == [4, 6, STEPS]
    # Only the last checkpoint is waited for.
    assert output.count("s, writing") == STEPS // 2 - 1
    assert output.count("checkpoint: ") == STEPS // 2
    assert same(weights(folder, STEPS), weights(undisturbed, STEPS))


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing a file of tensors takes longer than several steps."""
    write = save_resume.write_shards
    monkeypatch.setattr(save_resume, "write_shards", lambda *args: time.sleep(0.3) or write(*args))


def test_sigterm_waits_for_the_checkpoint_being_written(
    undisturbed, tmp_path, data, monkeypatch, slow_disk
):
    wanted = dict(checkpoint__async_mode="async", checkpoint__interval=2)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        assert run_here(tmp_path, data, **wanted) == REQUEUE
    earlier, stopped_at = CheckpointStore(tmp_path / "checkpoint").steps()
    assert earlier == 2 < stopped_at
    assert run_here(tmp_path, data, **wanted) == 0
    assert losses(tmp_path) == losses(undisturbed)


def test_a_failing_run_commits_the_checkpoint_being_written(tmp_path, data, monkeypatch, slow_disk):
    def poison(state):
        forward = state.wrapped_model.forward
        state.wrapped_model.forward = lambda *args: forward(*args) * float("nan")

    at_step(monkeypatch, 2, poison)
    wanted = dict(checkpoint__async_mode="async", checkpoint__interval=2)
    assert run_here(tmp_path, data, training__max_nonfinite_steps=1, **wanted) == 72
    assert CheckpointStore(tmp_path / "checkpoint").find("must")[0].step == 2


def test_only_the_latest_checkpoints_are_kept(tmp_path, data):
    assert (
        run_here(tmp_path / "out", data, checkpoint__interval=2, checkpoint__keep_latest_k=2) == 0
    )
    assert CheckpointStore(tmp_path / "out" / "checkpoint").steps() == [6, 8]


def test_accumulation_and_local_batch_give_the_same_losses(undisturbed, tmp_path, data):
    assert run_here(tmp_path / "out", data, training__local_batch_size=4) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(undisturbed), rel=1e-5)


def test_activation_checkpointing_gives_the_same_losses(undisturbed, tmp_path, data):
    assert run_here(tmp_path / "out", data, activation_checkpoint__mode="full") == 0
    assert losses(tmp_path / "out") == losses(undisturbed)


def test_bfloat16_learns_and_random_tokens_do_not(undisturbed, tmp_path, data):
    low = dict(training__mixed_precision_param="bfloat16")
    assert run_here(tmp_path / "low", data, **low) == 0
    got, expected = losses(tmp_path / "low"), losses(undisturbed)
    # Close to float32 and not equal to it.
    assert 1e-5 < abs(got[STEPS] / expected[STEPS] - 1) < 0.05
    uniform = dict(data__source="random", model__vocab_size=50, training__steps=2)
    assert train.main(flags(job__dump_folder=tmp_path / "uniform", **uniform)) == 0
    # The best loss is that of a uniform guess.
    assert losses(tmp_path / "uniform")[1] == pytest.approx(math.log(50), rel=0.05)


def test_text_is_generated_from_a_checkpoint_alone(undisturbed, capsys):
    common = ["--max_new_tokens", "12", "--prompt", "line"]
    texts = []
    for seed in ("1", "1", "2"):
        argv = ["--checkpoint", str(undisturbed / "checkpoint"), *common, "--seed", seed]
        assert generate.main(argv) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("line") for text in texts)
    assert generate.main(["--checkpoint", str(undisturbed / "none")]) == 70
    error = capsys.readouterr().err
    # Only the launcher has that flag.
    assert "none holds no valid checkpoint: give a step folder" in error
    assert "checkpoint.resume" not in error


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--device", "cuda"], "device is cuda, but this machine has 0 GPUs"),
        (["--device", "gpu"], "device is 'gpu': give auto, cpu, cuda"),
        (["--device", "meta"], "device is 'meta': give auto, cpu, cuda"),
        (["--prompt", "caf\udce9"], "is not UTF-8"),
        (["--temperature", "1e-300"], "temperature is 1e-300"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top_k", "-1"], "top_k is -1"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_invalid_generation_options_are_refused(undisturbed, argv, sentence, capsys):
    assert generate.main(["--checkpoint", str(undisturbed / "checkpoint"), *argv]) == 73
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
