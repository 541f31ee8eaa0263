"""The launcher on sequences in segments: the losses of whole sequences, stopping between two
segments, progress, memory, and what is refused."""

import math
import os
import re
import signal

import pytest
import torch

from launch import segments, train
from launch.build import model_config
from launch.config import load_config
from launch.data import read_batch, stream_order
from launch.distributed import RankInfo
from launch.exit_codes import REQUEUE
from launch.memory_estimate import estimate, format_estimate
from launch.trainer import step_indices, train_step, validate
from parallel.mesh import ParallelDims
from tests.launch.runs import STEPS, at_step, flags, losses, records, run_here
from tests.launch.test_settings import make_run
from tests.launch.test_train import same, weights

VARLEN = {False: [], True: ["--training.varlen"]}
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """Losses without segments, of random order and of packed documents."""
    folders = {varlen: tmp_path_factory.mktemp("whole") for varlen in (False, True)}
    for varlen, folder in folders.items():
        assert run_here(folder, data, *VARLEN[varlen], validation__freq=3) == 0
    return {varlen: (losses(folder), validated(folder)) for varlen, folder in folders.items()}


def validated(folder):
    return [each["val_loss"] for each in records(folder) if "val_loss" in each]


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("length", [9, 50, 500])
def test_segments_train_and_validate_as_whole_sequences(tmp_path, data, whole, length, varlen):
    """Four micro-batches of 101 tokens; 500: one segment."""
    options = dict(training__segment_len=length, validation__freq=3)
    assert run_here(tmp_path, data, *VARLEN[varlen], **options) == 0
    expected, expected_validation = whole[varlen]
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    assert validated(tmp_path) == pytest.approx(expected_validation, rel=1e-5)


def test_a_last_validation_batch_may_be_smaller(tmp_path, data):
    found = []
    for length in (0, 30):
        options = dict(training__local_batch_size=5, training__global_batch_size=5)
        options |= dict(training__segment_len=length, validation__steps=1000)
        run = make_run(tmp_path / str(length), data, **options)
        assert run.val_source.num_samples % 5
        found.append(validate(run))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_truncated_gradient_trains_otherwise(tmp_path, data, whole):
    options = dict(training__segment_len=9, training__segment_gradient="truncated")
    assert run_here(tmp_path, data, **options) == 0
    found, (expected, _) = losses(tmp_path), whole[False]
    # The forward of the first step is the same; its gradients are not.
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    assert abs(found[STEPS] - expected[STEPS]) > 1e-4
    assert found[STEPS] < 0.9 * found[1]


def signal_at(monkeypatch, step, done):
    """SIGTERM to this process after `done` segments of a micro-batch in step `step`."""
    reached, after_segment = [], segments._Watch.after_segment

    def strikes(self, number, total):
        if self._state.step == step - 1 and number == done and not reached:
            reached.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        after_segment(self, number, total)
        if reached:
            reached.append(number)

    monkeypatch.setattr(segments._Watch, "after_segment", strikes)
    return reached


def test_sigterm_gives_up_a_step_and_loses_no_other(tmp_path, data, monkeypatch, capsys):
    options = dict(training__segment_len=9, checkpoint__interval=100)
    assert run_here(tmp_path / "undisturbed", data, **options) == 0
    # In both passes: 12 segments are 23 calls.
    for number, done in enumerate((4, 20)):
        folder = tmp_path / f"stopped{number}"
        with monkeypatch.context() as patch:
            reached = signal_at(patch, 4, done)
            assert run_here(folder, data, **options) == REQUEUE
        # The segment that was running was the last one.
        assert len(reached) <= 2
        assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
        assert list(losses(folder)) == [1, 2, 3]
        assert run_here(folder, data, **options) == 0
        assert losses(folder) == losses(tmp_path / "undisturbed")
        assert same(weights(folder, STEPS), weights(tmp_path / "undisturbed", STEPS))


def test_nan_in_one_segment_changes_nothing(tmp_path, data):
    run = make_run(tmp_path, data, training__segment_len=20)
    before = [p.detach().clone() for p in run.model.parameters()]
    forward, calls = run.wrapped_model.forward, []

    def poisoned(*args):
        loss, states = forward(*args)
        calls.append(1)
        return (loss * math.nan if loss is not None and len(calls) == 7 else loss), states

    run.wrapped_model.forward = poisoned
    result = train_step(run)
    assert result.loss is None and not result.interrupted and run.step == 0
    assert all(map(torch.equal, before, run.model.parameters()))


