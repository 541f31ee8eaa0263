"""Lightning attention over ranks: correctness first, then time against the same work on one rank.

    torchrun --nproc_per_node 2 benchmarks/sequence_parallel.py
    torchrun --nproc_per_node 2 benchmarks/sequence_parallel.py --backend gloo --tokens 256 1024

Every rank holds `--tokens` tokens of one sequence. A time is the median over repeats of the slowest
rank's, by CUDA events, all ranks lined up before each repeat; `call` is the time from call to call,
hosts included. All figures of one run are measured in that run: the work of a rank with no group,
ours, the exchange alone beside NCCL's own all-gather, and rivals where fla-core is installed:

    head all-to-all    each rank gets the whole sequence of H/P heads, fla's kernel (Ulysses)
    states + fla       all-gather of states in plain torch, then fla's kernel from the entering one

Ours is measured first, and the files are written after every row: a run that is cut off keeps what
it has. `--profile` adds how much of the communication ran under other kernels.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import cost_model
import rivals
import sequence_parallel_report as reports

import lasp
from lasp import exchange, ops, shard

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
STATE_SIZES_MIB = (0.25, 1, 4)


class Ranks:
    """This process among the others, and how time is taken here."""

    def __init__(self, backend: str) -> None:
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
        self.group = dist.group.WORLD
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        self.dtype = torch.bfloat16 if backend == "nccl" else torch.float32

    def without_memory(self) -> dist.ProcessGroup:
        """A group of all ranks that sends messages where it could use peer memory."""
        group, before = dist.new_group(), os.environ.get("LASP_PEER_MEMORY")
        os.environ["LASP_PEER_MEMORY"] = "0"
        # It asks once, at its first exchange.
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
        """The GPU sleeps while the host queues ahead, then waits until the others are as far."""
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
        """Time from call to call, whichever of host and GPU is the slower."""
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


def ours(ranks: Ranks, methods: list[str]) -> dict[str, Attention]:
    """name -> attention of this rank's part; the first is the same work with no group."""

    def one_call(**options):
        return lambda q, k, v, g: lasp.lightning_attention(q, k, v, g, **options)

    def two_calls(q, k, v, g):
        started = lasp.start_state(k, v, g, group=ranks.group)
        return lasp.attend(q, started)

    found = {"lasp, no group": one_call()}
    found |= {f"lasp {method}": one_call(group=ranks.group, exchange=method) for method in methods}
    found["lasp ring, two calls"] = two_calls
    if ranks.device.type == "cuda":
        found["lasp ring, messages"] = one_call(group=ranks.without_memory())
    found |= {
        f"lasp {method}, zigzag": one_call(group=ranks.group, exchange=method, layout="zigzag")
        for method in methods
    }
    return found


def make_inputs(ranks: Ranks, shape, seed: int = 0):
    """q, k, v, do of this rank, and the decay of a TNL's middle layer."""
    generator = torch.Generator(device=ranks.device).manual_seed(seed)
    spreads = (0.25, 0.25, 1.0, 1.0)
    options = dict(device=ranks.device, dtype=ranks.dtype, generator=generator)
    q, k, v, do = (torch.randn(shape, **options).mul_(spread) for spread in spreads)
    return q, k, v, do, lasp.decay.tnl(shape[2], 12, 24).to(ranks.device)


def worst_error(ranks: Ranks, attention: Attention, name: str) -> float:
    """Largest relative error of this rank's o, dq, dk, dv against float64, over all ranks."""
    total = 256 * ranks.size
    q, k, v, do, log_decay = make_inputs(ranks, (1, total, 16, 64), seed=1)
    layout = "zigzag" if "zigzag" in name else "contiguous"
    ranges = shard.token_ranges(total, ranks.size, ranks.rank, layout)
    here = torch.cat([torch.arange(*each) for each in ranges]).to(ranks.device)
    if name == "lasp, no group":
        # A rank's tokens are a sequence of their own.
        q, k, v, do = (x[:, here] for x in (q, k, v, do))
        here = slice(None)
    leaves = [x[:, here].clone().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, log_decay)
    o.backward(do[:, here])
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o_exact, _ = lasp.reference.quadratic(*exact, log_decay.double())
    o_exact.backward(do.double())
    pairs = [(o, o_exact), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    pairs = [(a.detach().double(), b.detach()[:, here]) for a, b in pairs]
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return ranks.slowest([max(errors)])[0]


def measure(ranks: Ranks, name: str, attention: Attention, shape, seconds: float) -> dict:
    """Error and times of one implementation at [B, T, H, D] per rank."""
    row = {"name": name, "tokens": shape[1], "error": worst_error(ranks, attention, name)}
    q, k, v, do, log_decay = make_inputs(ranks, shape)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        return attention(*leaves, log_decay)

    def both():
        return torch.autograd.grad(forward(), leaves, do)

    row["forward_ms"] = ranks.time_ms(forward, seconds)
    row["both_ms"] = ranks.time_ms(both, seconds)
    if row["both_ms"] < 3:
        row["both_call_ms"] = ranks.call_ms(both)
    return row


def measure_exchanges(ranks: Ranks, methods: list[str], seconds: float) -> list[dict]:
    """Time of an exchange alone, by method, layout and size of the state; and of all_gather."""
    rows = []
    rings = ["ring, messages"]
    state, kernel = torch.zeros(1, device=ranks.device), ops.send_recv_state
    if exchange.mailbox.find_mailbox(ranks.group, state, kernel):
        rings.append("ring, memory")
    methods = [name for each in methods for name in (rings if each == "ring" else [each])]
    for mib in STATE_SIZES_MIB:
        H = max(1, int(16 * mib))
        state = torch.randn(1, H, 128, 128, device=ranks.device)
        log_decay = torch.full((H,), -1e-4, device=ranks.device)

        def once(method, layout, state=state, log_decay=log_decay):
            relay = None if method == "ring, messages" else kernel
            line = exchange.Line(ranks.group, layout, relay=relay)
            maps = [exchange.AffineMap(state, log_decay, 4096) for _ in line.here]
            exchange.start(maps, line, method=method.split(",")[0]).finish()

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
    """Communication of a forward and backward: its time, and how much of that ran under others."""
    q, k, v, do, log_decay = make_inputs(ranks, shape)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            ranks.line_up(10)
            torch.autograd.grad(attention(*leaves, log_decay), leaves, do)
        torch.cuda.synchronize()
    # Of the last one, which follows the last time that the ranks lined up.
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


def head_all_to_all(ranks: Ranks) -> Attention:
    """Ulysses: exchange tokens for heads, run fla's kernel on the whole sequence, exchange back."""
    from fla.ops.simple_gla import chunk_simple_gla

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, to_heads):
            ctx.to_heads = to_heads
            return exchanged(x, to_heads)

        @staticmethod
        def backward(ctx, grad):
            return exchanged(grad, not ctx.to_heads), None

    def exchanged(x, to_heads):
        P = ranks.size
        # [B=1, T/P, H, D] in P parts of heads, or [1, T, H/P, D] in P parts of tokens.
        parts = x[0].unflatten(1, (P, -1)).movedim(1, 0) if to_heads else x[0].unflatten(0, (P, -1))
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=ranks.group)
        return (received.flatten(0, 1) if to_heads else received.movedim(0, 1).flatten(1, 2))[None]

    def attention(q, k, v, g):
        mine = g.chunk(ranks.size)[ranks.rank]
        q, k, v = Exchange.apply(torch.cat([q, k, v], dim=-1), True).chunk(3, dim=-1)
        o, _ = chunk_simple_gla(*(x.contiguous() for x in (q, k, v)), g_gamma=mine, scale=1.0)
        return Exchange.apply(o, False)

    return attention


