"""Write all tables and charts of benchmarks/results anew from the JSON files; needs no GPU.

python benchmarks/report.py             # and print the table of the README
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import kernels_report
import megatron_report
import sequence_parallel_report
import training_report

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the JSON files")
    folder = parser.parse_args().results

    def read(path: Path) -> dict:
        return json.loads(path.read_text())

    kernels_report.write(read(folder / "kernels.json"), folder)
    for path in sorted(folder.glob("sequence_parallel_*.json")):
        sequence_parallel_report.write(read(path), folder, with_plot=True)
    megatron_report.write(read(folder / "megatron.json"), folder)
    training = read(folder / "training.json")
    training_report.write(training, folder)
    print(training_report.readme_table(training), end="")


if __name__ == "__main__":
    main()