def test_a_long_step_prints_its_progress(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr("launch.progress.SECONDS_BETWEEN_LINES", 0)
    options = dict(training__segment_len=30, training__steps=1)
    assert run_here(tmp_path, data, **options) == 0
    output = capsys.readouterr().out
    pattern = r"step 1: segment (\d)/7 of both passes, micro-batch (\d)/4  tok/s: [\d,]+  \[0:00"
    found = re.findall(pattern, output)
    assert found == [(str(done), str(batch)) for batch in range(1, 5) for done in range(1, 8)]
    options |= dict(training__segment_gradient="truncated", training__global_batch_size=1)
    assert run_here(tmp_path / "truncated", data, **options) == 0
    assert re.findall(r"step 1: segment (\d/4)  tok/s", capsys.readouterr().out) == [
        "1/4",
        "2/4",
        "3/4",
        "4/4",
    ]


def test_progress_counts_a_backward_twice():
    watch = segments._Watch.__new__(segments._Watch)
    watch._state = type("State", (), {"config": load_config([])})()
    watch._num_batches, watch.batches_done = 2, 0
    # 2 forwards, then 3 forwards with backwards: 2 + 9.
    assert [watch._share(done, 5) for done in (1, 2, 3, 5)] == pytest.approx(
        [1 / 22, 2 / 22, 5 / 22, 11 / 22]
    )
    watch.batches_done = 1
    assert watch._share(5, 5) == 1


CARRY = dict(training__segment_len=51, training__segment_gradient="truncated")


def test_carried_states_go_on_with_the_text(tmp_path, data):
    """Two steps of 50 tokens with carried states have the losses of one sequence of 100 tokens."""
    changes = dict(optimizer__lr=0.0, training__global_batch_size=1, training__seq_len=50)
    run = make_run(tmp_path, data, "--training.carry_state", **(CARRY | changes))
    (first,), (second,) = step_indices(run), stream_order(1, 1, run.train_source.num_samples)
    assert (first, second) == (0, 1)
    losses = [train_step(run).loss for _ in range(2)]
    whole = make_run(tmp_path / "whole", data, **(changes | dict(training__seq_len=100)))
    batch = read_batch(whole.train_source, [0], whole.shard)
    expected = whole.loss_model(*batch.arguments(torch.device("cpu"))).item() / 100
    assert sum(losses) / 2 == pytest.approx(expected, rel=1e-6)
    apart = make_run(tmp_path / "apart", data, **(CARRY | changes))
    batch = read_batch(apart.train_source, [1], apart.shard)
    without = apart.loss_model(*batch.arguments(torch.device("cpu"))).item() / 50
    assert abs(losses[1] - without) > 1e-4


def test_streams_start_again_after_their_last_sample(tmp_path, data):
    assert [stream_order(4 * step, 4, 11) for step in range(3)] == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
        [0, 2, 4, 6],
    ]
    run = make_run(tmp_path, data, "--training.carry_state", **CARRY)
    run.train_source.num_samples = 8
    positions, seen = [], []
    for _ in range(3):
        positions.append(segments.stream_position(run))
        train_step(run)
        seen.append([[state.abs().sum() for state in layers] for layers in run.carried])
    assert positions == [0, 101, 0]
    assert len(seen[0]) == 4 and run.carried[0][0].shape == (1, 2, 32, 16)


def test_a_skipped_step_leaves_the_carried_states(tmp_path, data):
    run = make_run(tmp_path, data, "--training.carry_state", **CARRY)
    train_step(run)
    before, loss_of = run.carried, run.wrapped_model.forward
    run.wrapped_model.forward = lambda *args: (loss_of(*args)[0] * math.nan, loss_of(*args)[1])
    assert train_step(run).loss is None
    assert run.carried is before


@pytest.mark.parametrize("varlen", [False, True])
def test_carried_states_are_saved(tmp_path, data, monkeypatch, capsys, varlen):
    more = ["--training.carry_state", *VARLEN[varlen]]
    assert run_here(tmp_path / "whole", data, *more, **CARRY) == 0
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        assert run_here(folder, data, *more, **CARRY) == REQUEUE
    assert run_here(folder, data, *more, **CARRY) == 0
    assert losses(folder) == losses(tmp_path / "whole")
    assert same(weights(folder, STEPS), weights(tmp_path / "whole", STEPS))
    # Other sequences.
    capsys.readouterr()
    changes = dict(training__steps=STEPS + 1, training__global_batch_size=2)
    assert run_here(folder, data, *more, **(CARRY | changes)) == 70
    assert "data (samples) was" in capsys.readouterr().err
    more.append("--checkpoint.allow_changes")
    assert run_here(folder, data, *more, **(CARRY | changes)) == 0
    assert "they start from zero" in capsys.readouterr().out


