"""Decoding as a user sees it: tokens per second, memory and time to the first token, on one GPU.

    python benchmarks/decoding.py                        # everything, some minutes
    python benchmarks/decoding.py --suite batches        # TNL, by batch size, beside the roof
    python benchmarks/decoding.py --suite contexts       # TNL and its softmax twin, by context
    python benchmarks/decoding.py --suite prefill        # prompts, with and without compilation
    python benchmarks/decoding.py --suite start          # a fresh process, to its first token
    python benchmarks/decoding.py --suite kernel         # the decoding step of the operator
    python benchmarks/decoding.py --preset tiny --suite batches        # a try on a CPU

Weights are random and bfloat16. Times are those of the caller of `lasp.tnl.generation.stream`, from
one token on the host to the next. The roof is the time to read all weights once and to read and
write all states once, at the bandwidth of a large copy, which is measured in the same run. The
softmax twin has the same shape with softmax attention in all layers, and a cache that holds the
context and the new tokens. Suites that are not run are kept from the last run. Writes
decoding.json, .md and .png.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import decoding_report
import kernels
import torch
import versions

import lasp
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.decoding import Decoder
from lasp.tnl.generation import prefill, stream
from parallel.compile import compile_blocks

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESETS = ("385m", "1b", "7b")
BATCHES = (1, 4, 16, 64)
CONTEXTS = (1024, 16384, 131072, 1048576)
PROMPTS = (4096, 32768, 1048576)
COMPILED_PROMPTS = (32768, 1048576)
# Bytes of a state of (64 sequences, 32 heads), and of the smallest call of interest.
STEPS = ((64, 32, 128), (1, 16, 128))
_START = """
import time; began = time.perf_counter()
import torch
from lasp.tnl import TNL, TNLConfig
from lasp.tnl.generation import stream
imported = time.perf_counter()
with torch.device("cuda"):
    model = TNL(TNLConfig.preset({preset!r})).bfloat16().eval()
torch.cuda.synchronize(); built = time.perf_counter()
prompt = torch.randint(1000, (1000,), device="cuda")
next(iter(stream(model, [prompt], 2)))
print([imported - began, built - imported, time.perf_counter() - built])
"""


@functools.lru_cache(maxsize=1)
def build(preset: str, softmax: bool = False) -> TNL:
    """A model with random weights; the last one is kept."""
    options = dict(layer_types="S", lrpe_layers=()) if softmax else {}
    torch.manual_seed(0)
    with DEVICE:
        model = TNL(TNLConfig.preset(preset, **options))
    return model.to(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32).eval()


def decode(model: TNL, batch: int, context: int, new: int, **sampling) -> dict[str, float]:
    """Times of one call of `stream`; the first two tokens, with all that is set up, are apart."""
    prompts = list(torch.randint(model.config.vocab_size, (batch, context), device=DEVICE))
    began, times = time.perf_counter(), []
    for _ in stream(model, prompts, new, **sampling):
        times.append(time.perf_counter())
    step = (times[-1] - times[1]) / (len(times) - 2)
    return {
        "batch": batch,
        "context": context,
        "first_token_seconds": times[0] - began,
        "step_ms": step * 1e3,
        "tokens_per_second": batch / step,
    }


def roof(model: TNL, batch: int, bandwidth: float) -> float:
    """Tokens per second if only weights and states had to be moved."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = sum(x.numel() * x.element_size() for x in model.initial_states(batch).layers)
    return batch * bandwidth / (weights + 2 * states)


