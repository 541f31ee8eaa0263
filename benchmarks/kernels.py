"""Lightning attention on one GPU: correctness first, then time against the memory roofline.

    python benchmarks/kernels.py                       # everything; a few minutes
    python benchmarks/kernels.py --shapes 1,131072,16,128 --only lasp

One run measures everything, baselines and copy bandwidth included. With --shapes, the rest of the
last run is kept, apart from the errors unless --no-errors is given. A fraction is

    (least traffic / time) / copy bandwidth

where the least traffic is 4 units forward (q, k, v in, o out) and 7 backward (q, k, v, do in; dq,
dk, dv out), and a unit is B*T*H*d values of two bytes. Baselines that are not installed are left
out. Writes a JSON file, a Markdown table and a chart.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import baselines
import kernels_report
import resume
import torch
import versions

import lasp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).parent / "results"
# (B, T, H, D, E) of the table. The chart takes its lengths from these.
SHAPES = (
    (1, 131072, 16, 128, 128),
    (1, 1048576, 16, 128, 128),
    (8, 2048, 32, 128, 128),
    (2, 8192, 32, 128, 128),
    (1, 32768, 32, 64, 64),
    (1, 65536, 64, 128, 128),
    (1, 32768, 32, 96, 96),
    (1, 2048, 16, 128, 128),
    (1, 131072, 16, 256, 128),
    (1, 32768, 16, 256, 256),
    (1, 8192, 16, 128, 128),
    (1, 32768, 16, 128, 128),
    (1, 131071, 16, 128, 128),
    (1, 262144, 16, 128, 128),
    (1, 524288, 16, 128, 128),
)
# lasp alone: time per token with enough heads to fill a GPU at every length.
MANY_HEADS = tuple((4, T, 16, 128, 128) for T in (8192, 32768, 131072, 262144))
# (D, E) of the table of errors, each with every decay and dtype.
ERROR_SIZES = ((32, 32), (64, 64), (96, 96), (128, 128), (256, 128), (256, 256))
# Layers of a 24-layer TNL: strong decay, medium, next to none.
LAYERS = {"first": 0, "middle": 12, "last": 23}


@dataclass
class Row:
    """One implementation at one shape."""

    name: str
    shape: tuple[int, ...]
    decay: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_fraction: float | None = None
    backward_fraction: float | None = None
    # From call to call: includes the host, where that is slower than the GPU.
    forward_call_ms: float | None = None
    backward_call_ms: float | None = None
    extra_units: float | None = None
    error: float | None = None
    note: str = ""


def implementations(shape, only: str | None) -> dict[str, Callable]:
    """name -> function(q, k, v, log_decay) -> o, with the baselines that are installed."""
    found = {"lasp": lambda q, k, v, g: lasp.lightning_attention(q, k, v, g)}
    return found if only == "lasp" or shape in MANY_HEADS else found | baselines.find(shape)


def make_inputs(shape, decay: str, seed=0, dtype=torch.bfloat16):
    """q, k, v, do, and the decay: a TNL layer's, or "token", one per token that has the mean of the
    middle layer's."""
    B, T, H, D, E = shape
    generator = torch.Generator(device=DEVICE).manual_seed(seed)

    def normal(size, spread):
        x = torch.randn(B, T, H, size, device=DEVICE, dtype=dtype, generator=generator)
        return x.mul_(spread)

    q, k, v, do = normal(D, 0.25), normal(D, 0.25), normal(E, 1.0), normal(E, 1.0)
    log_decay = lasp.decay.tnl(H, LAYERS["middle" if decay == "token" else decay], 24).to(DEVICE)
    if decay == "token":
        log_decay = 2 * torch.rand(B, T, H, device=DEVICE, generator=generator) * log_decay
    return q, k, v, do, log_decay


