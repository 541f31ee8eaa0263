"""TNL's element-wise ops on one GPU: eager, compiled and Triton, against the memory roofline.

    python benchmarks/tnl_ops.py               # about a minute

Each op is checked against float64, forward and gradients, and then timed at the sizes of TNL-1b. A
fraction is (least traffic / time) / copy bandwidth, where the least traffic reads every input once
and writes every output once. The result decided how an op runs in training: compiled with its block
where that reaches the roofline, as a Triton kernel where it does not (LRPE). Writes a JSON file and
a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

from lasp.tnl.layers import SRMSNorm
from lasp.tnl.positions import LRPE
from parallel.compile import compiler_options
from parallel.loss import chunked_cross_entropy

RESULTS = Path(__file__).parent / "results"
# TNL-1b.
DIM, HEADS, GLU, WORDS = 2048, 16, 5632, 64000
ADDED = ("forward", "backward")


@dataclass
class Op:
    """One op to measure.

    Attributes:
        function: (inputs) -> outputs, in plain torch.
        shapes: shapes of the inputs, all of which get gradients.
        traffic: values read and written, forward and backward, in units of tokens x DIM.
        triton: the same function with a hand-written kernel, if there is one.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    traffic: tuple[float, float]
    triton: Callable[..., tuple[Tensor, ...]] | None = None


@dataclass
class Row:
    """One way to run an op: milliseconds, fraction of the roofline, largest relative error."""

    op: str
    way: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    fraction: dict[str, float] = field(default_factory=dict)
    error: float | None = None


