"""A rank that is stopped or hangs: the others end in time, name it, and show their stacks."""

import itertools
import re
import signal
import time

import pytest

from launch.exit_codes import HUNG
from tests.faults.jobs import START, Job, Strike
from tests.launch.runs import flags

# Seconds. They are the bars too: the others end this long after the strike, plus what it takes to
# establish that a rank is silent, and to write stacks on a loaded machine.
TRAIN, INIT, SLACK = 6, 12, 25


def arguments(folder, data, **changes):
    wanted = dict(
        job__dump_folder=folder,
        data__source="folder",
        data__folder=data,
        training__steps=6,
        checkpoint__interval=3,
        validation__freq=3,
        sample__enable=None,
        comm__train_timeout_seconds=TRAIN,
        comm__init_timeout_seconds=INIT,
    )
    values = flags(**(wanted | changes))
    return [value.replace("--sample.enable", "--sample.no_enable") for value in values]


LAYOUTS = {
    "cp": dict(parallelism__context_parallel_degree=2),
    "ddp": dict(parallelism__data_parallel_method="ddp"),
    "fsdp": dict(parallelism__data_parallel_method="fsdp"),
}
# (moment, step after which the rank is struck, the limit that applies, what the message says).
MOMENTS = [
    ("set-up", 0, INIT, "set-up"),
    ("building the model", 0, INIT, "set-up"),
    ("reading data", 2, TRAIN, "step 3, reading data"),
    ("forward", 2, TRAIN, "step 3, forward and backward"),
    ("backward", 2, TRAIN, "step 3, forward and backward"),
    ("reduction", 2, TRAIN, "step 3, reduction"),
    ("save", 3, INIT, "step 3, saving a checkpoint"),
    ("end of a save", 3, INIT, "step 3, saving a checkpoint"),
    ("validation", 3, INIT, "step 3, validation"),
]
QUICK = ("cp", MOMENTS[4], 1)
CASES = [
    pytest.param(
        *case,
        marks=() if case == QUICK else pytest.mark.faults,
        id=f"{case[0]}-{case[1][0]}-rank {case[2]}",
    )
    for case in itertools.product(LAYOUTS, MOMENTS, (0, 1))
]


@pytest.mark.parametrize(("layout", "moment", "rank"), CASES)
def test_a_stopped_rank_is_named_and_the_others_end_in_time(data, tmp_path, layout, moment, rank):
    name, step, limit, where = moment
    strike = Strike(name, step, rank, signal.SIGSTOP)
    out = tmp_path / "out"
    job = Job(tmp_path / "logs", arguments(out, data, **LAYOUTS[layout]), strikes=(strike,))
    other = 1 - rank
    try:
        assert job.wait_for("strike: ", rank), job.outputs()
        codes = job.wait(START, [other])
        seconds = time.time() - float(job.output(rank).split("strike: ")[1].split()[0])
    finally:
        job.end()
    output = job.output(other)
    assert codes[other] == HUNG, job.outputs()
    assert seconds < limit + SLACK, output
    print(f"ended {seconds:.1f} s after the strike, with a limit of {limit} s")
    assert re.search(rf"error: rank {rank} is stopped or dead: it was last seen in {where}", output)
    assert f"rank {other} waited in " in output and "Traceback" not in output
    stacks = (out / "stacks" / f"rank-{other}.txt").read_text()
    assert "launch/train.py" in stacks


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moment", ["reading data", "reduction", "save", "validation"])
def test_a_rank_that_hangs_alive_is_named_and_shows_where(data, tmp_path, layout, moment):
    step = 3 if moment in ("save", "validation") else 2
    out, strike = tmp_path / "out", Strike(moment, step, 1, number=0)
    job = Job(tmp_path / "logs", arguments(out, data, **LAYOUTS[layout]), strikes=(strike,))
    try:
        codes = job.wait(START)
    finally:
        job.end()
    assert codes == [HUNG] * 2, job.outputs()
    for rank in (0, 1):
        reason = "error: rank 1 hangs in step 3, "
        assert reason in job.output(rank), job.outputs()
    assert "jobs.py" in (out / "stacks" / "rank-1.txt").read_text(), "its stack ends in the strike"
