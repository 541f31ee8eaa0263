"""Baselines: other libraries' kernels for the same function, where they are installed.

fla-core's kernels tune themselves at the first call of each shape, and compiling over a hundred
variants one by one takes minutes. `compile_ahead` first compiles them in parallel processes;
Triton's cache on disk passes the result on. The tuning itself still runs here, undisturbed, and
picks the same variant as it would without.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

__all__ = [
    "compile_ahead",
    "find",
    "find_parallel",
    "head_all_to_all",
    "states_and_fla",
    "untuned",
]

Shape = tuple[int, int, int, int, int]
# Calls with at most this many values of q also show fla's fused kernel, which is slow at length.
SHORT = 2**23


def find(shape: Shape) -> dict[str, Callable]:
    """name -> function(q, k, v, log_decay) -> o, for (B, T, H, D, E); empty without fla-core.

    log_decay: [H], or [B, T, H].
    """
    try:
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla
    except ImportError:
        return {}

    def named(g):
        return {"g_gamma" if g.dim() == 1 else "g": g}

    found = {
        "fla chunk_simple_gla": lambda q, k, v, g: chunk_simple_gla(q, k, v, **named(g), scale=1.0)[
            0
        ]
    }
    B, T, H, D, _ = shape
    if D <= 64 or B * T * H * D <= SHORT:
        # For wider heads it sums partial outputs in memory and takes twice as long or more.
        found["fla fused_chunk_simple_gla"] = lambda q, k, v, g: fused_chunk_simple_gla(
            q, k, v, **named(g), scale=1.0
        )[0]
    return found


def find_parallel() -> dict[str, Callable]:
    """fla's quadratic form, tile by tile, as `find` gives its linear one: constant decays only."""
    try:
        from fla.ops.simple_gla import parallel_simple_gla
    except ImportError:
        return {}

    def parallel(q, k, v, log_decay):
        by_token = log_decay.expand(q.shape[:3]).contiguous()
        return parallel_simple_gla(q, k, v, g=by_token, scale=1.0)[0]

    return {"fla parallel_simple_gla": parallel}


def compile_ahead(shapes: list[Shape], timeout_s: float = 300, *, by_token: bool = False) -> None:
    """Compile all variants that the baselines will try at these shapes, on all cores, for constant
    decays or for decays per token.

    Needs the GPU's driver. A process that fails or times out costs only time: the baseline then
    compiles by itself.
    """
    if not shapes or not find(shapes[0]):
        return
    # Variants depend on the heads and their sizes, not on B and T. The smallest shape has the most
    # baselines.
    by_size = sorted(shapes, key=lambda shape: shape[0] * shape[1], reverse=True)
    kinds = {shape[2:]: shape for shape in by_size}.values()
    num_stripes = max(1, (os.cpu_count() or 1) // len(kinds))
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, ",".join(map(str, shape)), str(stripe), str(num_stripes)]
            + ["--by-token"] * by_token,
            stdout=subprocess.DEVNULL,
        )
        for shape in kinds
        for stripe in range(num_stripes)
    ]
    for job in jobs:
        try:
            job.wait(timeout_s)
        except subprocess.TimeoutExpired:
            job.kill()


@contextlib.contextmanager
def untuned(stripe: int = 0, num_stripes: int = 0) -> Iterator[None]:
    """Make Triton's autotuner run each variant of a stripe once, instead of timing all of them.

    Use it for results, never for times. The first and the last variant always run, so that one fits
    the chip; with num_stripes = 0 only these two run.
    """
    from triton.runtime.autotuner import Autotuner

    prune, bench = Autotuner.prune_configs, Autotuner.__dict__["do_bench"]

    def few(self, kwargs):
        configs = prune(self, kwargs)
        ends = [configs[0], configs[-1]]
        return list(dict.fromkeys(ends + (configs[stripe::num_stripes] if num_stripes else [])))

    def once(call, quantiles):
        call()
        return [0.0] * len(quantiles)

    Autotuner.prune_configs, Autotuner.do_bench = few, property(lambda self: once)
    try:
        yield
    finally:
        Autotuner.prune_configs, Autotuner.do_bench = prune, bench


