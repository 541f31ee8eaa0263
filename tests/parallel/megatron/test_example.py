"""examples/megatron_gpt.py: it trains, and goes on from its checkpoint with other sizes."""

import pytest


def test_it_resumes_on_another_layout(megatron, tmp_path):
    whole = megatron.run("example", (1, 2), ["--train-iters=4"])[0]
    assert whole[3] < whole[0]
    save = [f"--save={tmp_path}"]
    first = megatron.run("example", (1, 2), [*save, "--train-iters=2"])
    second = megatron.run("example", (2, 1), [*save, "--train-iters=4", "--sequence-parallel"])
    for before, after in zip(first, second, strict=True):
        assert before == whole[:2]
        assert after == pytest.approx(whole[2:], rel=1e-5)


def test_it_takes_bfloat16_pipelines_recomputation_and_softmax_layers(megatron):
    options = ["--bf16", "--recompute", "--layer-types=LS", "--use-distributed-optimizer"]
    for losses in megatron.run("example", (1, 2, 2), [*options, "--train-iters=4"]):
        assert losses[3] < losses[0]


def test_it_refuses_before_training_what_it_could_not_save(megatron, tmp_path):
    options = [f"--save={tmp_path}", "--use-distributed-optimizer"]
    for said in megatron.run("example", (1, 2), options):
        assert "--save with --use-distributed-optimizer" in said
