"""Training speed in megatron-core: TNL, the same model with softmax attention, and the launcher.

    torchrun --nproc_per_node 2 benchmarks/megatron_training.py
    CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nproc_per_node 2 benchmarks/megatron_training.py \
        --keep --layouts tp --models TNL softmax
    torchrun --nproc_per_node 2 benchmarks/megatron_training.py --apex --keep   # where apex is
    torchrun --nproc_per_node 2 benchmarks/megatron_training.py --apex norms --keep  # only norms
    torchrun --nproc_per_node 1 benchmarks/megatron_training.py --layouts cp --keep \
        --models TNL TNL-TE TNL-FP8 launcher --lengths 32768   # where Transformer Engine is
    torchrun --nproc_per_node 2 benchmarks/megatron_training.py --preset tiny --lengths 256 \
        --iterations 4 --softmax_iterations 4 --out outputs/try                   # a try on CPUs

Each step trains on one sequence, cut over all ranks by tensor or context parallelism, with all
layers recomputed. Megatron's rows take the steps of examples/megatron_gpt.py (bfloat16 weights, and
float32 ones in the optimizer, sharded under context parallelism). The launcher's rows take those of
benchmarks/training.py (float32 weights, bfloat16 products, FSDP under context parallelism). Time is
the median over the steps after warm-up; memory is what the allocator reserved, on the rank with the
most.

"TNL-TE" has Transformer Engine's linear layers, and "TNL-FP8" multiplies in FP8 there, scaled by
the current tensor. "softmax" is the same GPT with Megatron's SelfAttention in every layer, with
Transformer Engine's core attention where that is installed and LaspSoftmaxAttention (torch's flash
kernels) elsewhere. Megatron's own DotProductAttention stores all scores and refuses context
parallelism.

Megatron-LM asks for CUDA_DEVICE_MAX_CONNECTIONS=1 under tensor parallelism, so that messages start
before the products that hide them.

--apex uses apex's FusedAdam (and clipping), FusedRMSNorm and fused weight gradients, or only those
that are named. What is not named or not installed is torch's, and the row says so. Without --apex
everything is torch's, even where apex is installed. (Transformer Engine's Adam takes precedence
where it is installed.) Writes JSON and Markdown after every row.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import megatron_report
import torch
import torch.distributed as dist
import training
import versions

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
ON_GPU = torch.cuda.is_available()
APEX = ("optimizer", "norms", "weight gradients")
apex_parser = argparse.ArgumentParser(add_help=False)
apex_parser.add_argument(
    "--apex", nargs="*", choices=APEX, help="what to take from apex; default: all"
)
asked = apex_parser.parse_known_args()[0].apex
ASKED_OF_APEX = tuple(part for part in APEX if asked is not None and (part in asked or not asked))
if "optimizer" not in ASKED_OF_APEX:
    # Megatron picks up apex's Adam and clipping at import, unasked: hide apex from it.
    sys.modules["apex"] = None
if not ON_GPU:
    from tests.parallel.megatron import cpu_shim

    cpu_shim.install()

from megatron.core import parallel_state  # noqa: E402

from examples import megatron_gpt  # noqa: E402 (Megatron is imported after the shim)
from launch.metrics import peak_memory  # noqa: E402
from parallel.megatron.apex import has_apex  # noqa: E402

if "norms" in ASKED_OF_APEX and "optimizer" not in ASKED_OF_APEX:
    del sys.modules["apex"]

# Options of the example.
LAYOUT_OPTIONS = {
    "tp": ("--sequence-parallel",),
    "cp": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
}
LAYOUTS = tuple(LAYOUT_OPTIONS)
TNL_OPTIONS = {
    "TNL": (),
    "TNL-TE": ("--transformer-impl", "transformer_engine"),
    "TNL-FP8": ("--transformer-impl", "transformer_engine", "--fp8-format", "hybrid"),
}
MODELS = ("TNL", "launcher", "softmax")
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "apex")


def main() -> None:
    arguments, began = parse_arguments(), time.perf_counter()
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    report = begin(arguments)
    for layout in arguments.layouts:
        for model in arguments.models:
            for length in arguments.lengths:
                late = torch.tensor(float(time.perf_counter() - began > arguments.seconds))
                late = late.cuda() if ON_GPU else late
                dist.all_reduce(late)
                if late:
                    break
                measure = measure_launcher if model == "launcher" else measure_megatron
                row = measure(arguments, model, layout, length)
                gc.collect()
                if ON_GPU:
                    torch.cuda.empty_cache()
                if dist.get_rank() == 0:
                    report["rows"] = [r for r in report["rows"] if key(r) != key(row)] + [row]
                    print(json.dumps(row), flush=True)
                    megatron_report.write(report, arguments.out)
    if dist.get_rank() == 0:
        print(megatron_report.table(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure_megatron(
    arguments: argparse.Namespace, model: str, layout: str, length: int
) -> dict[str, Any]:
    """Measure steps of megatron-core and return the row."""
    sizes = dict(tp=1, cp=1) | {layout: dist.get_world_size()}
    parallel_state.initialize_model_parallel(sizes["tp"], context_parallel_size=sizes["cp"])
    softmax = model == "softmax"
    iterations = arguments.softmax_iterations if softmax else arguments.iterations
    args = megatron_gpt.parse_arguments(
        [
            *("--data-path", "random", "--preset", arguments.preset),
            *("--layer-types", "S" if softmax else "L", "--seq-length", str(length)),
            *("--global-batch-size", "1", "--lr", "3e-4", "--recompute"),
            *("--device", "cuda" if ON_GPU else "cpu", *(["--bf16"] if ON_GPU else [])),
            *("--tensor-model-parallel-size", str(sizes["tp"])),
            *("--context-parallel-size", str(sizes["cp"])),
            *LAYOUT_OPTIONS[layout],
            # Linear layers have no need to balance the chunks.
            *(["--linear-cp-layout", "contiguous"] if not softmax else []),
            *TNL_OPTIONS.get(model, ()),
            *apex_options(),
        ]
    )
    core = transformer_engine_core() if softmax else None
    torch._dynamo.reset()
    reset_peak()
    run = megatron_gpt.set_up(args, core)
    seconds, losses = [], []
    for iteration in range(1, iterations + 1):
        synchronize()
        started = time.perf_counter()
        loss, *_ = megatron_gpt.take_step(args, run, iteration)
        synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(loss)
    # Model and optimizer refer to each other, also through autograd hooks that Python's garbage
    # collector cannot see. Without this they would stay in memory during the next row.
    for name in ("grad_scale_func", "no_sync_func", "param_sync_func"):
        setattr(run.bare.config, name, None)
    used = megatron_gpt.ingredients(args)
    if softmax:
        used["core attention"] = "LaspSoftmaxAttention" if core is None else core.__name__
    if connections := os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"):
        used["CUDA_DEVICE_MAX_CONNECTIONS"] = connections
    row = row_of(arguments, model, layout, length, seconds) | dict(used=used, losses=losses)
    # This also frees a buffer for gathered activations.
    parallel_state.destroy_model_parallel()
    return row


def measure_launcher(
    arguments: argparse.Namespace, model: str, layout: str, length: int
) -> dict[str, Any]:
    """Measure steps of the native launcher, as in benchmarks/training.py, and return the row."""
    degree = {"tp": "tensor", "cp": "context"}[layout]
    flags = [("activation_checkpoint.mode", "full")]
    flags.append((f"parallelism.{degree}_parallel_degree", dist.get_world_size()))
    if layout == "cp":
        flags.append(("parallelism.data_parallel_method", "fsdp"))
    case = training.Case("megatron", layout, dist.get_world_size(), length, flags=tuple(flags))
    options = argparse.Namespace(
        preset=arguments.preset,
        warmup=arguments.warmup,
        steps=arguments.iterations - arguments.warmup,
        launcher_flags=[],
    )
    reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        row = training.run_case(case, options, Path(folder))
    used = {"optimizer": "torch's AdamW", "norms": "torch's"}
    return row_of(arguments, model, layout, length, row["steps"]) | dict(used=used)


def row_of(
    arguments: argparse.Namespace, model: str, layout: str, length: int, seconds: list[float]
) -> dict[str, Any]:
    """The columns that all rows have. Every rank calls it."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    memory = torch.tensor(peak_memory(device), dtype=torch.float64, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    median = statistics.median(seconds[arguments.warmup :])
    return {
        "model": model,
        "preset": arguments.preset,
        "layout": f"{layout} {dist.get_world_size()}",
        "apex": list(ASKED_OF_APEX),
        "seq_len": length,
        "steps": seconds,
        "step_seconds": median,
        "tokens_per_second": length / median,
        "memory_gib": memory.item(),
        "versions": versions.installed(*PACKAGES),
        "date": datetime.date.today().isoformat(),
    }


