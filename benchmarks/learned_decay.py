"""TNL with a learned decay per token against TNL's fixed one: losses on real text.

    python benchmarks/learned_decay.py                           # TNL-385m, 1,000 steps each
    python benchmarks/learned_decay.py --decays learned          # one of them; the other is kept
    python benchmarks/learned_decay.py --folders a b             # runs with --out a, b; trains none
    python benchmarks/learned_decay.py --preset tiny --loss_steps 200       # a try on a CPU

Both runs start from the same weights, with the same decays, and see the same samples: those of
launch/train.py on the sources of Python's standard library, one byte per token. Writes
learned_decay.json, .md and .png after every run.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import learned_decay_report
import losses
import torch
import versions

DECAYS = ("fixed", "learned")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="385m", help="model preset")
    parser.add_argument("--tokens", type=int, default=2048, help="per step, in two sequences")
    parser.add_argument("--decays", nargs="*", choices=DECAYS, default=DECAYS)
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="what to merge")
    losses.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    path = arguments.out / "learned_decay.json"
    report: dict[str, Any] = {"loss": {}}
    if path.exists():
        report = json.loads(path.read_text())
    for folder in arguments.folders:
        other = json.loads((folder / path.name).read_text())
        report = {**report, **other, "loss": report["loss"] | other["loss"]}
        learned_decay_report.write(report, arguments.out)
    for decay in () if arguments.folders else arguments.decays:
        report["loss"][decay] = losses.train(decay, {"model.decay": decay}, arguments)
        report |= {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": versions.installed("torch", "triton"),
            "date": datetime.date.today().isoformat(),
        }
        learned_decay_report.write(report, arguments.out)
    print(learned_decay_report.table(report), flush=True)


if __name__ == "__main__":
    main()