def by_batch(arguments: argparse.Namespace, bandwidth: float) -> list[dict]:
    rows = []
    for preset in arguments.preset:
        model = build(preset)
        for batch in BATCHES:
            # Compiles the kernels of this batch size; the second call is measured.
            decode(model, batch, 8, 4)
            row = {"model": f"TNL {preset}"} | decode(model, batch, 1024, arguments.new)
            row["roof"] = roof(model, batch, bandwidth)
            row["graph_seconds"] = seconds(lambda m=model, b=batch: Decoder(m, b))
            rows.append(row)
            print(json.dumps(row), flush=True)
        sampled = dict(temperature=0.8, top_k=40, top_p=0.95)
        row = {"model": f"TNL {preset}, sampled"} | decode(model, 1, 1024, arguments.new, **sampled)
        rows.append(row | {"roof": roof(model, 1, bandwidth)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def by_context(arguments: argparse.Namespace, bandwidth: float) -> list[dict]:
    rows = []
    preset = arguments.preset[0] if len(arguments.preset) == 1 else "1b"
    for name in ("TNL", "softmax"):
        model = build(preset, softmax=name == "softmax")
        for context in arguments.contexts:
            free_memory()
            row = {"model": f"{name} {preset}", "batch": 1, "context": context}
            try:
                # Compiles the kernels of this length.
                decode(model, 1, min(context, 131072), 4)
                row |= decode(model, 1, context, arguments.new)
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            if DEVICE.type == "cuda":
                row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def by_prompt(arguments: argparse.Namespace, bandwidth: float) -> list[dict]:
    rows = []
    preset = arguments.preset[0] if len(arguments.preset) == 1 else "1b"
    build.cache_clear()
    model = build(preset)
    for compiled in (False, True):
        compiling = 0.0
        if compiled:
            compile_blocks(model.blocks)
            compiling = seconds(lambda: read(model, max(COMPILED_PROMPTS)))
        for length in COMPILED_PROMPTS if compiled else PROMPTS:
            read(model, length)
            took = statistics.median(seconds(lambda n=length: read(model, n)) for _ in range(4))
            row = {"model": f"TNL {preset}", "tokens": length, "compiled": compiled}
            row |= {"seconds": took, "tokens_per_second": length / took, "first_call": compiling}
            rows.append(row)
            print(json.dumps(row), flush=True)
    build.cache_clear()
    return rows


def read(model: TNL, length: int) -> None:
    """Read a prompt of `length` tokens and one more."""
    prompt = torch.randint(model.config.vocab_size, (length + 1,), device=DEVICE)
    for _ in prefill(model, [prompt], chunk=32768):
        pass


def fresh_process(arguments: argparse.Namespace, bandwidth: float) -> list[dict]:
    """Twice: the second time kernels are in Triton's cache."""
    preset = arguments.preset[0] if len(arguments.preset) == 1 else "1b"
    rows = []
    # The other process needs it.
    build.cache_clear()
    free_memory()
    for cache in ("cold or warm", "warm"):
        command = [sys.executable, "-c", _START.format(preset=preset)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        parts = json.loads(done.stdout.strip().splitlines()[-1])
        row = {"model": f"TNL {preset}", "cache": cache, "seconds": time.perf_counter() - began}
        row |= dict(zip(("import", "build", "first_token"), parts, strict=True))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows[1:]


def step_kernel(arguments: argparse.Namespace, bandwidth: float) -> list[dict]:
    """`lasp.lightning_attention_step` in place, in a CUDA graph."""
    rows = []
    for batch, heads, dim in STEPS:
        q, k, v = torch.randn(3, batch, heads, dim, device=DEVICE, dtype=torch.bfloat16)
        state = torch.randn(batch, heads, dim, dim, device=DEVICE)
        log_decay = -torch.rand(heads, device=DEVICE)
        calls = 20

        def call(count=calls, tensors=(q, k, v, state, log_decay)):
            for _ in range(count):
                lasp.lightning_attention_step(*tensors, inplace=True)

        call(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        took = kernels.time_ms(graph.replay) / 1e3 / calls
        moved = 2 * state.numel() * state.element_size()
        row = {"batch": batch, "heads": heads, "dim": dim, "microseconds": took * 1e6}
        rows.append(row | {"of_copy": moved / took / bandwidth})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def free_memory() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(function: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


SUITES = {
    "batches": by_batch,
    "contexts": by_context,
    "prefill": by_prompt,
    "start": fresh_process,
    "kernel": step_kernel,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--suite", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--preset", nargs="*", default=list(PRESETS), help="suite batches: models")
    parser.add_argument("--contexts", nargs="*", type=int, default=CONTEXTS)
    parser.add_argument("--new", type=int, default=256, help="tokens that are decoded")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    path = arguments.out / "decoding.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    bandwidth = kernels.copy_bandwidth()
    with torch.no_grad():
        for name in arguments.suite:
            report[name] = SUITES[name](arguments, bandwidth)
            report |= {
                "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
                "versions": versions.installed("torch", "triton"),
                "date": datetime.date.today().isoformat(),
                "copy_bandwidth": bandwidth,
            }
            decoding_report.write(report, arguments.out)
    print(decoding_report.table(report))


if __name__ == "__main__":
    main()
