"""Write all tables and charts of benchmarks/results anew from the JSON files, and the tables of
README.md and docs/ from the same; needs no GPU.

    python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import ablations_report
import attention_speed_report
import convergence_report
import decoding_report
import eager_report
import fp8_report
import kernels_by_token_report
import kernels_report
import learned_decay_report
import megatron_report
import sequence_parallel_report
import training_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    reports = read_reports()
    kernels, over_ranks, training, fp8, eager, decay, decoding, by_token, *papers = reports
    by_length, ablations, convergence = papers
    kernels_report.write(kernels, RESULTS)
    if by_token is not None:
        kernels_by_token_report.write(by_token, RESULTS)
    if by_length is not None:
        attention_speed_report.write(by_length, RESULTS)
    for report in over_ranks:
        sequence_parallel_report.write(report, RESULTS, with_plot=True)
    megatron_report.write(_read(RESULTS / "megatron.json"), RESULTS)
    training_report.write(training, RESULTS)
    fp8_report.write(fp8, RESULTS)
    eager_report.write(eager, RESULTS)
    learned_decay_report.write(decay, RESULTS)
    decoding_report.write(decoding, RESULTS)
    for each in ablations:
        ablations_report.write(each, RESULTS)
    for each in convergence:
        convergence_report.write(each, RESULTS)
    for path, name, table in docs_tables(*reports):
        path.write_text(filled(path.read_text(), name, table))
        print(f"{path.relative_to(ROOT)}, table {name}:\n\n{table}")


def read_reports() -> tuple:
    """The reports of kernels, of sequence parallelism by number of ranks, of training, of FP8, of
    eager calls, of learned decays, of decoding; of kernels with a decay per token and of attention
    over the length, each None before its first run; of ablations by size, and of convergence by
    device."""
    over_ranks = [_read(path) for path in sorted(RESULTS.glob("sequence_parallel_*.json"))]
    names = ("kernels", "training", "fp8", "eager", "learned_decay", "decoding")
    kernels, *others = (_read(RESULTS / f"{name}.json") for name in names)
    optional = (RESULTS / f"{name}.json" for name in ("kernels_by_token", "attention_speed"))
    once = (_read(path) if path.exists() else None for path in optional)
    papers = ablations_report.read(RESULTS), convergence_report.read(RESULTS)
    return kernels, over_ranks, *others, *once, *papers


def docs_tables(
    kernels: dict,
    over_ranks: list[dict],
    training: dict,
    fp8: dict,
    eager: dict,
    decay: dict,
    decoding: dict,
    by_token: dict | None,
    by_length: dict | None,
    ablations: list[dict],
    convergence: list[dict],
) -> list[tuple[Path, str, str]]:
    """The tables outside benchmarks/results: (file, name of the table, the table)."""
    docs = ROOT / "docs" / "benchmarks.md"
    return [
        (ROOT / "README.md", "training", training_report.readme_table(training)),
        (docs, "kernels", kernels_report.docs_table(kernels)),
        (docs, "by_token", kernels_by_token_report.docs_table(by_token)),
        (docs, "eager", eager_report.table(eager)),
        (docs, "ranks", sequence_parallel_report.docs_table(over_ranks)),
        (docs, "training", training_report.docs_table(training)),
        (docs.with_name("training.md"), "segments", training_report.segments_table(training)),
        (docs.with_name("training.md"), "fp8", fp8_report.docs_table(fp8)),
        (docs.with_name("training.md"), "decay", learned_decay_report.docs_table(decay)),
        (docs.with_name("decoding.md"), "decoding", decoding_report.table(decoding)),
        (docs.with_name("papers.md"), "by_length", attention_speed_report.docs_table(by_length)),
        (docs.with_name("papers.md"), "ablations", ablations_report.docs_table(ablations)),
        (docs.with_name("papers.md"), "convergence", convergence_report.docs_table(convergence)),
    ]


def filled(text: str, name: str, table: str) -> str:
    """`text` with the table between the comments <!-- table NAME ... --> and <!-- end --> replaced.

    Raises:
        ValueError: there are no such comments.
    """
    pattern = rf"(<!-- table {name}\b[^>]*-->\n).*?(<!-- end -->)"
    found, count = re.subn(pattern, rf"\1\n{table}\n\2", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(
            f"{count} tables {name!r}: mark one by <!-- table {name} --> ... <!-- end -->."
        )
    return found


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
