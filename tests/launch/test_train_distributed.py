"""The launcher under torchrun: killed, stopped, resumed, and on other meshes."""

import signal

import pytest
import torch

from launch.checkpoint.store import CheckpointStore, verify
from tests.launch.runs import flags, losses, output_of, records, run_here, start

STEPS = 15
CP2 = dict(parallelism__context_parallel_degree=2)


def arguments(folder, data, **changes):
    wanted = dict(
        job__dump_folder=folder,
        data__source="folder",
        data__folder=data,
        training__steps=STEPS,
        checkpoint__interval=5,
        # All samples, so that they are the same for any number of ranks.
        validation__steps=1000,
        comm__train_timeout_seconds=120,
        comm__init_timeout_seconds=300,
    )
    return flags(**(wanted | changes))


def run(folder, data, nproc, **changes):
    process = start(arguments(folder, data, **changes), nproc)
    output = output_of(process)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """A run on two ranks that share each sequence."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder, data, 2, **CP2)


# Rank 1 is hit at a step and not at a time, so that a slow machine makes no difference.
STRIKES = """
import os, sys, time
from launch import train
from launch.checkpoint import save_resume
from launch.trainer import train_step
from launch.checkpoint.shards import write_shards

second = os.environ["RANK"] == "1"

def strikes(state):
    if second and state.step == {step}:
        os.kill(os.getpid(), {number})
    return train_step(state)

def write(files):
    if second and any("step-{unwritten:08d}" in str(path) for path in files):
        time.sleep(3600)
    return write_shards(files)

train.train_step, save_resume.write_shards = strikes, write
code = train.main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def interrupt(folder, data, step, number, unwritten=0, **changes):
    """The output of a run in which rank 1 gets a signal after `step` steps, and never writes its
    part of the checkpoint `unwritten`."""
    script = folder.parent / "strikes.py"
    script.write_text(STRIKES.format(step=step, number=int(number), unwritten=unwritten))
    process = start(arguments(folder, data, **CP2, **changes), 2, script)
    output = output_of(process)
    assert process.returncode != 0, output
    return output


def test_a_terminated_and_killed_run_ends_with_the_same_weights(undisturbed, data, tmp_path):
    folder = tmp_path / "out"
    store = CheckpointStore(folder / "checkpoint")

    output = interrupt(folder, data, 4, signal.SIGTERM)
    # The signal came in step 5, at the end of which all ranks learn of it.
    assert "stopped by a signal to another rank after step 5" in output, output
    assert "exitcode  : 75" in output, output
    assert store.steps()[-1] == 5

    output = interrupt(folder, data, 12, signal.SIGKILL)
    assert f"resume:      {folder}/checkpoint/step-00000005" in output, output
    assert "SIGKILL" in output or "-9" in output, output
    assert store.find("must")[0].step == 10

    output = run(folder, data, 2, **CP2)
    assert f"resume:      {folder}/checkpoint/step-00000010" in output
    reference, _ = undisturbed
    assert losses(folder) == losses(reference)
    last = f"checkpoint/step-{STEPS:08d}"
    for name in ("model", "optimizer"):
        mine, theirs = (verify(each / last).tensors(name) for each in (folder, reference))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_one_line_per_step_for_the_whole_job(undisturbed):
    folder, output = undisturbed
    lines = [line for line in output.splitlines() if line.startswith("step: ")]
    assert len(lines) == STEPS == len(losses(folder))
    assert "cp 2 x tp 1 = 2 processes (gloo, cpu" in output
    assert output.count("sample of step") == 1
    assert (folder / "loss.png").is_file()
    assert losses(folder)[STEPS] < 0.6 * losses(folder)[1]


@pytest.mark.slow
def test_a_hybrid_trains_on_two_ranks_as_on_one(data, tmp_path):
    """Softmax layers see all ranks' tokens: zigzag, uneven, recomputed; and they generate."""
    hybrid = dict(
        model__layer_types="LS",
        model__num_key_value_heads=1,
        training__steps=10,
        training__seq_len=102,
        activation_checkpoint__mode="full",
    )
    zigzag = dict(parallelism__context_parallel_layout="zigzag")
    output = run(tmp_path / "two", data, 2, **CP2, **hybrid, **zigzag)
    assert "2 ranks (ring, zigzag)" in output
    assert "1 of the layers softmax" in output and output.count("sample of step") == 1
    assert run_here(tmp_path / "one", data, **hybrid) == 0
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-5)
    assert expected[10] < 0.9 * expected[1]


def test_resume_on_another_number_of_ranks(undisturbed, data, tmp_path):
    """Two ranks on one sequence to the middle; then two ranks on a sequence each."""
    reference, _ = undisturbed
    middle = reference / "checkpoint" / f"step-{STEPS - 5:08d}"
    output = run(tmp_path / "out", data, 2, checkpoint__resume=middle)
    assert f"resume:      {middle}" in output
    expected = {step: loss for step, loss in losses(reference).items() if step > STEPS - 5}
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_killed_while_sharded_weights_are_written_in_the_background(undisturbed, data, tmp_path):
    """Two ranks hold half of the weights each; one is killed before its half is written."""
    folder = tmp_path / "out"
    sharded = dict(parallelism__data_parallel_method="fsdp", checkpoint__async_mode="async")
    output = interrupt(folder, data, 12, signal.SIGKILL, unwritten=10, **sharded)
    assert "checkpoint of step 10: copied" in output
    # Steps went on meanwhile.
    assert f"step: 12/{STEPS}" in output
    assert CheckpointStore(folder / "checkpoint").find("must")[0].step == 5
    output = run(folder, data, 2, **CP2, **sharded)
    assert f"resume:      {folder}/checkpoint/step-00000005" in output
    assert output.count("sample of step") == 1
    reference, _ = undisturbed
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-5)
    assert records(folder)[-1]["val_loss"] == pytest.approx(
        records(reference)[-1]["val_loss"], rel=1e-5
    )


# Rank 1 raises an unexpected exception, and closing the group waits for other ranks, as NCCL's may.
BREAKS = """
import sys, time
import torch.distributed
from launch import train
from launch.trainer import train_step

def breaks(state):
    if state.step == 1 and state.ctx.rank == 1:
        raise RuntimeError("rank 1 broke")
    return train_step(state)

torch.distributed.destroy_process_group = lambda: time.sleep(3600)
train.train_step = breaks
sys.exit(train.main(sys.argv[1:]))
"""


def test_an_exception_on_one_rank_is_shown_and_ends_the_job_at_once(data, tmp_path):
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS)
    # Longer than the test waits: neither closing the group nor the other rank may be waited for.
    patient = arguments(tmp_path / "out", data, **CP2, comm__train_timeout_seconds=3600)
    process = start(patient, 2, script)
    output = output_of(process)
    assert process.returncode != 0
    assert "error: rank 1 of 2 on " in output and "RuntimeError: rank 1 broke" in output, output
    # torchrun kills a rank that does not end by itself.
    assert "exitcode  : 1 " in output, output
    assert "in run_steps" in output, "the traceback says where"
