"""The launcher in this process, alone: plans, refusals, bad data, stopping, resuming."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from launch import generate, train
from launch.checkpoint import CheckpointStore, verify
from launch.errors import REQUEUE
from launch.indexed import IndexedWriter
from launch.step import take_step
from launch.tokenizer import ByteTokenizer
from tests.launch.runs import flags, losses, make_data

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def run(folder, data, **changes):
    """Exit code of a run of STEPS steps."""
    wanted = dict(
        job__dump_folder=folder, data__source="folder", data__folder=data, training__steps=STEPS
    )
    return train.main(flags(**(wanted | changes)))


def weights(folder, step):
    return verify(folder / "checkpoint" / f"step-{step:08d}").tensors("model")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder, data) == 0
    return folder


def test_a_run_leaves_what_it_promises(undisturbed, tmp_path, data, capsys):
    assert run(tmp_path / "out", data) == 0
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
    last = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    record = json.loads(last)
    assert record["val_loss"] > 0 and record["tokens"] == STEPS * 4 * 101
    assert (tmp_path / "out" / "loss.png").is_file()
    assert (tmp_path / "out" / "config.toml").is_file()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, data, capsys, monkeypatch):
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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "world", "sentence"),
    [
        (["--training.seqlen", "3"], "1", "did you mean --training.seq_len?"),
        (["--cp-size", "3"], "2", "cp 3 x tp 1 = 3 does not divide the 2 processes"),
        (
            ["--parallelism.data_parallel_replicate_degree", "1"],
            "2",
            "sharded data parallelism is not there yet",
        ),
        (["--training.global_batch_size", "3"], "2", "local_batch_size 1 x data-parallel ranks 2"),
        (["--comm.backend", "nccl"], "1", "0 GPUs"),
        (["--training.varlen", "--sp-size", "2"], "2", "--training.no-varlen"),
        (["--training.varlen", "--training.local_batch_size", "2"], "1", "local_batch_size is 2"),
        (["--model.preset", "9b", "--job.dry_run"], "1", "9b"),
        (["--model.vocab_size", "9", "--job.dry_run"], "1", "the tokenizer has 258"),
    ],
)
def test_what_cannot_run_is_refused_before_a_socket_opens(
    argv, world, sentence, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("a socket was opened")
    )
    assert train.main(argv) == 73
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_world_equation_is_printed_by_one_rank(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--cp-size", "3"]) == 73
    assert capsys.readouterr().err == ""


def write_tokens(folder, documents):
    """A data folder by hand: train and val alike, with the byte tokenizer's meta.json."""
    folder.mkdir()
    for split in ("train", "val"):
        writer = IndexedWriter(folder / split, np.dtype(np.uint16))
        for document in documents:
            writer.add(np.asarray(document))
        writer.close()
    (folder / "meta.json").write_text(json.dumps({"tokenizer": ByteTokenizer().spec()}))
    return folder


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        ([], "train.bin holds no tokens"),
        ([range(50)], "train.bin has 50 tokens: one sequence needs training.seq_len + 1 = 102"),
        ([[1] * 300, [9999], [1] * 300], "train.bin: token 9999 at token offset 300 is outside"),
        ([[ByteTokenizer.pad_id] * 900], "every label is ignored"),
    ],
)
def test_bad_data_is_an_error_and_never_nan(tmp_path, documents, sentence, capsys):
    data = write_tokens(tmp_path / "data", documents)
    assert run(tmp_path / "out", data) == 73
    captured = capsys.readouterr()
    assert sentence in captured.err and "nan" not in captured.out
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_missing_data_is_named(tmp_path, capsys):
    assert run(tmp_path / "out", tmp_path / "nowhere") == 73
    assert "nowhere is missing" in capsys.readouterr().err


def at_step(monkeypatch, number, action):
    """Run `action(run)` before the step that follows `number` finished ones, the first time."""
    done = []

    def wrapped(run, stop_requested):
        if run.step == number and not done:
            done.append(1)
            action(run)
        return take_step(run, stop_requested)

    monkeypatch.setattr(train, "take_step", wrapped)
    return done


