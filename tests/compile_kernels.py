"""Compile every variant of the Triton kernels for GPUs that need not be there.

    python -m tests.compile_kernels --chip sm_89             # about 1,000 variants, some minutes
    python -m tests.compile_kernels --kernel scan --dims 128 # for all chips

Prints a table of each variant's shared memory, registers and spilled bytes, and fails if one does
not compile or needs more shared memory than the chip has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import triton

from tests.lasp.ops.triton.compiler import TARGETS, Resources, compiling
from tests.lasp.ops.triton.launches import QUICK, Launch, all_launches


class Row(NamedTuple):
    """A compiled kernel; `resources` is None if it failed with `error`."""

    kernel: str
    variant: str
    hash: str
    resources: Resources | None = None
    error: str = ""


def compile_call(launch: Launch, chip: str) -> list[Row]:
    """What the call launches, compiled."""
    variant = " ".join(filter(None, (launch.dtype, launch.dims, launch.variant)))
    constants = dict(segment_length=launch.segment, MAX_FOLD=launch.max_fold)
    try:
        with compiling(TARGETS[chip], **constants) as results:
            launch.call()
    except Exception as error:
        return [Row(launch.kernel, variant, variant, error=f"{type(error).__name__}: {error}")]
    return [Row(each.name, variant, each.hash, Resources.of(each)) for each in results]


def _compile_number(task: tuple[int, str]) -> list[Row]:
    number, chip = task
    return compile_call(_launches()[number], chip)


_made: list[Launch] = []


def _launches() -> list[Launch]:
    if not _made:
        _made.extend(all_launches())
    return _made


def compile_all(chip: str, numbers: list[int], pool) -> Iterator[Row]:
    """Every distinct kernel of these launches."""
    seen = set()
    for rows in pool.imap(_compile_number, [(number, chip) for number in numbers]):
        for row in rows:
            if row.hash not in seen:
                seen.add(row.hash)
                yield row


def main() -> int:
    launches = _launches()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", action="append", choices=TARGETS, help="default: all")
    for name in ("kernel", "dtype", "dims"):
        choices = sorted({getattr(launch, name) for launch in launches} - {""})
        parser.add_argument(f"--{name}", action="append", choices=choices, help="default: all")
    parser.add_argument("--quick", action="store_true", help="those that need most, as make test")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--summary", action="store_true", help="print the largest only")
    options = parser.parse_args()
    numbers = [
        number
        for number, launch in enumerate(launches)
        if launch.kernel in (options.kernel or [launch.kernel])
        and launch.dtype in (options.dtype or [launch.dtype])
        and launch.dims in (options.dims or [launch.dims])
        and (not options.quick or launch[:4] in QUICK)
    ]
    failed = False
    # Not forked: Triton's compiler has threads.
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for chip in options.chip or TARGETS:
            failed |= print_table(chip, compile_all(chip, numbers, pool), options.summary)
    return int(failed)


def print_table(chip: str, rows: Iterator[Row], summary: bool) -> bool:
    """Print the rows of a chip and, per kernel, the largest figures; True if one does not fit."""
    target, largest, failed = TARGETS[chip], {}, 0
    print(f"{chip}, triton {triton.__version__}, {target.shared_memory:,} bytes of shared memory")
    head = ("shared", "registers", "spilled", "tensor memory")
    line = "{:24} {:48} {:>9} {:>9} {:>8} {:>13}".format
    print(line("kernel", "variant", *head))
    for row in rows:
        if row.resources is None:
            print(line(row.kernel, row.variant, *("-",) * 4), row.error)
            failed += 1
            continue
        too_large = row.resources.shared_memory > target.shared_memory
        failed += too_large
        if too_large or not summary:
            note = "TOO LARGE" if too_large else ""
            print(line(row.kernel, row.variant, *map(str, row.resources)), note, flush=True)
        count, most = largest.get(row.kernel, (0, (0,) * 4))
        largest[row.kernel] = count + 1, tuple(map(max, most, row.resources))
    for kernel, (count, most) in largest.items():
        print(line(kernel, f"largest of {count} variants", *map(str, most)))
    print(f"{failed} do not compile or do not fit\n", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
