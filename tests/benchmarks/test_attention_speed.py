"""benchmarks/attention_speed.py at small sizes on a CPU: what it measures, writes and resumes."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.lasp.cases import relative_error

SIZES = {
    "tokens": 64,
    "model-tokens": 128,
    "segment": 32,
    "heads": 2,
    "head-size": 8,
    "limit": 1000,
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import attention_speed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention_speed, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(attention_speed, "ROUNDS", 1)
    # There is no GPU memory to release; collecting garbage takes most of the time.
    monkeypatch.setattr(attention_speed, "release", lambda: None)
    return attention_speed


def run(benchmark, monkeypatch, folder, *flags):
    sizes = [each for name, size in SIZES.items() for each in (f"--{name}", str(size))]
    monkeypatch.setattr(sys, "argv", ["attention_speed.py", *sizes, "--out", str(folder), *flags])
    benchmark.main()
    return json.loads((folder / "attention_speed.json").read_text())


def rows_of(report):
    return [(row["part"], row["name"], row["seq_len"], row["sequences"]) for row in report["rows"]]


def test_every_attention_and_model_is_measured_and_written(benchmark, monkeypatch, tmp_path):
    flags = ("--parts", "attention", "tiny", "--lengths", "32", "80")
    report = run(benchmark, monkeypatch, tmp_path, *flags)
    alone = [name for name in benchmark.BASELINES if name != "Lightning Attention-1"]
    models = [name for name in benchmark.MODELS if name != "Lightning Attention-1"]
    cases = [("attention", name) for name in ["lasp", *alone]] + [("tiny", m) for m in models]
    # In segments only where there are two.
    wanted = [
        (*case, length, max(1, (64 if case[0] == "attention" else 128) // length))
        for case in cases
        for length in (32, 80)
        if case[1] != "TNL, in segments" or length == 80
    ]
    assert rows_of(report) == wanted
    for row in report["rows"]:
        rate = row["sequences"] * row["seq_len"] / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(rate) and "note" not in row
    assert set(report["errors"]) == {"lasp", *alone}
    assert max(report["errors"].values()) < 1e-4
    text = (tmp_path / "attention_speed.md").read_text()
    assert "## Attention alone: 2 heads of 8" in text and "## Models of preset tiny" in text
    docs = benchmark.attention_speed_report.docs_table(report)
    for part in ("attention", "tiny"):
        assert f"benchmarks/results/attention_speed_{part}.png)" in docs
        assert (tmp_path / f"attention_speed_{part}.png").stat().st_size > 0


def test_another_run_measures_only_what_is_missing(benchmark, monkeypatch, tmp_path):
    only = ("--parts", "attention", "--only", "lasp", "token loop")
    before = run(benchmark, monkeypatch, tmp_path, *only, "--lengths", "16")
    after = run(benchmark, monkeypatch, tmp_path, *only, "--lengths", "16", "32")
    assert after["rows"][:2] == before["rows"]
    assert rows_of(after)[2:] == [
        ("attention", "lasp", 32, 2),
        ("attention", "token loop", 32, 2),
    ]
    with pytest.raises(SystemExit, match="is of a run with other tokens"):
        run(benchmark, monkeypatch, tmp_path, *only, "--lengths", "16", "--tokens", "128")
    assert (
        run(benchmark, monkeypatch, tmp_path, *only, "--lengths", "16", "--seconds", "0") == after
    )


def test_a_run_without_time_writes_an_empty_table(benchmark, monkeypatch, tmp_path):
    flags = ("--parts", "tiny", "--lengths", "32", "--seconds", "0")
    report = run(benchmark, monkeypatch, tmp_path, *flags)
    assert report["rows"] == []
    assert (tmp_path / "attention_speed.md").exists()


def test_rows_of_other_calls_are_marked_and_measured_again(benchmark, monkeypatch, tmp_path):
    flags = ("--parts", "tiny", "--only", "TNL", "--lengths", "32", "80")
    run(benchmark, monkeypatch, tmp_path, *flags)
    path = tmp_path / "attention_speed.json"
    report = json.loads(path.read_text())
    report["rows"][0] |= {"sequences": 2, "tokens_per_second": 123e3}
    path.write_text(json.dumps(report))
    table = benchmark.attention_speed_report.table(report)
    assert "| TNL | 123* |" in table and "\\* Calls of 64 tokens." in table
    again = run(benchmark, monkeypatch, tmp_path, *flags)
    assert rows_of(again) == [("tiny", "TNL", 32, 4), ("tiny", "TNL", 80, 1)]
    assert again["rows"][1] == report["rows"][1]
    assert "*" not in (tmp_path / "attention_speed.md").read_text()


def test_a_curve_ends_where_memory_does(benchmark, monkeypatch, tmp_path):
    def small_memory(q, k, v, log_decay):
        if q.shape[1] >= 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 EiB")
        return benchmark.lasp.lightning_attention(q, k, v, log_decay)

    found = {"lasp": benchmark.Attention(small_memory)}
    monkeypatch.setattr(benchmark, "attentions", lambda device: found)
    monkeypatch.setattr(benchmark, "worst_error", lambda *arguments: 0.0)
    flags = ("--parts", "attention", "--lengths", "16", "32", "64")
    report = run(benchmark, monkeypatch, tmp_path, *flags)
    assert [row.get("note") for row in report["rows"]] == [None, "out of memory"]
    assert run(benchmark, monkeypatch, tmp_path, *flags) == report
    text = (tmp_path / "attention_speed.md").read_text()
    assert "lasp at 32 tokens: out of memory." in text


def test_a_curve_ends_at_the_time_limit_and_goes_on_with_a_larger_one(
    benchmark, monkeypatch, tmp_path
):
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, calls, device: 2.0)
    flags = ("--parts", "attention", "--only", "softmax (SDPA)", "--lengths", "64", "128")
    report = run(benchmark, monkeypatch, tmp_path, *flags, "--limit", "7")
    # Twice the tokens, each with twice the work.
    assert report["rows"][1]["expected_seconds"] == 8.0
    assert report["rows"][1]["note"] == "over the time limit: about 8 s, limit 7 s"
    report = run(benchmark, monkeypatch, tmp_path, *flags, "--limit", "9")
    assert [row["seconds"] for row in report["rows"]] == [2.0, 2.0]


def test_the_first_slow_call_of_a_process_is_a_warm_up(benchmark, monkeypatch, tmp_path):
    calls = []

    def seconds_of(call, count, device):
        calls.append(count)
        return 5.0

    monkeypatch.setattr(benchmark, "seconds_of", seconds_of)
    flags = ("--parts", "attention", "--only", "token loop", "--lengths")
    run(benchmark, monkeypatch, tmp_path, *flags, "64")
    calls.clear()
    run(benchmark, monkeypatch, tmp_path, *flags, "64", "128", "256")
    # 128 is the first of this process and is called twice, 256 once.
    assert len(calls) == 3


def test_a_wrong_attention_ends_the_run(benchmark, monkeypatch, tmp_path):
    found = {"lasp": benchmark.Attention(lambda q, k, v, log_decay: q + k + v)}
    monkeypatch.setattr(benchmark, "attentions", lambda device: found)
    with pytest.raises(SystemExit, match="lasp: error .* is above"):
        run(benchmark, monkeypatch, tmp_path, "--parts", "attention", "--lengths", "16")


def test_errors_of_other_libraries_are_results_and_those_of_lasp_are_not(benchmark):
    def fails():
        raise RuntimeError("no kernel\nfor this GPU")

    cpu = torch.device("cpu")
    found = benchmark.measure(lambda: fails, None, cpu, may_fail=True)
    assert found == {"note": "RuntimeError: no kernel"}
    with pytest.raises(RuntimeError, match="no kernel"):
        benchmark.measure(lambda: fails, None, cpu, may_fail=False)


def gradients(benchmark, name, attention=None, *, autocast=False):
    kind = benchmark.MODELS[name]
    torch.manual_seed(0)
    model = benchmark.build("tiny", kind, torch.device("cpu"))
    arguments = argparse.Namespace(device=torch.device("cpu"), segment=32, autocast=autocast)
    with benchmark.attending_by(attention):
        benchmark.model_case(model, kind, arguments, 2, 80)()
    return {name: p.grad for name, p in model.named_parameters()}


def test_models_that_compute_the_same_have_the_same_gradients(benchmark):
    wanted = gradients(benchmark, "TNL")
    name = "cumulative sum, by head"
    others = {
        "segments": gradients(benchmark, "TNL, in segments"),
        "cumulative sum": gradients(benchmark, name, benchmark.BASELINES[name]),
    }
    for other, found in others.items():
        assert found.keys() == wanted.keys()
        for parameter, grad in found.items():
            hint = f"{other}: {parameter}"
            torch.testing.assert_close(grad, wanted[parameter], rtol=1e-3, atol=1e-5, msg=hint)


@pytest.mark.parametrize("name", ["TNL", "TNL, in segments", "softmax", "1 + elu"])
def test_gradients_in_low_precision_are_those_in_float32(benchmark, name):
    attention = benchmark.BASELINES.get(name)
    wanted = gradients(benchmark, name, attention)
    for parameter, grad in gradients(benchmark, name, attention, autocast=True).items():
        assert relative_error(grad, wanted[parameter]) < 0.1, parameter


def test_a_model_attends_by_the_function_it_is_given(benchmark):
    calls = []

    def attention(q, k, v, log_decay):
        calls.append(q.shape)
        return v

    gradients(benchmark, "TNL", attention)
    # 4 layers, in the forward and again in the backward.
    assert len(calls) == 8


def report_with(rows):
    head = {"device": "a GPU", "versions": {}, "tokens": 8, "model_tokens": 16, "errors": {}}
    return head | {"heads": 2, "head_size": 8, "rows": rows}


def row(part, name, length, rate=None, note=None):
    found = {"part": part, "name": name, "seq_len": length, "sequences": 1, "date": "2026-11-30"}
    if note:
        return found | {"note": note}
    return found | {"seconds": 1.0, "tokens_per_second": rate, "memory_gib": 3.0}


def test_the_spread_is_that_of_lengths_from_2k_on(benchmark):
    rows = [row("1b", "TNL", n, r) for n, r in ((1024, 1.0), (2048, 100.0), (4096, 104.0))]
    # Of other calls.
    rows += [row("1b", "TNL", 3072, 1.0) | {"sequences": 2}]
    rows += [row("1b", "TNL", 8192, note="out of memory")]
    rows += [row("1b", "TNL, in segments", n, r) for n, r in ((4096, 90.0), (8192, 95.0))]
    rows += [row("1b", "softmax", n, r) for n, r in ((2048, 90.0), (4096, 30.0))]
    report = report_with(rows)
    found = {
        name: figures for _, name, *figures in benchmark.attention_speed_report.spreads(report)
    }
    assert found["TNL"] == [2048, 4096, pytest.approx(0.04)]
    joined = found["TNL, in segments where it does not fit whole"]
    assert joined == [2048, 8192, pytest.approx(104 / 95 - 1)]
    table = benchmark.attention_speed_report.table(report)
    assert "| Models of 1B | TNL | 2K to 4K | 4.0% |" in table
    assert "| Models of 1B | softmax | 2K to 4K | 3.0x |" in table
    assert "TNL at 8,192 tokens: out of memory." in table