def test_streams_need_as_many_samples(tmp_path, data, capsys):
    changes = dict(training__seq_len=5000)
    line = ["--training.carry_state", "--validation.no-enable"]
    assert run_here(tmp_path, data, *line, **(CARRY | changes | BATCH)) == 73
    assert "training.carry_state reads 64 streams" in capsys.readouterr().err


BATCH = dict(training__global_batch_size=64)


def planned(**changes):
    config = load_config(
        flags(
            data__source="random",
            training__local_batch_size=2,
            training__global_batch_size=-1,
            **changes,
        )
    )
    info = RankInfo(0, 0, "gloo", torch.device("cpu"), ParallelDims())
    return config, info, model_config(config, None)


def test_a_dry_run_has_the_memory_of_a_segment():
    segment = dict(training__segment_len=256)
    long, longer = (planned(training__seq_len=length, **segment) for length in (4096, 65536))
    one, other = estimate(*long), estimate(*longer)
    assert one.activations == other.activations and one.total == other.total
    plain = estimate(*planned(training__seq_len=256))
    # States, their gradients, and those that leave.
    states = 2 * 4 * (2 * 32 + 32) * 16
    assert one.states == states and one.kept_states == 15 * states
    assert plain.activations < one.activations < plain.activations + 8 * states
    whole = estimate(*planned(training__seq_len=4096))
    assert whole.activations > 10 * one.activations and not whole.kept_states
    text, _ = format_estimate(*longer, None)
    assert "(of 255 segments of host memory, not in the total)" in text
    on_device = estimate(*planned(training__seq_len=65536, training__segment_states="device"))
    assert not on_device.kept_states
    on_device = estimate(
        *planned(training__seq_len=65536, training__segment_states="device", **segment)
    )
    assert on_device.total == other.total + 255 * states
    truncated = estimate(
        *planned(training__seq_len=65536, training__segment_gradient="truncated", **segment)
    )
    assert truncated.kept_states == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            dict(training__segment_len=50, model__layer_types="LS"),
            "training.segment_len is 50: 1 of 2 layers are softmax attention",
        ),
        (dict(training__segment_len=-1), "training.segment_len is -1: it must be at least 0"),
        (
            dict(
                training__segment_len=51,
                training__seq_len=102,
                parallelism__context_parallel_layout="zigzag",
            ),
            "training.segment_len is 51: it must be even",
        ),
        (
            dict(
                training__segment_len=40,
                training__seq_len=112,
                quantize__linear__float8__recipe_name="tensorwise",
                quantize__linear__float8__emulate=True,
            ),
            "a rank has 40 tokens (local_batch_size 1 x training.segment_len 40 / cp 1), FP8 needs",
        ),
        (
            dict(
                training__segment_len=48,
                training__seq_len=101,
                quantize__linear__float8__recipe_name="tensorwise",
                quantize__linear__float8__emulate=True,
            ),
            "the last segment (training.seq_len % training.segment_len) 5 / cp 1), FP8 needs",
        ),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, data, capsys, changes, sentence):
    line = flags(data__source="folder", data__folder=data, job__dump_folder=tmp_path / "out")
    line += [item for name, value in changes.items() for item in _flag(name, value)]
    assert train.main(line) == 73
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def _flag(name, value):
    name = f"--{name.replace('__', '.')}"
    return [name] if value is True else [name, str(value)]


def test_settings_without_segments_have_no_effect(tmp_path, data, capsys):
    options = dict(training__segment_gradient="truncated", training__segment_states="device")
    line = flags(data__source="folder", data__folder=data, **options)
    assert train.main([*line, "--job.dry_run"]) == 0
    assert "training.segment_gradient (training.segment_len is 0); " in capsys.readouterr().out
    line = flags(data__source="folder", data__folder=data, training__segment_len=50)
    assert train.main([*line, "--job.dry_run"]) == 0
    output = capsys.readouterr().out
    assert "101 tokens on one rank, in 3 segments of 50 (gradient exact)" in output
    assert "no effect" not in output
