"""What a caller of the eager operator waits for: wall time of forward and backward in a loop.

    python benchmarks/eager.py                               # one GPU, half a minute
    torchrun --nproc_per_node 2 benchmarks/eager.py          # over ranks
    python benchmarks/eager.py --cold                        # the first calls of a process

Beside it, in the same run: softmax attention (torch's SDPA) and an autograd function that allocates
and does nothing else. A time is the median over rounds of calls that end in a synchronisation; the
best round is kept too. Updates benchmarks/results/eager.json with the parts that ran.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import eager_report
import torch
import torch.distributed as dist
import torch.nn.functional as F
import versions

import lasp

RESULTS = Path(__file__).parent / "results"
# B, T, H, D; over ranks T is that of each rank.
SHAPES = ((1, 1024, 16, 128), (1, 4096, 16, 128), (4, 2048, 16, 128), (1, 32768, 16, 128))
RANK_LENGTHS = (1024, 4096, 32768)
ROUNDS, CALLS = 7, 200
# SDPA takes 28 ms at 32,768 tokens.
MOST_SOFTMAX_TOKENS = 8192


class Nothing(torch.autograd.Function):
    """Allocates what the operator returns."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(v)

    @staticmethod
    def backward(ctx, do):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def wall_time(function: Callable[[], object], calls: int, group=None) -> dict[str, float]:
    """Milliseconds per call: the median and the best of the rounds."""
    for _ in range(20):
        function()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        if group is not None:
            dist.barrier(group)
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return {"median": statistics.median(times), "best": min(times)}


def make_inputs(B: int, T: int, H: int, D: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v that need gradients, and log_decay."""
    options = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    qkv = [torch.randn(B, T, H, D, **options) for _ in range(3)]
    return qkv, lasp.decay.tnl(H, 12, 24).cuda()


def both(function: Callable[..., torch.Tensor], qkv: list[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward of function(q, k, v)."""
    do = torch.randn_like(qkv[2])

    def call():
        return torch.autograd.grad(function(*qkv), qkv, do)

    return call


def on_one_gpu() -> list[dict]:
    rows = []
    for shape in SHAPES:
        qkv, log_decay = make_inputs(*shape)
        heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv]
        functions = {
            "lasp": both(partial(lasp.lightning_attention, log_decay=log_decay), qkv),
            "nothing": both(Nothing.apply, qkv),
        }
        if shape[0] * shape[1] <= MOST_SOFTMAX_TOKENS:
            softmax = partial(F.scaled_dot_product_attention, is_causal=True)
            functions["softmax"] = both(softmax, heads_first)
        row = {"shape": shape} | {n: wall_time(f, CALLS) for n, f in functions.items()}
        rows.append(row)
        print(row, flush=True)
    return rows


def over_ranks(group) -> list[dict]:
    rows = []
    for length in RANK_LENGTHS:
        qkv, log_decay = make_inputs(1, length, 16, 128)
        row = {"tokens_per_rank": length}
        for name in ("no group", "ring", "all_gather"):
            options = {} if name == "no group" else dict(group=group, exchange=name)
            attention = partial(lasp.lightning_attention, log_decay=log_decay, **options)
            row[name] = wall_time(both(attention, qkv), CALLS // 2, group)
        rows.append(row)
        if dist.get_rank() == 0:
            print(row, flush=True)
    return rows


# Prints the seconds from the start of the process to each step.
COLD = """
import time, json, sys
start = time.perf_counter()
import torch, lasp
seconds = {"import": time.perf_counter() - start}
for name, length in (("first forward and backward", 8192), ("another length", 16384)):
    torch.cuda.synchronize()
    before = time.perf_counter()
    q, k, v = (torch.randn(1, length, 16, 128, device="cuda", dtype=torch.bfloat16,
                           requires_grad=True) for _ in range(3))
    o = lasp.lightning_attention(q, k, v, lasp.decay.tnl(16, 12, 24).cuda())
    torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - before
print(json.dumps(seconds))
"""


def cold_start() -> dict[str, dict[str, float]]:
    """Seconds of the first calls of a process: with an empty cache of kernels, and a full one."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "full cache"):
            command = [sys.executable, "-c", COLD]
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            output = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout
            found[name] = json.loads(output.splitlines()[-1])
            print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cold", action="store_true", help="the first calls of a process instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.out / "eager.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        report["ranks"] = {"size": dist.get_world_size(), "rows": over_ranks(dist.group.WORLD)}
        is_first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not is_first:
            return
    elif arguments.cold:
        report["cold"] = cold_start()
    else:
        report["one"] = on_one_gpu()
    report |= {
        "device": torch.cuda.get_device_name(),
        "versions": versions.installed("torch", "triton"),
        "date": str(datetime.date.today()),
    }
    eager_report.write(report, arguments.out)
    print(eager_report.table(report))


if __name__ == "__main__":
    main()
