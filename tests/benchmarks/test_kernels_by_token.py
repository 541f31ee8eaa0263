"""benchmarks/kernels_by_token.py with small sizes: what it writes, and its plain gradient."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

import lasp


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import kernels
    import kernels_by_token

    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    return kernels_by_token


def run(benchmark, monkeypatch, folder, *flags):
    arguments = ["kernels_by_token.py", "--only", "lasp", "--out", str(folder), *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()
    return json.loads((folder / "kernels_by_token.json").read_text())


def test_both_decays_are_timed_and_the_gradient_compared(benchmark, monkeypatch, tmp_path):
    run(benchmark, monkeypatch, tmp_path, "--shapes", "1,70,2,16", "--no-errors")
    flags = ("--shapes", "2,33,2,16,8", "--error-tokens", "300")
    report = run(benchmark, monkeypatch, tmp_path, *flags)
    measured = [(row["shape"], row["name"], row["decay"]) for row in report["rows"]]
    shapes = [1, 70, 2, 16, 16], [2, 33, 2, 16, 8]
    assert measured == [(s, "lasp", decay) for s in shapes for decay in ("middle", "token")]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in report["rows"])
    assert all(row["error"] < 1e-2 for row in report["rows"])
    assert [row["mean"] for row in report["errors"]] == list(benchmark.MEANS)
    for row in report["errors"]:
        assert 0 < row["float32 torch"] < 1e-4
        assert 0 < row["lasp, 2 heads"] < 1e-4 and 0 < row["lasp, 16 heads"] < 1e-4
    assert "| 2, 33, 2, 16, 8 |" in (tmp_path / "kernels_by_token.md").read_text()


def test_the_plain_gradient_is_that_of_the_definition(benchmark):
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(2, 50, 3, 8, generator=generator).double() for _ in range(4))
    log_decay = -torch.rand(2, 50, 3, generator=generator).double()
    plain = benchmark.plain_decay_gradient(q, k, v, do, log_decay, torch.float64, chunk=16)
    log_decay.requires_grad_()
    o, _ = lasp.reference.recurrent(q, k, v, log_decay)
    torch.testing.assert_close(plain, torch.autograd.grad(o, log_decay, do)[0])


def test_the_table_has_the_ratio_of_times(benchmark):
    def row(name, decay, forward, backward):
        times = {"forward_ms": forward, "backward_ms": backward}
        common = {"shape": [1, 2, 3, 4, 5], "triton": "3.7.1", "note": ""}
        return {"name": name, "decay": decay} | common | times

    rows = [row("lasp", "middle", 1.0, 2.0), row("lasp", "token", 1.2, 3.0)]
    rows.append(row("fla chunk_simple_gla", "token", 2.4, 9.0))
    report = {
        "device": "a GPU",
        "versions": {},
        "date": "today",
        "rows": [each | {"extra_units": 4.0} for each in rows],
        "errors": [],
    }
    table = benchmark.kernels_by_token_report.docs_table(report)
    times = "1.000 ms | 2.000 ms | 1.200 ms (1.20x) | 3.000 ms (1.50x)"
    assert f"| 1, 2, 3, 4, 5 | 3.7.1 | {times} | 4.0 | 4.0 | 2.0x / 3.0x |" in table


class WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay):
        return lasp.lightning_attention(q, k, v, log_decay)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward here")


def test_a_baseline_that_refuses_its_backward_keeps_its_forward(benchmark, monkeypatch, tmp_path):
    functions = {"lasp": lasp.lightning_attention, "fla chunk_simple_gla": WithoutBackward.apply}
    monkeypatch.setattr(benchmark.kernels, "implementations", lambda shape, only: functions)
    monkeypatch.setattr(benchmark.baselines, "compile_ahead", lambda *_, **__: None)
    monkeypatch.setattr(benchmark.baselines, "untuned", contextlib.nullcontext)
    monkeypatch.setattr(benchmark, "MEANS", (-0.1,))
    flags = ("--shapes", "1,70,2,16", "--error-tokens", "100", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["kernels_by_token.py", *flags])
    benchmark.main()
    report = json.loads((tmp_path / "kernels_by_token.json").read_text())
    *_, row = report["rows"]
    assert row["forward_ms"] > 0 and row["backward_ms"] is None and 0 < row["error"] < 1e-2
    (errors,) = report["errors"]
    assert errors["fla chunk_simple_gla, 2 heads"] is None and errors["lasp, 2 heads"] > 0
    table = (tmp_path / "kernels_by_token.md").read_text()
    assert "x / - |" in table and "70, 2, 16, 16: RuntimeError: no backward here" in table


def test_an_error_of_lasp_ends_the_run(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(
        benchmark.kernels, "implementations", lambda shape, only: {"lasp": WithoutBackward.apply}
    )
    with pytest.raises(RuntimeError, match="no backward here"):
        run(benchmark, monkeypatch, tmp_path, "--shapes", "1,70,2,16", "--no-errors")
    with pytest.raises(RuntimeError, match="no backward here"):
        run(
            benchmark,
            monkeypatch,
            tmp_path,
            "--shapes",
            "1,70,2,16",
            "--no-times",
            "--error-tokens",
            "100",
        )
