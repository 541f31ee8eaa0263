"""Megatron's own engines around the TNL: DDP, optimizers, checkpoints, recomputation, pipelines."""

import pytest
import torch

from tests.parallel.megatron.test_example import SHAPE

TINY = dict(vocab_size=64, dim=32, num_layers=4, num_heads=4, glu_dim=48, init_std=0.2)
TINY |= dict(lrpe_layers=(0, 2))
GPT = dict(num_layers=4, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
GPT |= dict(normalization="RMSNorm", hidden_dropout=0.0)
slow = pytest.mark.slow
PAIRS = [(1, 2), (2, 1)]
TOKENS = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def one_rank(megatron):
    """(losses, weights) of three steps without sharding."""
    return megatron.run("train", (1, 1), TINY, TOKENS, {})[0]


def check(outcomes, one_rank, bound=1e-4):
    losses, weights = one_rank
    assert losses[2] < losses[0]
    for seen_losses, seen in outcomes:
        assert seen_losses == pytest.approx(losses, rel=1e-5)
        for name, x in seen.items():
            assert (x - weights[name]).norm() < bound * weights[name].norm(), name


@pytest.mark.parametrize("distributed", [False, True], ids=["ddp", "distributed optimizer"])
@pytest.mark.parametrize("sizes", [(2, 2), *(pytest.param(x, marks=slow) for x in PAIRS)])
def test_training_is_that_of_one_rank(megatron, one_rank, sizes, distributed):
    ddp = dict(use_distributed_optimizer=distributed, overlap_grad_reduce=distributed)
    check(megatron.run("train", sizes, TINY, TOKENS, {}, ddp=ddp), one_rank)


def test_pipeline_stages_and_micro_batches(megatron, one_rank):
    """The decay of a layer depends on its number in the full model, not in its stage."""
    outcomes = megatron.run("train", (1, 2, 2), TINY, TOKENS, {}, micro=2)
    check(outcomes, one_rank)


FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
SELECTIVE = dict(recompute_granularity="selective")


@pytest.mark.parametrize(
    "kind, fields, recompute, late",
    [
        ("tnl", TINY, FULL, {}),
        ("gpt", GPT, SELECTIVE, {}),
        ("tnl", TINY | dict(layer_types="LS"), FULL, {}),
        # Transformer Engine's checkpoint, but not its FP8: the layers were built without.
        ("gpt", GPT, FULL, dict(late=dict(fp8="hybrid"))),
        pytest.param("gpt", GPT, FULL, {}, marks=slow),
    ],
    ids=["tnl, full", "gpt, selective", "hybrid, full", "gpt, FP8", "gpt, full"],
)
def test_recomputation_repeats_no_exchange(megatron, kind, fields, recompute, late):
    run = ("gradients", (1, 2), kind, fields, TOKENS)
    plain = megatron.run(*run, {})
    again = megatron.run(*run, dict(megatron=recompute) | late)
    for (loss, grads, count), (seen_loss, seen, seen_count) in zip(plain, again, strict=True):
        # One per layer in the forward, one in the backward.
        assert seen_count == count == 2 * fields["num_layers"]
        assert seen_loss == loss
        for name, x in seen.items():
            torch.testing.assert_close(x, grads[name], rtol=0, atol=0, msg=name)


def test_recomputation_in_a_pipeline(megatron, one_rank):
    """Several forwards precede the first backward; each must replay its own exchange."""
    recompute = dict(recompute_granularity="full", recompute_method="uniform")
    options = dict(megatron=recompute | dict(recompute_num_layers=1))
    check(megatron.run("train", (1, 2, 2), TINY, TOKENS, options, micro=2), one_rank)


def test_a_forward_without_its_backward_is_detected_by_the_next_recomputation(megatron):
    for outcome in megatron.run("recompute_after_a_lost_forward", TINY, TOKENS):
        assert "met the exchange of other tokens" in outcome


def test_layers_that_are_not_checkpointed_keep_no_exchanges(megatron):
    """Forwards in evaluation, then two without gradients in training mode, then one with them."""
    for lengths in megatron.run("saved_without_gradients"):
        assert lengths == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "hybrid", [False, pytest.param(True, marks=slow)], ids=["linear", "hybrid"]
)
def test_a_checkpoint_reshards(megatron, tmp_path, hybrid):
    fields = TINY | dict(layer_types="LS") if hybrid else TINY
    run = ("train", (1, 2), fields, TOKENS, {})
    six_losses, weights = megatron.run(*run, steps=6)[0]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    megatron.run(*run, save=folder)
    outcomes = megatron.run("train", (2, 1), fields, TOKENS, {}, load=folder)
    check(outcomes, (six_losses[3:], weights))


def test_checkpoints_have_every_parameter(megatron):
    tnl, hybrid = TINY | dict(layer_types="LS"), SHAPE | dict(vocab_size=64)
    for unsaved in megatron.run("unsaved_parameters", tnl, GPT, hybrid):
        assert unsaved == {"TNL": [], "GPT": [], "hybrid": []}


def test_half_precision_keeps_decay_and_rates_in_float32(megatron):
    """Float16Module casts every buffer, so the decay must not be one."""
    for decay, expected, theta, loss in megatron.run("half_precision", TINY, TOKENS):
        assert decay.dtype == theta.dtype == torch.float32
        assert torch.equal(decay, expected)
        assert loss == pytest.approx(torch.log(torch.tensor(64.0)).item(), rel=0.2)
