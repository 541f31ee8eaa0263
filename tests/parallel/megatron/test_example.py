"""examples/megatron_gpt.py trains, and resumes from its checkpoint with other parallel sizes."""

import pytest


@pytest.mark.slow
def test_it_resumes_with_other_parallel_sizes(megatron, tmp_path):
    expected = megatron.run("example", (1, 2), ["--train-iters=4"])[0]
    assert expected[3] < expected[0]
    save = [f"--save={tmp_path}"]
    first = megatron.run("example", (1, 2), [*save, "--train-iters=2"])
    second = megatron.run("example", (2, 1), [*save, "--train-iters=4", "--sequence-parallel"])
    for before, after in zip(first, second, strict=True):
        assert before == expected[:2]
        assert after == pytest.approx(expected[2:], rel=1e-5)


def test_it_trains_in_bfloat16_with_pipelines_recomputation_and_softmax_layers(megatron):
    options = ["--bf16", "--recompute", "--layer-types=LS", "--use-distributed-optimizer"]
    for losses in megatron.run("example", (1, 2, 2), [*options, "--train-iters=4"]):
        assert losses[3] < losses[0]


def test_it_refuses_before_training_what_it_could_not_save(megatron, tmp_path):
    options = [f"--save={tmp_path}", "--use-distributed-optimizer"]
    for message in megatron.run("example", (1, 2), options):
        assert "--save with --use-distributed-optimizer" in message
