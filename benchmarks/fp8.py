"""FP8 against bfloat16 with the launcher's own step: speed, memory, and the loss on real text.

    python benchmarks/fp8.py speed                               # TNL-1b on one GPU
    torchrun --nproc_per_node 2 benchmarks/fp8.py speed          # TNL-7b over two, FSDP
    python benchmarks/fp8.py loss                                # TNL-385m, 1,000 steps
    python benchmarks/fp8.py merge --folders a b                 # rows of runs with --out a, b
    python benchmarks/fp8.py speed loss --preset tiny --tokens 2048 --steps 3   # a try on a CPU

Speed is measured as by benchmarks/training.py, on random tokens. Losses are those of
launch/train.py on the sources of Python's standard library, one byte per token. Needs torchao.
Writes fp8.json, fp8.md and fp8.png after every row; rows of earlier runs are kept.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import fp8_report
import losses
import torch
import torch.distributed as dist
import training
import versions
from training import RECOMPUTE, Case

FP8 = "quantize.linear.float8."
RECIPES: dict[str, tuple[tuple[str, Any], ...]] = {
    "bfloat16": (),
    "tensorwise": ((FP8 + "recipe_name", "tensorwise"),),
    "rowwise": ((FP8 + "recipe_name", "rowwise"),),
}
GATHERED = (
    *RECIPES["tensorwise"],
    (FP8 + "enable_fsdp_float8_all_gather", True),
    (FP8 + "precompute_float8_dynamic_scale_for_fsdp", True),
)


def cases(ranks: int, tokens: int) -> list[Case]:
    """One GPU: every recipe, without and with recomputation. Several: FSDP, one sequence each."""
    modes = ("none", "full")
    if ranks == 1:
        return [
            Case(mode, recipe, 1, tokens, flags=(*flags, (RECOMPUTE, mode)))
            for mode in modes
            for recipe, flags in RECIPES.items()
        ]
    fsdp = ("parallelism.data_parallel_method", "fsdp")
    recipes = {"bfloat16": (), "tensorwise": RECIPES["tensorwise"]}
    recipes["tensorwise, FP8 all-gather"] = GATHERED
    return [
        Case("full", recipe, ranks, tokens, flags=(*flags, fsdp, (RECOMPUTE, "full")))
        for recipe, flags in recipes.items()
    ]


def measure_speed(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Add a row per case, or replace that of an earlier run."""
    ranks, is_first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    if ranks > 1:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpus >= ranks else "gloo")
    arguments.preset = arguments.preset or ("7b" if ranks > 1 else "1b")
    for case in cases(ranks, arguments.tokens or (16384 if ranks > 1 else 32768)):
        if arguments.recipes and case.name not in arguments.recipes:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = training.run_case(case, arguments, Path(folder))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if is_first:
            row["recompute"] = row.pop("suite")
            _add(report, row)
            print(json.dumps(row), flush=True)
            fp8_report.write(report, arguments.out)
    if ranks > 1:
        dist.destroy_process_group()


def _add(report: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row to the report, or replace the one of an earlier run."""
    report["speed"] = [each for each in report["speed"] if _key(each) != _key(row)] + [row]


def _key(row: dict[str, Any]) -> tuple:
    return row["model"], row["gpus"], row["recompute"], row["name"], row["seq_len"]


def merge(folders: list[Path], report: dict[str, Any]) -> None:
    """Add the results in other folders, of runs on the same machine."""
    for folder in folders:
        other = json.loads((folder / "fp8.json").read_text())
        for row in other.pop("speed"):
            _add(report, row)
        report["loss"] |= other.pop("loss")
        report |= other


def measure_losses(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Train once per recipe from the same weights on the same samples."""
    for recipe, flags in RECIPES.items():
        if arguments.recipes and recipe not in arguments.recipes:
            continue
        report["loss"][recipe] = losses.train(recipe, dict(flags), arguments)
        fp8_report.write(report, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", nargs="+", choices=("speed", "loss", "merge"))
    parser.add_argument("--preset", help="model preset; default: 1b, 7b on more GPUs, 385m")
    parser.add_argument("--tokens", type=int, help="per GPU and step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--recipes", nargs="*", help="rows of these names only")
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="what to merge")
    losses.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    path = arguments.out / "fp8.json"
    report: dict[str, Any] = {"speed": [], "loss": {}}
    if path.exists():
        report = json.loads(path.read_text())
    if arguments.what != ["merge"]:
        report |= {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": versions.installed("torch", "triton", "torchao"),
            "date": datetime.date.today().isoformat(),
        }
    if "merge" in arguments.what:
        merge(arguments.folders, report)
        fp8_report.write(report, arguments.out)
    if "speed" in arguments.what:
        measure_speed(arguments, report)
    if "loss" in arguments.what:
        measure_losses(arguments, report)
    if os.environ.get("RANK", "0") == "0":
        print(fp8_report.table(report), flush=True)


if __name__ == "__main__":
    main()