def states_and_fla(ranks: Ranks) -> Attention:
    """LASP-2's scheme with fla's kernel: this rank's state in plain torch, gathered, folded."""
    from fla.ops.simple_gla import chunk_simple_gla

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = x.new_empty(ranks.size * x.shape[0], *x.shape[1:])
            dist.all_gather_into_tensor(out, x.contiguous(), group=ranks.group)
            return out

        @staticmethod
        def backward(ctx, grad):
            out = grad.new_empty(grad.shape[0] // ranks.size, *grad.shape[1:])
            dist.reduce_scatter_tensor(out, grad.contiguous(), group=ranks.group)
            return out

    def attention(q, k, v, g):
        T = k.shape[1]
        weights = torch.exp(g[None, :] * torch.arange(T - 1, -1, -1, device=g.device)[:, None])
        weighted = (k * weights[None, :, :, None].to(k.dtype)).transpose(1, 2)
        local = (weighted.transpose(-1, -2) @ v.transpose(1, 2)).float()
        states, entering = Gather.apply(local), torch.zeros_like(local)
        # Every rank folds all of them, so that all come to the backward's collective.
        decay = torch.exp(g * T)[None, :, None, None]
        for rank in range(ranks.size):
            keep = 1.0 if rank < ranks.rank else 0.0
            step = decay * entering + states[rank : rank + 1]
            entering = keep * step + (1 - keep) * entering
        return chunk_simple_gla(q, k, v, g_gamma=g, scale=1.0, initial_state=entering)[0]

    return attention


def measure_rivals(ranks: Ranks, arguments, report: dict) -> None:
    """Their rows; each in turn over all lengths, until the budget of seconds is spent."""
    H, D = arguments.heads, arguments.head_dim
    longest = max(arguments.tokens)
    if ranks.device.type != "cuda" or not rivals.find((1, longest, H, D, D)):
        report["note"] = "fla-core is not installed, or this is no GPU: rivals are left out."
        return
    begun = time.monotonic()
    if ranks.rank == 0:
        kinds = [(1, longest, heads, D, D) for heads in (H, H // ranks.size)]
        rivals.compile_ahead(kinds, timeout_s=arguments.rival_seconds / 2)
    dist.barrier()
    for name, make in (
        ("head all-to-all + fla", head_all_to_all),
        ("states + fla", states_and_fla),
    ):
        for tokens in sorted(arguments.tokens, reverse=True):
            spent = ranks.slowest([time.monotonic() - begun])[0]
            if spent > arguments.rival_seconds:
                report["note"] = f"rivals stopped after {spent:.0f} s"
                return
            row = measure(ranks, name, make(ranks), (1, tokens, H, D), arguments.seconds)
            keep(ranks, report, row, arguments)


def keep(ranks: Ranks, report: dict, row: dict, arguments) -> None:
    """Add a row, and write everything: a run that is cut off keeps what it has."""
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
    parser.add_argument("--only", choices=["ours"], help="leave the rivals out")
    parser.add_argument("--profile", action="store_true", help="how much communication is hidden")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each time taken")
    parser.add_argument("--rival-seconds", type=float, default=300, help="for all rivals together")
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
    found = ours(ranks, arguments.exchanges)
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
    if arguments.only != "ours":
        measure_rivals(ranks, arguments, report)
    if ranks.rank == 0:
        reports.write(report, arguments.out, with_plot=True)
        print(reports.table(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
