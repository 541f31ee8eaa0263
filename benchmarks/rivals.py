"""Kernels of others that compute what lasp computes, as far as they are installed.

They tune themselves at their first call of every shape, over a hundred variants, each compiled one
after another: minutes per shape. `compile_ahead` compiles those variants in parallel processes, so
that what is left is the tuning itself, which nothing else may disturb. Triton's cache on disk
carries the result from there to here; nobody's choice of variant is changed by it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

__all__ = ["compile_ahead", "find", "untuned"]

Shape = tuple[int, int, int, int, int]
# Up to this many values of q, a rival that is slow at length is shown for its short call.
SHORT = 2**23


def find(shape: Shape) -> dict[str, Callable]:
    """name -> function(q, k, v, log_decay) -> o, for (B, T, H, D, E); empty without fla-core."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla
    except ImportError:
        return {}
    found = {
        "fla chunk_simple_gla": lambda q, k, v, g: chunk_simple_gla(q, k, v, g_gamma=g, scale=1.0)[
            0
        ]
    }
    B, T, H, D, _ = shape
    if D <= 64 or B * T * H * D <= SHORT:
        # Beyond 64 it sums partial outputs in memory and falls behind the other by 2x and more.
        found["fla fused_chunk_simple_gla"] = lambda q, k, v, g: fused_chunk_simple_gla(
            q, k, v, g_gamma=g, scale=1.0
        )[0]
    return found


def compile_ahead(shapes: list[Shape], timeout_s: float = 300) -> None:
    """Compile what the rivals will try at these shapes, on all cores. Needs the GPU's driver.

    A process that fails or does not end in time is only lost time: the rival compiles then itself.
    """
    if not shapes or not find(shapes[0]):
        return
    # The variants depend on heads and their sizes, not on B and T. The smallest meets most rivals.
    by_size = sorted(shapes, key=lambda shape: shape[0] * shape[1], reverse=True)
    kinds = {shape[2:]: shape for shape in by_size}.values()
    num_stripes = max(1, (os.cpu_count() or 1) // len(kinds))
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, ",".join(map(str, shape)), str(stripe), str(num_stripes)],
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
    """Triton's autotuner runs each variant of a stripe once instead of timing all of them.

    For results, not for times. The first variant and the last are always among them, so that one
    fits the chip; num_stripes = 0: no others.
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


def main() -> None:
    """One stripe of the variants of one shape's kinds of heads, forward and backward."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("shape")
    parser.add_argument("stripe", type=int)
    parser.add_argument("num_stripes", type=int)
    arguments = parser.parse_args()
    shape = B, T, H, D, E = tuple(map(int, arguments.shape.split(",")))
    # Short: variants are compiled for any length.
    T = min(T, 1024)
    q, k = (torch.zeros(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.zeros(B, T, H, E, device="cuda", dtype=torch.bfloat16)
    log_decay = torch.full((H,), -0.1, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with untuned(arguments.stripe, arguments.num_stripes):
        for function in find(shape).values():
            # A variant that does not run is the rival's affair, and shows when it is measured.
            with contextlib.suppress(Exception):
                o = function(*leaves, log_decay)
                torch.autograd.grad(o, leaves, torch.zeros_like(o))


if __name__ == "__main__":
    # What a stripe finds best says nothing: it must not be remembered on disk.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    main()