def head_all_to_all(group: dist.ProcessGroup) -> Callable:
    """Ulysses: exchange tokens for heads, run fla's kernel on the full sequence, exchange back."""
    from fla.ops.simple_gla import chunk_simple_gla

    rank, size = dist.get_rank(group), dist.get_world_size(group)

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, to_heads):
            ctx.to_heads = to_heads
            return exchanged(x, to_heads)

        @staticmethod
        def backward(ctx, grad):
            return exchanged(grad, not ctx.to_heads), None

    def exchanged(x, to_heads):
        # [1, T/P, H, D] as P parts of the heads, or [1, T, H/P, D] as P parts of the tokens.
        x = x[0]
        parts = x.unflatten(1, (size, -1)).movedim(1, 0) if to_heads else x.unflatten(0, (size, -1))
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return (received.flatten(0, 1) if to_heads else received.movedim(0, 1).flatten(1, 2))[None]

    def attention(q, k, v, g):
        mine = g.chunk(size)[rank]
        q, k, v = Exchange.apply(torch.cat([q, k, v], dim=-1), True).chunk(3, dim=-1)
        o, _ = chunk_simple_gla(*(x.contiguous() for x in (q, k, v)), g_gamma=mine, scale=1.0)
        return Exchange.apply(o, False)

    return attention


def states_and_fla(group: dist.ProcessGroup) -> Callable:
    """LASP-2 with fla's kernel: local states in plain torch, gathered, and folded by every rank."""
    from fla.ops.simple_gla import chunk_simple_gla

    rank, size = dist.get_rank(group), dist.get_world_size(group)

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = x.new_empty(size * x.shape[0], *x.shape[1:])
            dist.all_gather_into_tensor(out, x.contiguous(), group=group)
            return out

        @staticmethod
        def backward(ctx, grad):
            out = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
            dist.reduce_scatter_tensor(out, grad.contiguous(), group=group)
            return out

    def attention(q, k, v, g):
        T = k.shape[1]
        weights = torch.exp(g[None, :] * torch.arange(T - 1, -1, -1, device=g.device)[:, None])
        weighted = (k * weights[None, :, :, None].to(k.dtype)).transpose(1, 2)
        local = (weighted.transpose(-1, -2) @ v.transpose(1, 2)).float()
        states, state_in = Gather.apply(local), torch.zeros_like(local)
        # Every rank folds all states, so that every rank joins the backward's collective.
        decay = torch.exp(g * T)[None, :, None, None]
        for other in range(size):
            keep = 1.0 if other < rank else 0.0
            step = decay * state_in + states[other : other + 1]
            state_in = keep * step + (1 - keep) * state_in
        return chunk_simple_gla(q, k, v, g_gamma=g, scale=1.0, initial_state=state_in)[0]

    return attention


def main() -> None:
    """Compile one stripe of the variants of one shape, forward and backward."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("shape")
    parser.add_argument("stripe", type=int)
    parser.add_argument("num_stripes", type=int)
    parser.add_argument("--by-token", action="store_true", help="with a decay per token")
    arguments = parser.parse_args()
    shape = B, T, H, D, E = tuple(map(int, arguments.shape.split(",")))
    # A variant is compiled for any length, so a short one will do.
    T = min(T, 1024)
    q, k = (torch.zeros(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.zeros(B, T, H, E, device="cuda", dtype=torch.bfloat16)
    by_token = arguments.by_token
    log_decay = torch.full((B, T, H) if by_token else (H,), -0.1, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, *([log_decay] if by_token else []))]
    with untuned(arguments.stripe, arguments.num_stripes):
        for function in find(shape).values():
            # A baseline that fails shows up when it is measured.
            with contextlib.suppress(Exception):
                o = function(q, k, v, log_decay)
                torch.autograd.grad(o, leaves, torch.zeros_like(o))


if __name__ == "__main__":
    # The best of a stripe is not the best of all: keep it out of fla's cache on disk.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    main()
