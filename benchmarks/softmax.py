"""Softmax attention over any number of GPUs: correctness first, then time beside torch's own.

    python benchmarks/softmax.py                                  # one GPU
    torchrun --nproc_per_node 2 benchmarks/softmax.py --tokens 65536,262144
    python benchmarks/softmax.py --tokens 64 --heads 2 --head-size 16    # on a CPU, to see it work

`--tokens` counts the global sequence. "torch" is `scaled_dot_product_attention` of all of it on one
GPU, in the same run. TFLOP/s are per GPU: 2 D FLOPs per score and per value of the causal half, and
2.5 times as many in the backward. Times are medians of three rounds, of the slowest rank.
Prints a table, and writes JSON with --json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import lasp

# Largest relative error allowed for sums of bfloat16 products.
ERROR = 2e-2


def make(tokens, arguments, group, layout, dtype):
    """(q, k, v, do) of this rank, and its shard; the same sequence for any number of ranks."""
    shard = lasp.SequenceShard.split(tokens, group, layout=layout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = (arguments.heads, arguments.key_heads, arguments.key_heads, arguments.heads)
    torch.manual_seed(0)
    inputs = []
    for each in heads:
        full = torch.randn(1, tokens, each, arguments.head_size, device=device, dtype=dtype)
        inputs.append(shard.take(full).contiguous())
    return inputs, shard


def lasp_softmax(inputs, shard):
    q, k, v, do = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = dict(group=shard.group, layout=shard.layout, shard_lengths=shard.lengths)
    o = lasp.softmax_attention(*leaves, **options)
    return o, lambda: torch.autograd.grad(o, leaves, do)


def torch_alone(inputs, shard):
    q, k, v, do = (x.transpose(1, 2) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=q.shape != k.shape)
    return o, lambda: torch.autograd.grad(o, leaves, do)


def slowest(seconds, group):
    """The maximum over ranks, so that all ranks decide alike."""
    if group is None:
        return seconds
    longest = torch.tensor([seconds], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    return longest.item()


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_ms(function, group, budget=0.3):
    """Milliseconds of (forward, forward and backward), in back-to-back calls, so that the host runs
    ahead as in training. `function` returns the output and a function that runs the backward."""

    def run(repeats, with_backward):
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            _, backward = function()
            if with_backward:
                backward()
        synchronize()
        return (time.perf_counter() - began) / repeats

    times = []
    for with_backward in (False, True):
        run(1, with_backward)
        repeats = int(min(50, max(2, budget / slowest(run(1, with_backward), group))))
        rounds = [run(repeats, with_backward) for _ in range(3)]
        times.append(1e3 * slowest(statistics.median(rounds), group))
    return times


def check(arguments, group, layout, dtype):
    """Exit if the operator is wrong on these ranks, else return the largest relative error."""
    tokens = 2 * 480 * (1 if group is None else dist.get_world_size(group))
    inputs, shard = make(tokens, arguments, group, layout, dtype)
    o, backward = lasp_softmax(inputs, shard)
    actual = [o, *backward()]
    q, k, v, do = (x.double() for x in make(tokens, arguments, None, "contiguous", dtype)[0])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    truth = lasp.reference.softmax(*leaves)
    wanted = [truth, *torch.autograd.grad(truth, leaves, do)]
    errors = [
        ((a.double() - shard.take(w)).norm() / w.norm()).item()
        for a, w in zip(actual, wanted, strict=True)
    ]
    if not max(errors) < ERROR:
        raise SystemExit(f"{layout}: errors of o, dq, dk, dv are {errors}, more than {ERROR}")
    return max(errors)


def measure(tokens, arguments, group, dtype):
    """Rows of the table for one length."""
    size = 1 if group is None else dist.get_world_size(group)
    kinds = {
        "torch, one GPU": (torch_alone, None, "contiguous"),
        "lasp": (lasp_softmax, group, "contiguous"),
    }
    if group is not None:
        kinds["lasp, zigzag"] = (lasp_softmax, group, "zigzag")
    rows = []
    for name, (function, over, layout) in kinds.items():
        inputs, shard = make(tokens, arguments, over, layout, dtype)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        forward, both = time_ms(functools.partial(function, inputs, shard), group)
        flops = 2 * arguments.heads * arguments.head_size * tokens * (tokens + 1)
        per_ms = flops / (1 if over is None else size) / 1e9
        row = {"tokens": tokens, "ranks": 1 if over is None else size, "what": name}
        row |= {"forward_ms": forward, "forward_backward_ms": both}
        row |= {"forward_tflops": per_ms / forward, "forward_backward_tflops": 3.5 * per_ms / both}
        if torch.cuda.is_available():
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.key_heads = arguments.key_heads or arguments.heads
    group = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        group = dist.group.WORLD
    first = group is None or dist.get_rank() == 0
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    errors = {layout: check(arguments, group, layout, dtype) for layout in ("contiguous", "zigzag")}
    if first:
        print(f"{device}, torch {torch.__version__}, {dtype}; worst relative errors {errors}")
        print(f"{'tokens':>9}  {'what':<16}  forward ms (TFLOP/s)  and backward ms (TFLOP/s)")
    rows = []
    for tokens in map(int, arguments.tokens.split(",")):
        for row in measure(tokens, arguments, group, dtype):
            rows.append(row)
            if first:
                forward = f"{row['forward_ms']:.2f} ({row['forward_tflops']:.0f})"
                both = f"{row['forward_backward_ms']:.2f} ({row['forward_backward_tflops']:.0f})"
                print(f"{tokens:>9}  {row['what']:<16}  {forward:<20}  {both}", flush=True)
        if first and arguments.json is not None:
            head = {"device": device, "torch": torch.__version__, "errors": errors}
            arguments.json.write_text(json.dumps(head | {"rows": rows}, indent=1))
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
