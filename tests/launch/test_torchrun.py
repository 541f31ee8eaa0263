"""launch/torchrun.py and launch/slurm.sh: exit codes, signals, and which jobs are requeued."""

import os
import signal
import subprocess
import sys

import pytest

from launch.exit_codes import HUNG, REQUEUE
from tests.launch.runs import PATIENCE, ROOT

# Rank 0 takes its time after SIGTERM; rank 1 ends with the code that is wanted.
RANK = """
import os, signal, sys, time

def save(number, frame):
    time.sleep(0.5)
    print("saved by rank", os.environ["RANK"], flush=True)
    os._exit({code})

signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
{then}
time.sleep(600)
"""


def start(tmp_path, code, then=""):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(code=code, then=then))
    command = [sys.executable, "launch/torchrun.py", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, str(script)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_signals_reach_the_ranks_whose_code_is_that_of_the_job(tmp_path):
    process = start(tmp_path, REQUEUE)
    seen = ""
    while seen.count("ready") < 2:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == REQUEUE, output
    assert output.count("saved by rank") == 2


def test_a_rank_that_is_killed_is_reported_as_by_a_shell(tmp_path):
    then = "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)"
    process = start(tmp_path, HUNG, then)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGKILL, output


# Commands of Slurm on two hosts, and a Python that prints its arguments and returns a code by host.
STUBS = {
    "scontrol": """
        if [ "$1" = show ]; then printf 'localhost\\nnode2\\n'; else echo "scontrol $*"; fi
    """,
    "srun": """
        echo "srun $1"; shift; worst=0
        for host in 0 1; do
            SLURM_NODEID=$host "$@"; code=$?
            [ $code -gt $worst ] && worst=$code
        done
        exit $worst
    """,
    "python": """
        echo "host $SLURM_NODEID: $*"
        set -- $CODES
        [ "$SLURM_NODEID" = 0 ] || shift
        exit $1
    """,
}


def slurm(tmp_path, codes, **variables):
    """(exit code, output) of launch/slurm.sh where the hosts' torchruns return `codes`."""
    for name, text in STUBS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": "python",
        "CODES": " ".join(map(str, codes)),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        **variables,
    }
    command = ["bash", "launch/slurm.sh", "--job.config_file", "a run.toml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_slurm_starts_torchrun_on_each_host(tmp_path):
    code, output = slurm(tmp_path, (0, 0))
    assert code == 0 and "scontrol requeue" not in output
    for number in (0, 1):
        wanted = (
            f"host {number}: launch/torchrun.py --nnodes 2 --node_rank {number} --nproc_per_node 8 "
            "--master_addr localhost --master_port 23456 --rdzv_conf timeout=300 launch/train.py "
            "--job.config_file a run.toml"
        )
        assert wanted in output.splitlines()


@pytest.mark.parametrize(
    ("codes", "code", "is_requeued"),
    [
        ((75, 75), 0, True),
        ((69, 69), 0, True),
        # The host that noticed first, and one whose torchrun had failed.
        ((69, 1), 0, True),
        ((73, 73), 73, False),
        ((74, 74), 74, False),
        ((72, 72), 72, False),
        ((1, 0), 1, False),
        ((143, 143), 143, False),
        # Killed on one host, such as for its memory.
        ((69, 137), 137, False),
    ],
)
def test_slurm_requeues_what_can_continue(tmp_path, codes, code, is_requeued):
    found, output = slurm(tmp_path, codes)
    assert found == code, output
    assert ("scontrol requeue 123456" in output.splitlines()) == is_requeued
    assert ("not requeued" in output or "failed" in output) != is_requeued


def test_slurm_gives_up_a_job_that_was_requeued_too_often(tmp_path):
    code, output = slurm(tmp_path, (69, 69), SLURM_RESTART_COUNT="20")
    assert code == 69 and "scontrol requeue" not in output
    assert "was requeued 20 times (MAX_REQUEUES)" in output


def test_slurm_names_a_host_that_does_not_resolve(tmp_path):
    stub = STUBS["scontrol"].replace("localhost", "no-such-host.invalid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUBS, "scontrol", stub)
        code, output = slurm(tmp_path, (0, 0))
    assert code == 73, output
    assert "cannot resolve no-such-host.invalid, the first host of the job" in output
