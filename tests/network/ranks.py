"""The ranks of one host without torchrun, for a quick test: one import of the launcher, then forks.

python -m tests.network.ranks FIRST COUNT SIZE MASTER_ADDR MASTER_PORT ARGUMENTS...
"""

import os
import sys

from launch import train


def main(first: int, count: int, size: int, address: str, port: str, *arguments: str) -> int:
    """Run ranks `first` to `first + count - 1` of `size`; the largest exit code. Rank 0 holds the
    store."""
    children = []
    for local_rank in range(count):
        if pid := os.fork():
            children.append(pid)
            continue
        os.environ.update(
            RANK=str(first + local_rank),
            LOCAL_RANK=str(local_rank),
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR=address,
            MASTER_PORT=port,
        )
        code = 1
        try:
            code = train.main(list(arguments))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in children)


if __name__ == "__main__":
    first, count, size, address, port, *arguments = sys.argv[1:]
    sys.exit(main(int(first), int(count), int(size), address, port, *arguments))