def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, tmp_path, data, monkeypatch):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        done = at_step(patch, 3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        assert run(folder, data) == REQUEUE
        assert done
    stopped_at = CheckpointStore(folder / "checkpoint").steps()
    assert len(stopped_at) == 1 and stopped_at[0] in (4, 5)
    # The random states are part of what goes on.
    torch.manual_seed(123)
    assert run(folder, data) == 0
    assert losses(folder) == losses(undisturbed)
    assert same(weights(folder, STEPS), weights(undisturbed, STEPS))


def test_resume_falls_back_to_the_newest_valid(undisturbed, tmp_path, data, capsys):
    folder = tmp_path / "out"
    assert run(folder, data, checkpoint__interval=3) == 0
    newest = folder / "checkpoint" / f"step-{STEPS:08d}" / "model.safetensors"
    flipped = bytearray(newest.read_bytes())
    flipped[-1] ^= 1
    newest.write_bytes(flipped)
    capsys.readouterr()
    assert run(folder, data, checkpoint__interval=3) == 0
    output = capsys.readouterr().out
    assert f"refused:     {newest}" in output and "step-00000006" in output
    assert losses(folder) == losses(undisturbed)
    assert same(weights(folder, STEPS), weights(undisturbed, STEPS))


def test_a_finished_run_is_left_as_it_is(tmp_path, data, capsys):
    folder = tmp_path / "out"
    assert run(folder, data) == 0
    before = losses(folder)
    assert run(folder, data) == 0
    assert losses(folder) == before
    assert run(folder, data, checkpoint__resume="never") == 70
    assert "already holds checkpoints" in capsys.readouterr().err
    assert run(folder, data, model__dim=64) == 70
    assert "of another model" in capsys.readouterr().err
    assert losses(folder) == before


def test_nonfinite_steps_change_nothing_and_end_the_run(tmp_path, data, monkeypatch, capsys):
    seen = []

    def poison(run):
        forward = run.trained.forward
        run.trained.forward = lambda *args: forward(*args) * float("nan")
        state = (run.step, run.consumed, {k: v.clone() for k, v in run.model.state_dict().items()})
        seen.append((run, state))

    at_step(monkeypatch, 4, poison)
    assert run(tmp_path / "out", data, training__max_nonfinite_steps=2) == 72
    captured = capsys.readouterr()
    assert "step 5: loss or gradients are NaN" in captured.err
    assert "try 1 of 2" in captured.out and "try 2 of 2" in captured.err
    ((after, (step, consumed, before)),) = seen
    assert (after.step, after.consumed) == (step, consumed)
    assert same(before, after.model.state_dict())
    assert list(losses(tmp_path / "out")) == [1, 2, 3, 4]


def test_one_bad_try_leaves_no_trace(undisturbed, tmp_path, data, monkeypatch):
    def poison_once(run):
        forward = run.trained.forward

        def broken(*args):
            run.trained.forward = forward
            return forward(*args) * float("inf")

        run.trained.forward = broken

    done = at_step(monkeypatch, 4, poison_once)
    assert run(tmp_path / "out", data) == 0
    assert done
    assert losses(tmp_path / "out") == losses(undisturbed)
    assert same(weights(tmp_path / "out", STEPS), weights(undisturbed, STEPS))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, data, monkeypatch, capsys):
    original = CheckpointStore.save

    def save(self, step, *args):
        if step == 3:
            raise OSError(28, "No space left on device")
        return original(self, step, *args)

    monkeypatch.setattr(CheckpointStore, "save", save)
    assert run(tmp_path / "out", data, checkpoint__interval=3) == 0
    assert "checkpoint 1 not written" in capsys.readouterr().out
    assert CheckpointStore(tmp_path / "out" / "checkpoint").steps() == [6, STEPS]


def test_accumulation_and_local_batch_give_the_same_losses(undisturbed, tmp_path, data):
    assert run(tmp_path / "out", data, training__local_batch_size=4) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(undisturbed), rel=1e-5)


def test_recomputation_gives_the_same_losses(undisturbed, tmp_path, data):
    assert run(tmp_path / "out", data, activation_checkpoint__mode="full") == 0
    assert losses(tmp_path / "out") == losses(undisturbed)


def test_packed_documents_and_bfloat16_and_random_tokens_run(tmp_path, data):
    varlen = [*flags(job__dump_folder=tmp_path / "a", data__source="folder", data__folder=data)]
    assert train.main([*varlen, "--training.varlen", "--training.steps", "3"]) == 0
    low = dict(training__mixed_precision_param="bfloat16")
    assert run(tmp_path / "b", data, **low) == 0
    assert losses(tmp_path / "b")[STEPS] < losses(tmp_path / "b")[1]
    random = dict(data__source="random", model__vocab_size=50, training__steps=2)
    assert train.main(flags(job__dump_folder=tmp_path / "c", **random)) == 0
    assert all(np.isfinite(list(losses(tmp_path / each).values())).all() for each in "abc")


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
    assert "no valid checkpoint" in capsys.readouterr().err
