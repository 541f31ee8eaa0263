"""Metrics are of the whole job, and each step is recorded once."""

import json
import math

import pytest

from launch.config import Config
from launch.metrics import (
    MetricsLog,
    Speedometer,
    format_line,
    loss_metrics,
    moving_average,
    plot_loss,
)


def record(step, **more):
    return {"step": step, "loss": 2.0 / step, **more}


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.job.dump_folder = str(tmp_path)
    return config


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resumed_log_has_each_step_once(config):
    log = MetricsLog(config, 0)
    for step in range(1, 8):
        log.write(record(step))
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 8, "lo')
    log = MetricsLog(config, 4)
    log.write(record(5))
    log.close()
    assert steps(log.path) == [1, 2, 3, 4, 5]
    assert MetricsLog(config, 0).path.read_text() == ""


@pytest.mark.parametrize(
    "damage",
    [
        '{"step": 3, "loss": 9.0}\n{"step": 2, "loss": 9.0}\n{"step": 3, "loss": 0.5}\n',
        '{"step": null, "loss": 1.0}\n{"step": "3", "loss": 1.0}\n{"loss": 1.0}\n',
        '{"step": 2, "loss": null}\n{"step": 2, "loss": "x"}\n{"step": true, "loss": 1}\n',
        "[" * 100_000 + "\n",
        "[]\nnull\n17\n\n\0\0\0\n\ufffd\n",
        '{"step": 4, "lo{"step": 4, "loss": 1.0}\n',
        '{"step": 4, "loss": 1.0',
    ],
)
def test_any_metrics_file_becomes_one_clean_series(config, damage):
    """Steps taken twice, lines torn by a kill or by a second job, lines of something else."""
    log = MetricsLog(config, 0)
    for step in (1, 2, 3, 4, 5):
        log.write(record(step))
    log.close()
    with log.path.open("a") as file:
        file.write(damage)
    assert plot_loss(log.path) is not None
    log = MetricsLog(config, 3)
    for step in (4, 5):
        log.write(record(step, again=True))
    log.close()
    series = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [each["step"] for each in series] == [1, 2, 3, 4, 5]
    assert ["again" in each for each in series] == [False] * 3 + [True] * 2
    # Of a step that is there twice, the last one.
    assert series[2]["loss"] == (0.5 if "0.5" in damage else 2.0 / 3)


def test_a_run_from_scratch_keeps_the_record_of_the_one_before(config):
    for step in (1, 2):
        log = MetricsLog(config, 0)
        log.write(record(step))
        log.close()
    MetricsLog(config, 0)
    names = ["metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl"]
    assert [steps(log.path.with_name(name)) for name in names] == [[1], [2], []]


def test_losses_survive_to_the_bit(config):
    loss = math.pi / 3
    log = MetricsLog(config, 0)
    log.write({"step": 1, "loss": loss})
    log.close()
    MetricsLog(config, 1).close()
    assert json.loads(log.path.read_text())["loss"] == loss


def test_perplexity_and_bits_per_byte():
    assert loss_metrics(math.log(8), 1.0) == pytest.approx(
        {"loss": 2.0794, "ppl": 8, "bpb": 3}, 1e-4
    )
    # Tokens of four bytes share their bits among them.
    assert loss_metrics(math.log(8), 4.0)["bpb"] == pytest.approx(0.75)
    assert "bpb" not in loss_metrics(1.0, None)
    assert math.isfinite(loss_metrics(1e6, None)["ppl"])


def test_speed_counts_tokens_once_and_every_device():
    speed = Speedometer(1000, flops_per_token=6e6, world_size=4, peak=1e9)
    for _ in range(5):
        speed.add_step(2.0)
    rates = speed.read(steps_left=10)
    assert rates["tok/s"] == 500
    assert rates["tok/s/gpu"] == 125
    assert rates["mfu"] == pytest.approx(500 * 6e6 / 4e9)
    assert rates["eta"] == 20
    speed.add_step(1.0)
    assert speed.read(steps_left=0)["tok/s"] == 1000
    unknown = Speedometer(1000, 6e6, 4, None)
    unknown.add_step(1.0)
    assert "mfu" not in unknown.read(0)


def test_the_time_left_ignores_compilation():
    speed = Speedometer(1000, 6e6, 1, None)
    speed.add_step(180.0)
    assert speed.read(steps_left=119)["eta"] == 119 * 180
    for _ in range(2):
        speed.add_step(0.4)
    assert speed.read(steps_left=117)["eta"] == pytest.approx(117 * 0.4)
    for _ in range(57):
        speed.add_step(0.4)
    assert speed.read(steps_left=60)["eta"] == pytest.approx(24)


def test_the_time_left_follows_a_lasting_change():
    speed = Speedometer(1000, 6e6, 1, None)
    for seconds in [1.0] * 100 + [3.0] * 20:
        speed.add_step(seconds)
    assert speed.read(steps_left=10)["eta"] == 30


def test_the_smoothed_loss_is_the_mean_of_the_values_before():
    assert moving_average([4.0, 2.0, 6.0, 1.0], 1) == [4.0, 2.0, 6.0, 1.0]
    assert moving_average([4.0, 2.0, 6.0, 1.0], 2) == [4.0, 3.0, 4.0, 3.5]
    assert moving_average([4.0, 2.0], 5) == [4.0, 3.0]


def test_the_line_can_be_grepped():
    metrics = {
        "step": 120,
        **loss_metrics(3.2145, 1.0),
        "grad_norm": 0.41213,
        "lr": 3e-4,
        "tok/s": 812334.2,
        "tok/s/gpu": 101541.8,
        "mfu": 0.396,
        "memory": 41.22,
        "elapsed": 721.4,
        "eta": 11144.0,
    }
    assert format_line(metrics, 2000) == (
        "step: 120/2000  loss: 3.2145  ppl: 24.89  bpb: 4.6375  grad_norm: 0.4121  lr: 3.000e-04  "
        "tok/s: 812,334  tok/s/gpu: 101,542  mfu: 39.6%  memory: 41.22GiB  [0:12:01<3:05:44]"
    )


def test_the_loss_curve_is_a_picture_beside_the_metrics(config):
    log = MetricsLog(config, 0)
    assert plot_loss(log.path) is None
    for step in range(1, 5):
        log.write(record(step, **({"val_loss": 1.5} if step == 4 else {})))
    log.close()
    picture = plot_loss(log.path)
    assert picture.parent == log.path.parent
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