def ops(tokens: int) -> Iterator[Op]:
    """The ops of a block, in the order of its forward."""
    norm, wide, inner = SRMSNorm(DIM), (1, tokens, DIM), (1, tokens, GLU)
    heads = (1, tokens, HEADS, DIM // HEADS)

    def add_norm(x, mixed):
        x = x + mixed
        return x, norm(x)

    yield Op("SRMSNorm(x)", lambda x: (norm(x),), (wide,), (2, 3))
    yield Op("x + y, SRMSNorm(x + y)", add_norm, (wide, wide), (4, 4))
    lrpe = LRPE(HEADS, DIM // HEADS).cuda()
    yield Op(
        "LRPE(q), LRPE(k)",
        lambda q, k: lrpe_equation(q, k, lrpe.theta),
        (heads, heads),
        (6, 8),
        lambda q, k: lrpe(q, k, 1 << 20),
    )
    yield Op("u * SRMSNorm(o)", lambda u, o: (u * norm(o),), (wide, wide), (3, 5))
    ratio = GLU / DIM
    yield Op("SGLU product", lambda a, b: (a * b,), (inner, inner), (3 * ratio, 5 * ratio))


def lrpe_equation(q: Tensor, k: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """LRPE by its equation, from position 2^20 on, with angles in float64."""
    steps = torch.arange(q.shape[1], device=q.device, dtype=torch.float64) + (1 << 20)
    angle = theta.double().squeeze(1) * steps[:, None, None]
    high = torch.promote_types(q.dtype, torch.float32)
    cos, sin = angle.cos().to(high), angle.sin().to(high)
    return tuple(torch.cat([x * cos, x * sin], dim=-1).to(x.dtype) for x in (q, k))


def ways(op: Op) -> dict[str, Callable]:
    """How to run an op, by name."""
    found = {
        "eager": op.function,
        "compiled": torch.compile(op.function, dynamic=False, options=compiler_options()),
    }
    if op.triton is not None:
        found["Triton"] = op.triton
    return found


def run(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of the inputs."""
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def worst_error(function: Callable, op: Op) -> float:
    """Largest relative error of outputs and gradients against `op.function` in float64."""
    inputs = [torch.randn(shape, device="cuda") for shape in op.shapes]
    exact = [x.bfloat16().double().requires_grad_() for x in inputs]
    grads = [torch.randn_like(y) for y in op.function(*exact)]
    grads = [x.bfloat16() for x in grads]
    wanted = run(op.function, exact, [x.double() for x in grads])
    found = run(function, [x.detach().bfloat16().requires_grad_() for x in exact], grads)
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)]
    return max(errors).item()


def time_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """Median GPU time of a call. The operands are larger than the cache."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        # The host runs ahead, as in training, so that the GPU waits for no launch.
        torch.cuda._sleep(2_000_000)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in times)


def copy_bandwidth() -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * time_ms(lambda: target.copy_(source)))


def measure(op: Op, way: str, function: Callable, tokens: int, bandwidth: float) -> Row:
    """Correctness, then times."""
    row = Row(op.name, way)
    row.error = worst_error(function, op)
    assert row.error < 1e-2, row
    inputs = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for shape in op.shapes
    ]
    outputs = function(*inputs)
    grads = [torch.randn_like(y) for y in outputs]

    def backward():
        torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    for name, units, call in zip(
        ADDED, op.traffic, (lambda: function(*inputs), backward), strict=True
    ):
        row.milliseconds[name] = time_ms(call)
        least = 2 * units * tokens * DIM / bandwidth
        row.fraction[name] = 1e3 * least / row.milliseconds[name]
    return row


def measure_loss(tokens: int) -> list[dict]:
    """The loss and its gradients, matmuls of the head included, by chunk size."""
    hidden = torch.randn(1, tokens, DIM, device="cuda", dtype=torch.bfloat16)
    weight = 0.02 * torch.randn(WORDS, DIM, device="cuda")
    labels = torch.randint(0, WORDS, (1, tokens), device="cuda")
    hidden.requires_grad_()
    weight.requires_grad_()
    rows = []
    for compiled in (False, True):
        for chunk in (2048, 4096, 8192, 16384):

            def call(compiled=compiled, chunk=chunk):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = chunked_cross_entropy(
                        hidden, weight, labels, chunk_size=chunk, compiled=compiled
                    )
                return loss, *torch.autograd.grad(loss, (hidden, weight))

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            milliseconds = time_ms(call, repeats=5)
            rows.append(
                {
                    "chunk": chunk,
                    "compiled": compiled,
                    "milliseconds": milliseconds,
                    "matmul TFLOP/s": 6e-9 * tokens * DIM * WORDS / milliseconds,
                    "memory GiB": (torch.cuda.max_memory_allocated() - before) / 2**30,
                }
            )
    return rows


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['device']}, copy {report['copy_bytes_per_second'] / 1e12:.2f} TB/s, torch "
        f"{report['torch']}, triton {report['triton']}, {report['date']}. {report['tokens']:,} "
        f"tokens, bfloat16, TNL-1b (d {DIM}, {HEADS} heads, GLU {GLU}). Times in ms, fraction of "
        "the copy roofline in brackets.",
        "",
        "| op | way | forward | backward | error |",
        "|---|---|---|---|---|",
    ]
    for row in report["ops"]:
        cells = [f"{row['milliseconds'][name]:.3f} ({row['fraction'][name]:.0%})" for name in ADDED]
        lines.append(f"| {row['op']} | {row['way']} | {' | '.join(cells)} | {row['error']:.1e} |")
    lines += [
        "",
        f"Loss of {report['tokens']:,} tokens over {WORDS:,} words with its gradients, matmuls "
        "included.",
        "",
        "| tokens per chunk | way | ms | TFLOP/s | memory (GiB) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['chunk']} | {'compiled' if row['compiled'] else 'eager'} | "
        f"{row['milliseconds']:.1f} | {row['matmul TFLOP/s']:.0f} | {row['memory GiB']:.1f} |"
        for row in report["loss"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # The backward runs many times on one graph.
    torch._functorch.config.donated_buffer = False
    import triton

    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__.split("+")[0],
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "tokens": arguments.tokens,
        "copy_bytes_per_second": copy_bandwidth(),
        "ops": [],
    }
    for op in ops(arguments.tokens):
        for way, function in ways(op).items():
            row = measure(op, way, function, arguments.tokens, report["copy_bytes_per_second"])
            print(row, flush=True)
            report["ops"].append(dataclasses.asdict(row))
    report["loss"] = measure_loss(arguments.tokens)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tnl_ops.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "tnl_ops.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
