"""A decay per token against the constant one, and fla's kernel, on one GPU; the gradient's error.

    python benchmarks/kernels_by_token.py                  # everything
    python benchmarks/kernels_by_token.py --only lasp      # without fla
    python benchmarks/kernels_by_token.py --no-times       # the error of dlog_decay alone
    python benchmarks/kernels_by_token.py --shapes 1,64,2,16 --error-tokens 256     # a try on a CPU

fla tunes itself in the first call of each shape, which took more than 40 s on an H200 for a
forward. Variants are compiled ahead on all cores. Of a baseline that refuses its backward, as
fla-core 0.6.0 does on Hopper with Triton 3.4 to 3.7.0, the forward is measured alone.

Log decays are 2 u times those of the middle layer of a 24-layer TNL, u uniform per token and head;
the backward includes their gradient. The error is that of the gradient alone, in a long sequence,
against plain torch in float64. Rows of other shapes, and what is not measured, are kept from the
last run. Writes kernels_by_token.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
from pathlib import Path

import baselines
import kernels
import kernels_by_token_report
import torch
import versions

SHAPES = ((1, 131072, 16, 128, 128), (8, 2048, 32, 128, 128), (1, 32768, 32, 64, 64))
# Mean log decays of the errors: from one that forgets at once to one that remembers 10,000 tokens.
MEANS = (-1.0, -0.1, -0.01, -0.001, -0.0001)
# Fewer heads are divided into more segments, of which each starts its sum anew.
HEADS = (2, 16)
HEAD_DIM = 128
# Rows of several runs stand in one report.
TRITON = versions.installed("triton")


def measure_times(shape, only: str | None) -> list[dict]:
    """lasp with both kinds of decay, and the baseline with one per token."""
    bandwidth = kernels.copy_bandwidth()
    functions = [(n, f, "token") for n, f in _implementations(shape, only)]
    rows = []
    for name, function, decay in (("lasp", functions[0][1], "middle"), *functions):
        row = dataclasses.asdict(kernels.measure(name, function, shape, decay, bandwidth))
        rows.append(row | {"shape": list(shape), **TRITON})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_error(tokens: int, mean: float, only: str | None) -> dict:
    """Relative errors of dlog_decay, of plain torch in float32 and of kernels in bfloat16."""
    few = min(HEADS)
    generator = torch.Generator(kernels.DEVICE).manual_seed(1)
    options = dict(device=kernels.DEVICE, generator=generator)
    q, k, v, do = (torch.randn(1, tokens, few, HEAD_DIM, **options) for _ in range(4))
    q, k, v, do = (x.bfloat16() for x in (q, k / HEAD_DIM**0.5, v, do))
    log_decay = 2 * mean * torch.rand(1, tokens, few, **options)
    exact = plain_decay_gradient(q, k, v, do, log_decay, torch.float64)

    def error(gradient):
        return float((gradient.double() - exact).norm() / exact.norm())

    single = plain_decay_gradient(q, k, v, do, log_decay, torch.float32)
    row = {"tokens": tokens, "mean": mean, **TRITON, "float32 torch": error(single)}
    for heads in HEADS:
        # The same heads several times: only how they are divided differs.
        *tensors, grad = (x.repeat(1, 1, heads // few, 1) for x in (q, k, v, do))
        decays = log_decay.repeat(1, 1, heads // few).requires_grad_()
        for name, function in _implementations((1, tokens, heads, HEAD_DIM, HEAD_DIM), only):
            label = f"{name}, {heads} heads"
            try:
                with contextlib.nullcontext() if name == "lasp" else baselines.untuned():
                    (found,) = torch.autograd.grad(function(*tensors, decays), decays, grad)
                row[label] = error(found[:, :, :few])
            except Exception as failure:
                # A baseline that cannot run must not end the run.
                if name == "lasp":
                    raise
                row[label] = None
                print(f"{label}: {type(failure).__name__}: {failure}"[:200], flush=True)
    print(json.dumps(row), flush=True)
    return row


def plain_decay_gradient(q, k, v, do, log_decay, dtype, chunk=128) -> torch.Tensor:
    """The gradient of log_decay [B, T, H] by autograd, chunk by chunk, all in `dtype`."""
    *tensors, do = (x.to(dtype).transpose(1, 2) for x in (q, k, v, do))
    leaf = log_decay.to(dtype).requires_grad_()
    (B, H, _, D), E = tensors[0].shape, v.shape[-1]
    state = torch.zeros(B, H, D, E, dtype=dtype, device=q.device)
    outputs = []
    parts = (x.split(chunk, 2) for x in (*tensors, leaf.transpose(1, 2)))
    for q_part, k_part, v_part, rates in zip(*parts, strict=True):
        sums = rates.cumsum(-1)
        later = torch.ones(2 * sums.shape[-1:], dtype=torch.bool, device=q.device).triu(1)
        between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf)
        inside = (q_part @ k_part.mT * between.exp()) @ v_part
        outputs.append(inside + sums.exp()[..., None] * (q_part @ state))
        left = (sums[..., -1:] - sums).exp()[..., None]
        state = sums[..., -1, None, None].exp() * state + (k_part * left).mT @ v_part
    return torch.autograd.grad(torch.cat(outputs, 2), leaf, do)[0]


def _implementations(shape, only: str | None) -> list[tuple]:
    """(name, function) of lasp, and of fla's kernel for all lengths if it is installed."""
    return list(kernels.implementations(shape, only).items())[:2]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="*", help="B,T,H,D or B,T,H,D,E; default: the table's")
    parser.add_argument("--only", choices=["lasp"], help="leave the baseline out")
    parser.add_argument("--no-times", action="store_true", help="measure the errors alone")
    parser.add_argument("--no-errors", action="store_true", help="measure the times alone")
    parser.add_argument("--error-tokens", type=int, default=131072, help="length for the errors")
    parser.add_argument("--out", type=Path, default=kernels.RESULTS, help="folder for the results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if kernels.DEVICE.type == "cpu" and not arguments.shapes:
        raise SystemExit("benchmarks/kernels_by_token.py: without a GPU, pass small --shapes.")
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shapes or []] or SHAPES
    shapes = [s if len(s) == 5 else (*s, s[3]) for s in shapes]
    path = arguments.out / "kernels_by_token.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": [], "errors": []}
    report |= {
        "device": torch.cuda.get_device_name() if kernels.DEVICE.type == "cuda" else "CPU",
        "versions": versions.installed("torch", "fla-core"),
        "date": datetime.date.today().isoformat(),
    }
    if not (arguments.only or arguments.no_times):
        baselines.compile_ahead(shapes, by_token=True)
    for shape in () if arguments.no_times else shapes:
        kept = [row for row in report["rows"] if row["shape"] != list(shape)]
        report["rows"] = kept + measure_times(shape, arguments.only)
        kernels_by_token_report.write(report, arguments.out)
    # Last, because it leaves the baseline with untuned variants.
    if not arguments.no_errors:
        tokens = arguments.error_tokens
        report["errors"] = [measure_error(tokens, mean, arguments.only) for mean in MEANS]
        kernels_by_token_report.write(report, arguments.out)
    print(kernels_by_token_report.table(report))


if __name__ == "__main__":
    main()
