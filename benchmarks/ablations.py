"""The ablation tables of TransNormerLLM: every variant trained on the same text and tokens.

    python benchmarks/ablations.py                        # tiny, two CPU cores: minutes
    python benchmarks/ablations.py --size 45m             # one GPU: minutes
    python benchmarks/ablations.py --size 385m            # one GPU: hours
    python benchmarks/ablations.py --rows TNL "no gate" --seeds 0 1 2

A row is the model with one part changed (arXiv 2405.17381, tables 4 to 9 and 11). All rows of a
seed see the same samples in the same order, with the same optimizer and learning rate, which no row
was tuned for. The loss is that of the validation split after the last step, in bits per token, and
what counts is its difference from TNL's with the same seed.

The text is the sources of Python's standard library (tiny: bytes; else a BPE of 8,192 tokens),
prepared when it is missing, or any output of launch/prepare_data.py (--data). All runs are in one
process, by the launcher's own steps. ablations_SIZE.json is written after every run; the same
command goes on from there, and starts anew where its settings differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import io
import json
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ablations_report
import resume
import torch
import versions

from launch.config import load_config
from launch.data import DataFolder
from launch.distributed import DistContext, get_rank_info
from launch.prepare_data import prepare
from launch.resolve import batching
from launch.train import set_up
from launch.trainer import train_step, validate

RESULTS = Path(__file__).parent / "results"
# Losses of a curve, besides those of validation.
POINTS = 40


@dataclass(frozen=True)
class Size:
    """What all rows of a table have in common.

    Attributes:
        model: fields of TNLConfig.
        glu_dim_without_gate: of rows without a gate, for about as many parameters.
        tokenizer: of the default text.
        sequences, seq_len: of a step.
        validation: sequences that the loss is measured on.
        flags: more of launch/train.py.
    """

    model: dict[str, Any]
    glu_dim_without_gate: int
    tokenizer: str
    steps: int
    seq_len: int
    sequences: int
    lr: float
    validation: int
    seeds: tuple[int, ...] = (0, 1)
    flags: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "tiny": Size(
        model=dict(dim=64, num_layers=4, num_heads=4, glu_dim=176),
        glu_dim_without_gate=192,
        tokenizer="byte",
        steps=120,
        seq_len=256,
        sequences=8,
        lr=4e-3,
        validation=64,
    ),
    "45m": Size(
        model=dict(dim=512, num_layers=12, num_heads=8, glu_dim=1280),
        glu_dim_without_gate=1408,
        tokenizer="bpe",
        steps=500,
        seq_len=1024,
        sequences=16,
        lr=1e-3,
        validation=256,
        # Compilation takes longer than what it saves in runs of seconds.
        flags={"compile.enable": False},
    ),
    "385m": Size(
        model=dict(dim=1024, num_layers=24, num_heads=8, glu_dim=2816),
        glu_dim_without_gate=3072,
        tokenizer="bpe",
        steps=2000,
        seq_len=2048,
        sequences=16,
        lr=3e-4,
        validation=256,
        # The memory of any GPU.
        flags={"training.global_batch_size": 16, "training.local_batch_size": 4},
    ),
}


def rows(size: Size) -> dict[str, dict[str, Any]]:
    """name -> the fields of TNLConfig that it changes. `ablations_report.PAPER` has the same
    names."""
    everywhere = tuple(range(size.model["num_layers"]))
    absolute = dict(lrpe_layers=(), decay="none", position_embeddings=size.seq_len)
    return {
        "TNL": {},
        "LRPE and decay in all layers": dict(lrpe_layers=everywhere),
        "decay only": dict(lrpe_layers=()),
        "LRPE only": dict(lrpe_layers=everywhere, decay="none"),
        "absolute position embeddings": absolute,
        "same decay in all layers": dict(decay="per_head"),
        "no gate": dict(output_gate=False, glu_dim=size.glu_dim_without_gate),
        "RMSNorm": dict(norm="rms"),
        "LayerNorm": dict(norm="layer"),
        "no activation of q and k": dict(activation="none"),
        "1 + elu of q and k": dict(activation="1+elu"),
        "swish in GLU": dict(glu_activation="silu"),
        "Transformer": dict(layer_types="S", lrpe_layers=(), glu_dim=size.glu_dim_without_gate),
    }


def main() -> None:
    arguments, began = parse_arguments(), time.perf_counter()
    size = SIZES[arguments.size]
    if arguments.steps:
        size = dataclasses.replace(size, steps=arguments.steps)
    if arguments.size != "tiny" and not torch.cuda.is_available():
        raise SystemExit(f"--size {arguments.size} needs a CUDA GPU: use --size tiny.")
    variants = rows(size)
    unknown = [name for name in arguments.rows if name not in variants]
    if unknown:
        raise SystemExit(f"--rows {unknown}: choose among {', '.join(variants)}.")
    data = prepared(arguments.data, size)
    report = begin(arguments, size, data)
    names = arguments.rows or list(variants)
    # Seed by seed: a run that is cut off has compared all rows once.
    todo = [(name, seed) for seed in arguments.seeds or size.seeds for name in names]
    todo = [each for each in todo if each not in {(r["name"], r["seed"]) for r in report["runs"]}]
    for number, (name, seed) in enumerate(todo, 1):
        elapsed = time.perf_counter() - began
        if elapsed > 60 * arguments.minutes:
            print(f"{arguments.minutes:g} minutes are over: the same command goes on", flush=True)
            break
        run = train(name, size, variants[name], seed, data)
        report["runs"].append(run)
        ablations_report.write(report, arguments.out)
        elapsed = time.perf_counter() - began
        print(
            f"{number}/{len(todo)}  seed {seed}  {name}: {run['loss']:.4f} bits per token, "
            f"{run['seconds']:.1f} s  [{elapsed:.0f} s < {elapsed / number * len(todo):.0f} s]",
            flush=True,
        )
    print(ablations_report.table(report), flush=True)


def train(name: str, size: Size, fields: dict[str, Any], seed: int, data: Path) -> dict[str, Any]:
    """One run: its losses in bits per token, and how long it took."""
    began = time.perf_counter()
    if size.flags.get("compile.enable", True) and torch.cuda.is_available():
        torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(command_line(size, fields, seed, data, Path(folder)))
        info = get_rank_info(config)
        context = DistContext(info, None)
        state = set_up(config, context, batching(config, info))
        curve, points = [], {round(size.steps * i / POINTS) for i in range(1, POINTS + 1)}
        while state.step < size.steps:
            result = train_step(state)
            if result.loss is None:
                raise SystemExit(f"{name}, seed {seed}: the loss of step {state.step + 1} is NaN.")
            if state.step in points:
                curve.append([state.step, bits(result.loss)])
        # Without its progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            loss = validate(state)
        state.lock.close()
        run = {
            "name": name,
            "seed": seed,
            "parameters": state.model.config.num_parameters(),
            "loss": bits(loss),
            "train": curve,
            "seconds": time.perf_counter() - began,
        }
    del state
    gc.collect()
    return run


def bits(nats: float) -> float:
    return nats / math.log(2)


def command_line(
    size: Size, fields: dict[str, Any], seed: int, data: Path, folder: Path
) -> list[str]:
    """The launcher flags of a run."""
    model = folder / "model.json"
    model.write_text(json.dumps(size.model | fields))
    values = {
        "job.dump_folder": folder / "run",
        "model.config": model,
        "data.source": "folder",
        "data.folder": data,
        "training.seq_len": size.seq_len,
        "training.local_batch_size": size.sequences,
        "training.steps": size.steps,
        "training.seed": seed,
        "optimizer.lr": size.lr,
        "lr_scheduler.warmup_steps": max(1, size.steps // 10),
        # In steps of as many sequences as training has.
        "validation.steps": -(-size.validation // size.sequences),
        **size.flags,
    }
    line = ["--checkpoint.no-enable", "--sample.no-enable"]
    for flag, value in values.items():
        line += [f"--{flag}", str(value)]
    return line


def prepared(folder: Path | None, size: Size) -> Path:
    """The folder of the text; that of the standard library is made if there is none."""
    if folder is None:
        folder = Path(
            "data/stdlib" if size.tokenizer == "byte" else f"data/stdlib_{size.tokenizer}"
        )
        if not folder.exists():
            print(f"preparing the standard library's sources in {folder}", flush=True)
            prepare(folder, tokenizer=size.tokenizer)
    return folder


def begin(arguments: argparse.Namespace, size: Size, data: Path) -> dict[str, Any]:
    """The report on disk if it has the same settings, else one without runs."""
    meta = DataFolder(data).meta
    tokens = {split: meta.get(split, {}).get("tokens") for split in ("train", "val")}
    text = data.name if arguments.data else "Python's standard library"
    report = {
        "size": arguments.size,
        "settings": json.loads(json.dumps(dataclasses.asdict(size) | {"data_tokens": tokens})),
        "text": f"{text}, {(meta.get('tokenizer') or {}).get('type', size.tokenizer)} tokens",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions.installed("torch", "triton"),
        "date": datetime.date.today().isoformat(),
        "runs": [],
    }
    if arguments.anew:
        return report
    path = arguments.out / f"ablations_{arguments.size}.json"
    return resume.earlier_report(path, report, ("settings", "device", "text")) or report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rows", nargs="*", default=[], help="names of rows; default: all")
    parser.add_argument("--seeds", nargs="*", type=int, help="default: those of the size")
    parser.add_argument("--steps", type=int, help="default: those of the size")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after these")
    parser.add_argument("--data", type=Path, help="output of launch/prepare_data.py")
    parser.add_argument("--anew", action="store_true", help="forget the runs on disk")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