def time_ms(function: Callable[[], object], seconds=0.2) -> float:
    """Median GPU time of a call, with cold caches, as between other work. On a CPU, to try a
    benchmark, the time of one call."""
    if DEVICE.type == "cpu":
        function()
        begun = time.perf_counter()
        function()
        return (time.perf_counter() - begun) * 1000
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    repeats = max(5, min(100, int(1000 * seconds / max(start.elapsed_time(stop), 1e-3))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        flush.zero_()
        # The GPU sleeps while the host queues ahead, so that no launch is part of the time.
        torch.cuda._sleep(2_000_000)
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def call_ms(function: Callable[[], object], repeats=300) -> float:
    """Time from call to call: the slower of host and GPU."""
    for _ in range(20):
        function()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1000 / repeats


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device-to-device copy."""
    size = 2**32 if DEVICE.type == "cuda" else 2**20
    source = torch.empty(size, dtype=torch.int8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_ms(lambda: target.copy_(source)) / 1000)


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Memory that a call needs at its peak, beyond what there is; None on a CPU."""
    if DEVICE.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def least_bytes(shape) -> tuple[int, int]:
    """Least traffic of a forward and of a backward."""
    B, T, H, D, E = shape
    per_token = 2 * B * T * H
    return per_token * (2 * D + 2 * E), per_token * (4 * D + 3 * E)


def worst_error(function, shape, decay, dtype=torch.bfloat16, *, backward=True) -> float:
    """Largest relative error of o, dq, dk, dv against float64, over at most 2,048 tokens; without
    `backward`, that of o."""
    B, T, H, D, E = shape
    short = (1, min(T, 2048), H, D, E)
    q, k, v, do, log_decay = make_inputs(short, decay, seed=1, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = function(*leaves, log_decay)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o_exact, _ = lasp.reference.quadratic(*exact, log_decay.double())
    pairs = [(o, o_exact)]
    if backward:
        o.backward(do)
        o_exact.backward(do.double())
        pairs += [(a.grad, b.grad) for a, b in zip(leaves, exact, strict=True)]
    pairs = [(a.detach().double(), b.detach()) for a, b in pairs]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def measure(name, function, shape, decay, bandwidth) -> Row:
    """Error, times, fractions and memory of one implementation."""
    row = Row(name, shape, decay)
    try:
        # First what a baseline that refuses its backward still has.
        row.error = worst_error(function, shape, decay, backward=False)
        q, k, v, do, log_decay = make_inputs(shape, decay)
        # A decay per token has a gradient, a constant one has none.
        leaves = [x.requires_grad_() for x in (q, k, v, *([log_decay] if decay == "token" else []))]
        forward = functools.partial(function, q, k, v, log_decay)
        row.forward_ms = time_ms(forward)
        row.error = worst_error(function, shape, decay)
        o = forward()
        backward = functools.partial(torch.autograd.grad, o, leaves, do, retain_graph=True)
        row.backward_ms = time_ms(backward)
        if row.forward_ms < 0.2 and DEVICE.type == "cuda":
            row.forward_call_ms = call_ms(forward)
            row.backward_call_ms = call_ms(backward)
        del o, backward
        B, T, H, D, E = shape
        peak = peak_bytes(lambda: torch.autograd.grad(forward(), leaves, do))
        row.extra_units = None if peak is None else peak / (B * T * H * (D + E))
        forward_bytes, backward_bytes = least_bytes(shape)
        row.forward_fraction = forward_bytes / (row.forward_ms / 1000) / bandwidth
        row.backward_fraction = backward_bytes / (row.backward_ms / 1000) / bandwidth
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    except Exception as error:
        # A baseline that cannot run a shape must not end the run.
        if name == "lasp":
            raise
        row.note = f"{type(error).__name__}: {error}"[:120]
    torch.cuda.empty_cache()
    return row


def measure_step(bandwidth) -> dict:
    """One decoding step: the state is read and written once."""
    B, H, D = 64, 32, 128
    q, k, v = (torch.randn(B, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    state = torch.randn(B, H, D, D, device="cuda")
    log_decay = lasp.decay.tnl(H, 12, 24).cuda()
    ms = time_ms(lambda: lasp.lightning_attention_step(q, k, v, state, log_decay))
    return {"ms": ms, "fraction": 2 * state.numel() * 4 / (ms / 1000) / bandwidth}


def measure_packed() -> dict:
    """Log-normal documents of mean 2048 in 131,072 tokens against one document."""
    shape = (1, 131072, 16, 128, 128)
    q, k, v, do, log_decay = make_inputs(shape, "middle")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(1024, generator=generator) + 7.12).long().clamp_min(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    offsets = torch.cat([offsets[offsets < shape[1]], torch.tensor([shape[1]])]).int()
    result = {"documents": offsets.numel() - 1}
    for name, cu_seqlens in (("dense", None), ("packed", offsets)):
        call = lambda c=cu_seqlens: lasp.lightning_attention(*leaves, log_decay, cu_seqlens=c)  # noqa: E731
        o = call()
        result[name] = {
            "forward_ms": time_ms(call),
            "backward_ms": time_ms(
                lambda o=o: torch.autograd.grad(o, leaves, do, retain_graph=True)
            ),
        }
    return result


def measure_graph() -> dict:
    """A launch-bound call under a CUDA graph: its time without the host."""
    q, k, v, do, log_decay = make_inputs((1, 2048, 16, 128, 128), "middle")
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        return lasp.lightning_attention(*leaves, log_decay)

    def both():
        return torch.autograd.grad(forward(), leaves, do)

    result = {}
    for name, function in (("forward_ms", forward), ("forward_backward_ms", both)):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        result[name] = call_ms(graph.replay)
    return result


def measure_errors(only: str | None) -> list[dict]:
    """Errors of lasp and of the first baseline on the same inputs, by size, decay and dtype."""
    found = []
    for size in ERROR_SIZES:
        shape = (1, 2048, 8, *size)
        functions = list(implementations(shape, only).items())[:2]
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for decay in LAYERS:
                row = {"size": size, "dtype": str(dtype).removeprefix("torch."), "decay": decay}
                for name, function in functions:
                    with baselines.untuned():
                        try:
                            row[name] = worst_error(function, shape, decay, dtype)
                        except Exception as error:
                            if name == "lasp":
                                raise
                            row[name] = None
                            print(f"{name} at {row}: {type(error).__name__}: {error}"[:200])
                found.append(row)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="*", help="B,T,H,D or B,T,H,D,E; default: the table's")
    parser.add_argument("--decays", nargs="*", choices=LAYERS, default=["middle"])
    parser.add_argument("--only", choices=["lasp"], help="leave the baselines out")
    parser.add_argument("--no-errors", action="store_true", help="leave the table of errors out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


def begin(arguments: argparse.Namespace) -> dict:
    """What this run keeps of the last one; nothing of another GPU or version."""
    head = {
        "device": torch.cuda.get_device_name(),
        "versions": versions.installed("torch", "triton", "fla-core"),
    }
    before = None
    if arguments.shapes:
        before = resume.earlier_report(arguments.out / "kernels.json", head, head)
    if before is None:
        return head | {"errors": [], "rows": []}
    return before | ({} if arguments.no_errors else {"errors": []})


def replaced(rows: list[dict], measured: list[dict]) -> list[dict]:
    """The rows with those just measured in place of the old ones of their case, or at the end."""

    def case(row):
        return tuple(row["shape"]), row["decay"], row["name"]

    new = {case(row): row for row in measured}
    kept = [new.pop(case(row), row) for row in rows]
    return kept + list(new.values())


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a CUDA GPU; this machine has none.")
    arguments = parse_arguments()
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shapes or []]
    shapes = shapes or [*SHAPES, *MANY_HEADS]
    shapes = [s if len(s) == 5 else (*s, s[3]) for s in shapes]
    if arguments.only != "lasp":
        if not baselines.find(shapes[0]):
            print("fla-core is not installed: its rows are left out.")
        baselines.compile_ahead([shape for shape in shapes if shape not in MANY_HEADS])
    bandwidth = copy_bandwidth()
    report = begin(arguments)
    if not report["rows"]:
        report["step"] = measure_step(bandwidth)
        report |= {"packed": measure_packed(), "graph": measure_graph()}
    run = {"date": datetime.date.today().isoformat(), "copy_bandwidth": bandwidth}
    for shape in shapes:
        for decay in arguments.decays:
            measured = []
            for name, function in implementations(shape, arguments.only).items():
                row = measure(name, function, shape, decay, bandwidth)
                measured.append(dataclasses.asdict(row) | {"shape": list(shape)} | run)
                print(json.dumps(measured[-1]), flush=True)
            report["rows"] = replaced(report["rows"], measured)
        # After every shape, so that an interrupted run keeps its rows.
        kernels_report.write(report, arguments.out)
    # Last, because it leaves the baselines with untuned variants.
    if not arguments.no_errors:
        report["errors"] = measure_errors(arguments.only)
        kernels_report.write(report, arguments.out)
    print(kernels_report.table(report))


if __name__ == "__main__":
    main()