def apex_options() -> list[str]:
    """The example's options for what --apex asks for and is installed."""
    options = []
    if "norms" in ASKED_OF_APEX and has_apex("FusedRMSNorm"):
        options += ["--norm", "apex"]
    if "weight gradients" in ASKED_OF_APEX and has_apex("gradient accumulation fusion"):
        options.append("--gradient-accumulation-fusion")
    return options


def transformer_engine_core() -> type | None:
    """Transformer Engine's core attention, or None if it is not installed."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return None
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def reset_peak() -> None:
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """A report without rows, or with the rows of the last run (--keep)."""
    path, kept = arguments.out / "megatron.json", {"rows": []}
    if arguments.keep and path.exists():
        kept = json.loads(path.read_text())
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "rows": kept["rows"],
        "note": kept.get("note", ""),
    }


def key(row: dict[str, Any]) -> tuple:
    names = ("model", "preset", "layout", "seq_len")
    return *(row[name] for name in names), *row["apex"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], parents=[apex_parser])
    known = list(dict.fromkeys((*MODELS, *TNL_OPTIONS)))
    parser.add_argument("--models", nargs="*", choices=known, default=list(MODELS))
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--lengths", nargs="*", type=int, default=[32768, 131072])
    parser.add_argument("--preset", default="1b", help="model preset")
    parser.add_argument("--iterations", type=int, default=20, help="steps, warm-up included")
    parser.add_argument("--softmax_iterations", type=int, default=6, help="steps of softmax rows")
    parser.add_argument("--warmup", type=int, default=2, help="unmeasured steps at the start")
    parser.add_argument("--seconds", type=float, default=3600, help="start no row after this")
    parser.add_argument("--out", type=Path, default=training.RESULTS, help="folder for the results")
    parser.add_argument("--keep", action="store_true", help="keep the other rows of the folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
