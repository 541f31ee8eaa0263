"""torchrun on the GPUs of this host."""

import os
import subprocess
import sys

from tests.distributed import JOB_TIMEOUT
from tests.launch.runs import ROOT


def run(processes, script, *arguments):
    """What it printed, (stdout, stderr); AssertionError if it fails or takes too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), script, *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    late = ""
    try:
        out, err = process.communicate(timeout=JOB_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()
        # It gives the ranks 30 s before it kills them.
        out, err = process.communicate(timeout=60)
        late = f"{script} was not done in {JOB_TIMEOUT} s\n"
    assert process.returncode == 0 and not late, late + out[-2000:] + err[-6000:]
    return out, err
