"""Runs that are killed, again and again: they continue with the same weights, bit for bit."""

import contextlib
import os
import random
import re
import signal
import time

import pytest
import torch

from launch.checkpoint.store import CheckpointStore, verify
from launch.exit_codes import HUNG
from tests.cleanup import with_variable
from tests.faults.jobs import START, Job, Strike
from tests.launch.runs import flags, losses, output_of, start

STEPS = 24
LAYOUTS = {
    "cp sync": dict(parallelism__context_parallel_degree=2),
    "ddp async": dict(parallelism__data_parallel_method="ddp", checkpoint__async_mode="async"),
    "fsdp sync": dict(parallelism__data_parallel_method="fsdp"),
    "fsdp async": dict(parallelism__data_parallel_method="fsdp", checkpoint__async_mode="async"),
}


def arguments(folder, data, **changes):
    wanted = dict(
        job__dump_folder=folder,
        data__source="folder",
        data__folder=data,
        training__steps=STEPS,
        checkpoint__interval=2,
        comm__train_timeout_seconds=60,
        comm__init_timeout_seconds=120,
    )
    values = flags(**(wanted | changes))
    return [*values, "--sample.no_enable", "--validation.no_enable"]


def finish(tmp_path, argv):
    job = Job(tmp_path, argv)
    try:
        assert job.wait(START) == [0, 0], job.outputs()
    finally:
        job.end()


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The tensors and losses of an undisturbed run, by layout; made when asked for."""
    made = {}

    def get(layout):
        if layout not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            finish(folder / "logs", arguments(folder / "out", data, **LAYOUTS[layout]))
            made[layout] = tensors(folder / "out"), losses(folder / "out")
        return made[layout]

    return get


def tensors(folder):
    last = verify(folder / "checkpoint" / f"step-{STEPS:08d}")
    return {
        (group, name): value.clone()
        for group in ("model", "optimizer")
        for name, value in last.tensors(group).items()
    }


def check_equal(folder, expected):
    weights, of_step = expected
    found = tensors(folder)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert losses(folder) == of_step


def check_checkpoints(folder, output):
    """Each checkpoint there is valid, and the newest that was announced is among them."""
    store = CheckpointStore(folder / "checkpoint")
    steps = store.steps()
    for step in steps:
        verify(folder / "checkpoint" / f"step-{step:08d}")
    announced = [int(step) for step in re.findall(r"^checkpoint: .*/step-(\d+)$", output, re.M)]
    if announced:
        assert steps and max(steps) >= max(announced), (steps, announced)


def kill_at_random(tmp_path, data, layout, ranks, kills, chance):
    """Kill `ranks` of a run `kills` times, at random; starts anew where a run gets to its end."""
    done, number, complete = 0, 0, []
    folder = tmp_path / "out-0"
    while done < kills or not complete or complete[-1] != folder:
        job = Job(tmp_path / f"logs-{number}", arguments(folder, data, **LAYOUTS[layout]))
        number += 1
        try:
            if done < kills:
                # Saves are as frequent as steps, so many kills hit one.
                job.wait_for("resume: ")
                job.wait(chance.uniform(0, 1.0))
                before = sum(process.exitcode is None for process in job.processes)
                job.kill(ranks)
                done += before > 0
                # torchrun ends the others after a while.
                codes = job.wait(chance.uniform(0, 3.0))
                survivors = set(codes) - {None, 0, -signal.SIGKILL}
                assert survivors <= {HUNG}, job.outputs()
            else:
                codes = job.wait(START)
                assert codes == [0, 0], job.outputs()
        finally:
            job.end()
        check_checkpoints(folder, job.output(0))
        if codes == [0, 0]:
            complete.append(folder)
            if done < kills:
                folder = tmp_path / f"out-{len(complete)}"
    return complete


LONG = [
    pytest.param(layout, ranks, 17, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])
    for layout in LAYOUTS
    for ranks in ([0], [1], [0, 1])
]


@pytest.mark.parametrize(("layout", "ranks", "kills"), [("fsdp async", [1], 1), *LONG])
def test_a_run_killed_at_random_ends_with_the_same_weights(
    undisturbed, data, tmp_path, layout, ranks, kills
):
    chance = random.Random(f"{layout} {ranks}")
    for folder in kill_at_random(tmp_path, data, layout, ranks, kills, chance):
        check_equal(folder, undisturbed(layout))


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
def test_workers_end_with_a_torchrun_that_was_killed(undisturbed, data, tmp_path, layout):
    folder, chance = tmp_path / "out", random.Random(layout)
    for attempt in range(4):
        marker = f"LASP_TEST_KILLED_{os.getpid()}_{attempt}"
        os.environ[marker] = "1"
        try:
            process = start(arguments(folder, data, **LAYOUTS[layout]), 2)
        finally:
            del os.environ[marker]
        for line in process.stdout:
            if line.startswith("step: "):
                break
        time.sleep(chance.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        output = line + process.stdout.read()
        process.wait()
        deadline = time.monotonic() + 30
        while with_variable(marker) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = with_variable(marker)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert left == [], output
        check_checkpoints(folder, output)
    finish(tmp_path / "logs", arguments(folder, data, **LAYOUTS[layout]))
    check_equal(folder, undisturbed(layout))


# Each start but the last is killed after one more step.
RESTARTS = """
import os, signal, sys
from launch import train
from launch.trainer import train_step

number, last = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), {restarts}

def struck(state):
    if number < last and state.step == number + 1 and os.environ["RANK"] == str(number % 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(state)

train.train_step = struck
code = train.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


@pytest.mark.faults
@pytest.mark.timeout(3700)
def test_torchrun_restarts_a_run_twenty_times_with_no_variable_set(
    undisturbed, data, tmp_path, monkeypatch
):
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    script, folder, restarts = tmp_path / "restarts.py", tmp_path / "out", 20
    script.write_text(RESTARTS.format(restarts=restarts))
    argv = arguments(folder, data, checkpoint__interval=1, **LAYOUTS["cp sync"])
    process = start(argv, 2, script, torchrun=("--max_restarts", str(restarts)))
    output = output_of(process, 3600)
    assert process.returncode == 0, output
    assert output.count("resume:      ") == restarts + 1, output
    check_equal(folder, undisturbed("cp sync"))


@pytest.mark.parametrize("restarts", [1, pytest.param(20, marks=pytest.mark.faults)])
def test_a_start_in_the_store_of_a_killed_one_meets_none_of_its_addresses(data, tmp_path, restarts):
    # What torchrun's restarts do: another start, with all that the store holds of those before.
    changes = dict(
        training__steps=restarts + 2, checkpoint__interval=1, comm__train_timeout_seconds=6
    )
    argv = arguments(tmp_path / "out", data, **changes, **LAYOUTS["cp sync"])
    store = None
    for number in range(restarts):
        strikes = (Strike("forward", number + 1, number % 2, signal.SIGKILL),)
        job = Job(tmp_path / f"start-{number}", argv, strikes=strikes, store=store)
        store = job.store
        try:
            codes = job.wait(START)
        finally:
            job.end()
        assert sorted(codes) == [-signal.SIGKILL, HUNG], job.outputs()
        named = f"error: rank {number % 2} is stopped or dead"
        assert named in job.output(1 - number % 2), job.outputs()
    job = Job(tmp_path / "last", argv, store=store)
    try:
        assert job.wait(START) == [0, 0], job.outputs()
    finally:
        job.end()
    assert f"step-{restarts:08d}" in job.output(0).split("resume:")[1].splitlines()[0]
