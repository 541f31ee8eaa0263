"""torchrun that exits with the code of its ranks and hands signals on to them.

    python launch/torchrun.py --nproc_per_node 8 launch/train.py --job.config_file run.toml

All arguments are torchrun's. torchrun itself exits with 1 whatever its ranks return, so a scheduler
cannot tell a job that wants to be started again (75) from one that cannot run (73); and after a
SIGTERM it kills its ranks within 30 seconds, in the middle of a step or of a checkpoint. Here
SIGTERM, SIGINT and SIGHUP go to the ranks, which save and end (launch/train.py). SIGQUIT ends all
at once.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What torchrun keeps handling in its own way.
_TORCHRUNS = "SIGQUIT"


def main(argv: list[str]) -> int:
    """Run torchrun's command line; the exit code of the rank that failed first, or 0."""
    # Releases of torch read the one or the other.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _TORCHRUNS
    arguments = parse_args(argv)
    arguments.signals_to_handle = _TORCHRUNS
    for number in _HANDED_ON:
        # A process started by nohup ignores SIGHUP, and goes on doing so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _hand_on)
    try:
        run(arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        _, failure = error.get_first_failure()
        # Of a rank that a signal ended: as shells report it.
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


def _hand_on(number, frame) -> None:
    for listed in Path("/proc/self/task").glob("*/children"):
        for pid in listed.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
