"""Where the conformance suite runs, and how far from the definition a result may be there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests.lasp import cases, sharded
from tests.lasp.sharded import Problem

# The arithmetic of the interpreter is NumPy's, which has no bfloat16.
INTERPRETED = {"TRITON_INTERPRET": "1", "LASP_PEER_MEMORY": "0"}


@dataclass(frozen=True)
class Backend:
    """A dtype on a kind of device.

    pool: the fixture whose processes run it. sizes: of keys and values, unless the variant has its
    own. device: "cpu", "interpreter" (the Triton kernels on the CPU) or "cuda".
    """

    dtype: torch.dtype
    device: str = "cpu"
    pool: str = "pool"
    sizes: tuple[int, int] = (4, 6)
    batch: int = 2


BACKENDS = {
    "cpu_float64": Backend(torch.float64),
    "cpu_float32": Backend(torch.float32),
    "cpu_float16": Backend(torch.float16, sizes=(32, 32)),
    "cpu_bfloat16": Backend(torch.bfloat16, sizes=(32, 32)),
    "triton_float32": Backend(torch.float32, "interpreter", "interpreters", (16, 24), 1),
    "triton_float16": Backend(torch.float16, "interpreter", "interpreters", (16, 24), 1),
    "gpu_float32": Backend(torch.float32, "cuda", "gpus", (128, 128)),
    "gpu_float16": Backend(torch.float16, "cuda", "gpus", (128, 128)),
    "gpu_bfloat16": Backend(torch.bfloat16, "cuda", "gpus", (128, 128)),
    "gpu_bfloat16_64": Backend(torch.bfloat16, "cuda", "gpus", (64, 64)),
    "gpu_bfloat16_96_80": Backend(torch.bfloat16, "cuda", "gpus", (96, 80)),
    # Small states: a host of eight GPUs compiles every kernel eight times.
    "gpus_float32": Backend(torch.float32, "cuda", "gpus"),
}


def run(group, problem, device):
    """`sharded.run` on a backend's device; without ranks, on the first of a group."""
    if device == "interpreter":
        take_cpu_tensors_for_the_gpus()
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    return sharded.run(group, problem, torch.device("cuda" if device == "cuda" else "cpu"))


def run_alone(group, problem, device):
    return run(None, problem, device)


def take_cpu_tensors_for_the_gpus():
    """In this process, the product takes its Triton kernels, which run in Triton's interpreter."""
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == "cpu")
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda.current_device = lambda: -1
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    torch.cuda.is_current_stream_capturing = lambda: False


def bounds(problem: Problem, truth, backend: Backend, ranks: int):
    """Largest relative error of each result: at most twice (gradients three times) that of plain
    torch in the same dtype."""
    if problem.dtype == torch.float64:
        return dict.fromkeys(truth, 1e-12)
    floor = 0.0
    if backend.device == "cuda":
        # The kernels' exponential is ex2.approx(x * log2(e)), whose relative error grows with |x|.
        log_decay = problem.inputs()[3]
        strongest = 0.0 if log_decay is None else float(log_decay.abs().max())
        floor = 1e-6 + strongest * 2**-23
    if problem.dtype == torch.float32 and ranks:
        limits = dict.fromkeys(truth, 2e-6 + floor)
    else:
        plain = problem.plain("cuda" if backend.device == "cuda" else "cpu")
        limits = {
            name: (2 if name in ("o", "state") else 3) * cases.relative_error(plain[name], value)
            + floor
            for name, value in truth.items()
        }
    # What plain torch loses in few numbers is chance, and may be nothing. A sum of random terms is
    # smaller than their sizes' sum by the root of their number.
    few = 4 * max(4, math.sqrt(problem.total)) if backend.device == "cuda" else 16
    for name, value in truth.items():
        if value.numel() < 100:
            limits[name] = max(limits[name], few * torch.finfo(problem.dtype).eps)
    return limits


def marks(name):
    return [pytest.mark.gpu] if BACKENDS[name].device == "cuda" else []
