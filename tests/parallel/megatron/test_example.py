"""The examples train, and resume from their checkpoints with other parallel sizes."""

import json

import pytest
import torch

from lasp.tnl import TNLConfig


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


def test_it_resumes_in_bfloat16(megatron, tmp_path):
    """The rates of LRPE stay in float32, which Megatron's optimizer by itself cannot save."""
    options, save = ["--bf16", "--layer-types=LS"], [f"--save={tmp_path}", "--save-interval=2"]
    expected = megatron.run("example", (1, 2), [*options, "--train-iters=4"])[0]
    first = megatron.run("example", (1, 2), [*options, *save, "--train-iters=2"])
    again = megatron.run("example", (1, 2), [*options, *save, "--train-iters=4"])
    for before, after in zip(first, again, strict=True):
        assert before == expected[:2]
        assert after == expected[2:]


def test_the_optimizer_of_float32_and_16_bit_parameters_is_restored(megatron, tmp_path):
    saved = megatron.run("optimizer_states", (1, 2), tmp_path, save=True)
    same = megatron.run("optimizer_states", (1, 2), tmp_path, save=False)
    sharded = megatron.run("optimizer_states", (2, 1), tmp_path, save=False)
    wanted = saved[0]["saved"]
    # Without weight decay: 16-bit weights of layers before and after the rates of layer 0.
    ends = [name for name in wanted["copies"] if name.endswith(("theta", "norm.weight"))]
    assert len(ends) == 1 + TNLConfig.preset("tiny").num_layers
    assert all(x.abs().sum() > 0 for tensors in wanted.values() for x in tensors.values())
    for found in (*saved, *same, *sharded):
        for how, kinds in found.items():
            for kind, tensors in kinds.items():
                for name, x in tensors.items():
                    assert torch.equal(x, wanted[kind][name]), (how, kind, name)


def test_it_trains_in_bfloat16_with_pipelines_recomputation_and_softmax_layers(megatron):
    options = ["--bf16", "--recompute", "--layer-types=LS", "--use-distributed-optimizer"]
    options += ["--overlap-grad-reduce", "--overlap-param-gather"]
    for losses in megatron.run("example", (1, 2, 2), [*options, "--train-iters=4"]):
        assert losses[3] < losses[0]


def test_it_refuses_before_training_what_it_could_not_save(megatron, tmp_path):
    options = [f"--save={tmp_path}", "--use-distributed-optimizer"]
    for message in megatron.run("example", (1, 2), options):
        assert "--save with --use-distributed-optimizer" in message


def test_its_norm_of_gradients_is_that_of_megatron(megatron):
    tensors = [torch.randn(5, 7), torch.full((3,), 1e3)]
    for ours, theirs in megatron.run("norms_of_example", tensors):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
        assert ours.item() == pytest.approx(torch.cat([x.flatten() for x in tensors]).norm().item())


@pytest.mark.parametrize("grad_norm", [2.0, torch.tensor([2.0])], ids=["number", "tensor"])
def test_its_steps_report_numbers(megatron, grad_norm):
    """With Transformer Engine or apex, Megatron's optimizer gives a tensor of one element."""
    for step in megatron.run("step_of_example", grad_norm):
        assert step == (0.5, 2.0, True)
        assert f"{step[1]:.3f}" == "2.000"


SHAPE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4)
SHAPE |= dict(head_dim=8, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4)
SHAPE |= dict(v_head_dim=8, num_experts=8, moe_intermediate_size=16, group_norm_size=2)
SHAPE |= dict(num_hidden_layers=4, layer_group_size=4)


def test_the_hybrid_with_experts_resumes_with_other_parallel_sizes(megatron, tmp_path):
    """TP, CP and EP; MLA, MoE and MTP."""
    options, name = [f"--shape={json.dumps(SHAPE)}"], "megatron_hybrid_moe.py"
    save = [*options, f"--save={tmp_path}"]
    expected = megatron.run("example", (1, 2, 1, 2), [*options, "--train-iters=4"], name)[0]
    assert len(expected) == 4
    first = megatron.run("example", (1, 2, 1, 2), [*save, "--train-iters=2"], name)
    more = [*save, "--train-iters=4", "--sequence-parallel"]
    second = megatron.run("example", (2, 2, 1, 2), more, name)
    for before, after in zip(first, second, strict=True):
        assert before == expected[:2]
        assert after == pytest.approx(expected[2:], rel=1e-5)
