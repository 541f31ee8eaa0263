"""Lightning attention over ranks: correctness first, then time against the same local work.

    torchrun --nproc_per_node 2 benchmarks/sequence_parallel.py
    torchrun --nproc_per_node 2 benchmarks/sequence_parallel.py --backend gloo --tokens 256 1024

Each rank holds `--tokens` tokens of one sequence. A time is the median over repeats of the slowest
rank's, by CUDA events, with all ranks synchronized before each repeat; `call` is the time from call
to call, host included. One run measures everything: the local work with no group, lasp, the
exchange alone beside NCCL's own all-gather, and, where fla-core is installed, two baselines:

    head all-to-all    each rank gets the full sequence for H/P heads, fla's kernel (Ulysses)
    states + fla       all-gather of states in plain torch, then fla's kernel from the incoming one

The files are written after every row, so that an interrupted run keeps its rows. `--profile` adds
how much of the communication ran under other kernels.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import baselines
import cost_model
import sequence_parallel_report as reports

import lasp
from lasp import exchange, ops, shard
from lasp.exchange import ChunkChain, Transition, consistency, symmetric_memory

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
STATE_SIZES_MIB = (0.25, 1, 4)
BY_TOKEN = reports.BY_TOKEN


class Ranks:
    """The ranks of the run, and how they measure time."""

    def __init__(self, backend: str) -> None:
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
        self.group = dist.group.WORLD
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        self.dtype = torch.bfloat16 if backend == "nccl" else torch.float32

    def without_memory(self) -> dist.ProcessGroup:
        """A group of all ranks that sends messages, even where peer memory is available."""
        group, before = dist.new_group(), os.environ.get("LASP_PEER_MEMORY")
        os.environ["LASP_PEER_MEMORY"] = "0"
        # A group reads the variable once, at its first exchange.
        x = torch.zeros(1, 1, 1, 1, device=self.device)
        lasp.lightning_attention(x, x, x, None, group=group)
        del os.environ["LASP_PEER_MEMORY"]
        if before is not None:
            os.environ["LASP_PEER_MEMORY"] = before
        return group

    def slowest(self, values: list[float]) -> list[float]:
        values = torch.tensor(values, device=self.device, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def time_ms(self, function: Callable[[], object], seconds: float) -> float:
        """Median over repeats of the slowest rank's time."""
        for _ in range(3):
            function()
        self._wait()
        begun = time.perf_counter()
        function()
        host_ms = 1000 * (time.perf_counter() - begun)
        host_ms, once = self.slowest([host_ms, self._once(function, 2 * host_ms)])
        repeats = int(max(5, min(50, 1000 * seconds / max(once, host_ms, 1e-3))))
        times = [self._once(function, 2 * host_ms) for _ in range(repeats)]
        return statistics.median(self.slowest(times))

    def line_up(self, ahead_ms: float) -> None:
        """Put the GPU to sleep while the host queues ahead, then wait for all ranks."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(2e6 * (ahead_ms + 1)))
        dist.all_reduce(torch.zeros(1, device=self.device))

    def _once(self, function, ahead_ms):
        if self.device.type == "cpu":
            self.line_up(0)
            begun = time.perf_counter()
            function()
            return (time.perf_counter() - begun) * 1000
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.line_up(ahead_ms)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def call_ms(self, function: Callable[[], object], repeats: int = 60) -> float:
        """Time from call to call: the slower of host and GPU."""
        for _ in range(5):
            function()
        self._wait()
        begun = time.perf_counter()
        for _ in range(repeats):
            function()
        self._wait()
        return self.slowest([(time.perf_counter() - begun) * 1000 / repeats])[0]

    def _wait(self):
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def variants(ranks: Ranks, methods: list[str]) -> dict[str, Attention]:
    """name -> lasp's attention on this rank's shard; the first is the local work with no group."""

    def one_call(**options):
        return lambda q, k, v, g: lasp.lightning_attention(q, k, v, g, **options)

    found = {"lasp, no group": one_call()}
    found |= {f"lasp {method}": one_call(group=ranks.group, exchange=method) for method in methods}
    if ranks.device.type == "cuda":
        found["lasp ring, messages"] = one_call(group=ranks.without_memory())
    found |= {
        f"lasp {method}, zigzag": one_call(group=ranks.group, exchange=method, layout="zigzag")
        for method in methods
    }
    found[f"lasp, no group{BY_TOKEN}"] = one_call()
    if "ring" in methods:
        found[f"lasp ring{BY_TOKEN}"] = one_call(group=ranks.group)
    return found


def make_inputs(ranks: Ranks, shape, name: str, seed: int = 0):
    """q, k, v, do of this rank, and the log decay of a TNL's middle layer: [H], or by `name` times
    2 u [B, T, H], u uniform."""
    generator = torch.Generator(device=ranks.device).manual_seed(seed)
    spreads = (0.25, 0.25, 1.0, 1.0)
    options = dict(device=ranks.device, dtype=ranks.dtype, generator=generator)
    q, k, v, do = (torch.randn(shape, **options).mul_(spread) for spread in spreads)
    log_decay = lasp.decay.tnl(shape[2], 12, 24).to(ranks.device)
    if name.endswith(BY_TOKEN):
        rand = torch.rand(shape[:3], device=ranks.device, generator=generator)
        log_decay = 2 * log_decay * rand
    return q, k, v, do, log_decay


def worst_error(ranks: Ranks, attention: Attention, name: str) -> float:
    """Largest relative error of this rank's o and gradients against float64, over all ranks."""
    total = 256 * ranks.size
    q, k, v, do, log_decay = make_inputs(ranks, (1, total, 16, 64), name, seed=1)
    layout = "zigzag" if "zigzag" in name else "contiguous"
    ranges = shard.token_ranges(total, ranks.size, ranks.rank, layout)
    here = torch.cat([torch.arange(*each) for each in ranges]).to(ranks.device)
    # A constant decay needs no gradient.
    sequences, constant = [q, k, v], [log_decay]
    if name.endswith(BY_TOKEN):
        sequences, constant = [q, k, v, log_decay], []
    if name.startswith("lasp, no group"):
        # Each rank's tokens are a sequence of their own.
        do, *sequences = (x[:, here] for x in (do, *sequences))
        here = slice(None)
    leaves = [x[:, here].clone().requires_grad_() for x in sequences]
    o = attention(*leaves, *constant)
    o.backward(do[:, here])
    exact = [x.double().requires_grad_() for x in sequences]
    o_exact, _ = lasp.reference.quadratic(*exact, *(x.double() for x in constant))
    o_exact.backward(do.double())
    pairs = [(o, o_exact), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    pairs = [(a.detach().double(), b.detach()[:, here]) for a, b in pairs]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return ranks.slowest([max(errors)])[0]


def measure(ranks: Ranks, name: str, attention: Attention, shape, seconds: float) -> dict:
    """Error and times of one implementation at [B, T, H, D] per rank."""
    row = {"name": name, "tokens": shape[1], "error": worst_error(ranks, attention, name)}
    q, k, v, do, log_decay = make_inputs(ranks, shape, name)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if name.endswith(BY_TOKEN):
        leaves.append(log_decay.requires_grad_())

    def forward():
        return attention(*leaves[:3], log_decay)

    def both():
        return torch.autograd.grad(forward(), leaves, do)

    row["forward_ms"] = ranks.time_ms(forward, seconds)
    row["both_ms"] = ranks.time_ms(both, seconds)
    if row["both_ms"] < 3:
        row["both_call_ms"] = ranks.call_ms(both)
    return row


def measure_exchanges(ranks: Ranks, methods: list[str], seconds: float) -> list[dict]:
    """Time of an exchange alone by method, layout and state size, and of NCCL's all-gather."""
    rows = []
    rings = ["ring, messages"]
    small = torch.zeros(1, device=ranks.device)
    buffer = symmetric_memory.find_buffer(ranks.group, small, ops.send_recv_state)
    # Over several hosts, a rank that is alone on one has none.
    if any(consistency.gather_numbers(ranks.group, int(buffer is not None))):
        rings.append("ring, memory")
    methods = [name for each in methods for name in (rings if each == "ring" else [each])]
    for mib in STATE_SIZES_MIB:
        H = max(1, int(16 * mib))
        state = torch.randn(1, H, 128, 128, device=ranks.device)
        factor = torch.full((H, 1, 1), math.exp(-1e-4 * 4096), device=ranks.device)

        def once(method, layout, state=state, factor=factor):
            kernel = None if method == "ring, messages" else ops.send_recv_state
            chain = ChunkChain(ranks.group, layout, send_recv_state=kernel)
            transitions = [Transition(state, factor)] * len(chain.local_chunks)
            exchange.start(transitions, chain, method=method.split(",")[0]).wait()

        gathered = state.new_empty(ranks.size * state.numel())
        calls = {"nccl all-gather": lambda s=state, g=gathered: gather(s, g)}
        for method in methods:
            for layout in shard.LAYOUTS:
                calls[method, layout] = lambda m=method, w=layout, f=once: f(m, w)
        for name, call in calls.items():
            method, layout = (name, "contiguous") if isinstance(name, str) else name
            row = {"method": method, "layout": layout, "bytes": state.numel() * 4}
            rows.append(row | {"ms": ranks.time_ms(call, seconds / 4)})
    return rows


def gather(state, gathered):
    dist.all_gather_into_tensor(gathered, state.flatten())


def overlap(ranks: Ranks, attention: Attention, shape) -> dict:
    """Time of the communication kernels in a forward and backward, and how much was hidden."""
    q, k, v, do, log_decay = make_inputs(ranks, shape, "")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            ranks.line_up(10)
            torch.autograd.grad(attention(*leaves, log_decay), leaves, do)
        torch.cuda.synchronize()
    # Only the last repeat, which follows the last all_reduce of `line_up`.
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    lined_up = max(i for i, e in enumerate(events) if "AllReduce" in e.name)
    spans = [
        (e.time_range.start, e.time_range.end, "nccl" in e.name.lower() or "send_recv" in e.name)
        for e in events[lined_up + 1 :]
    ]
    work = [(start, stop) for start, stop, communicates in spans if not communicates]
    total = hidden = 0.0
    for start, stop, communicates in spans:
        if communicates:
            total += stop - start
            hidden += sum(max(0.0, min(stop, b) - max(start, a)) for a, b in work)
    every = [None] * ranks.size
    dist.all_gather_object(every, {"communication_us": total, "under_kernels_us": hidden})
    return {"tokens": shape[1], "ranks": every}


def measure_baselines(ranks: Ranks, arguments, report: dict) -> None:
    """Measure the baselines, each over all lengths, until --baseline-seconds are spent."""
    H, D = arguments.heads, arguments.head_dim
    longest = max(arguments.tokens)
    if ranks.device.type != "cuda" or not baselines.find((1, longest, H, D, D)):
        report["note"] = "The baselines were left out: they need fla-core and a GPU."
        return
    begun = time.monotonic()
    if ranks.rank == 0:
        kinds = [(1, longest, heads, D, D) for heads in (H, H // ranks.size)]
        baselines.compile_ahead(kinds, timeout_s=arguments.baseline_seconds / 2)
    dist.barrier()
    for name, make in (
        ("head all-to-all + fla", baselines.head_all_to_all),
        ("states + fla", baselines.states_and_fla),
    ):
        for tokens in sorted(arguments.tokens, reverse=True):
            spent = ranks.slowest([time.monotonic() - begun])[0]
            if spent > arguments.baseline_seconds:
                report["note"] = f"No further baseline was started after {spent:.0f} s."
                return
            row = measure(ranks, name, make(ranks.group), (1, tokens, H, D), arguments.seconds)
            keep(ranks, report, row, arguments)


def keep(ranks: Ranks, report: dict, row: dict, arguments) -> None:
    """Add a row and write the report, so that an interrupted run keeps its rows."""
    report["rows"].append(row)
    if ranks.rank == 0:
        print(json.dumps(row), flush=True)
        reports.write(report, arguments.out)


def fitted_links(exchanges: list[dict], size: int) -> dict[str, cost_model.Link]:
    """Latency and bandwidth of each method from its measured times."""
    links = {}
    for method in sorted({row["method"] for row in exchanges} & set(cost_model.METHODS)):
        samples = [
            (
                *cost_model.steps_and_bytes(method, size, row["bytes"], row["layout"]),
                row["ms"] / 1e3,
            )
            for row in exchanges
            if row["method"] == method
        ]
        links[method] = cost_model.fit(samples)
    return links


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 262144])
    parser.add_argument("--exchanges", nargs="+", default=["all_gather", "doubling", "ring"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backend", choices=["nccl", "gloo"])
    parser.add_argument("--only", choices=["lasp"], help="leave the baselines out")
    parser.add_argument("--profile", action="store_true", help="measure hidden communication")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    parser.add_argument("--baseline-seconds", type=float, default=300, help="for both together")
    parser.add_argument("--out", type=Path, default=reports.RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    arguments.backend = arguments.backend or ("nccl" if torch.cuda.is_available() else "gloo")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        raise SystemExit("start it with: torchrun --nproc_per_node 2 " + sys.argv[0])
    ranks = Ranks(arguments.backend)
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
    report = {
        "device": f"{ranks.size} x {device}",
        "ranks": ranks.size,
        "heads": arguments.heads,
        "head_dim": arguments.head_dim,
        "dtype": str(ranks.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "max_connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset"),
        "rows": [],
    }
    shape = lambda tokens: (1, tokens, arguments.heads, arguments.head_dim)  # noqa: E731
    found = variants(ranks, arguments.exchanges)
    report["exchanges"] = measure_exchanges(ranks, arguments.exchanges, arguments.seconds)
    links = fitted_links(report["exchanges"], ranks.size)
    report["links"] = {method: vars(link) for method, link in links.items()}
    for tokens in arguments.tokens:
        for name, attention in found.items():
            row = measure(ranks, name, attention, shape(tokens), arguments.seconds)
            keep(ranks, report, row, arguments)
    if arguments.profile and ranks.device.type == "cuda":
        report["overlap"] = [
            overlap(ranks, found[name], shape(tokens)) | {"name": name}
            for name in ("lasp ring", "lasp ring, messages")
            for tokens in arguments.tokens
        ]
    if arguments.only != "lasp":
        measure_baselines(ranks, arguments, report)
    if ranks.rank == 0:
        reports.write(report, arguments.out, with_plot=True)
        print(reports.table(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
