"""Fused parts of a model in Megatron compute what they replace."""

import pytest
import torch

S, B, V = 21, 2, 48
TINY = dict(vocab_size=64, dim=32, num_layers=2, num_heads=4, glu_dim=48, init_std=0.2)
TOKENS = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(3))


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(S, B, V, generator=generator)
    # A softmax without large logits overflows nothing.
    logits[3, 0, 5], logits[4, 1, V - 1] = 300, -300
    labels = torch.randint(V, (S, B), generator=generator)
    labels[3, 0], labels[4, 1] = 7, V - 1
    weights = torch.rand(S, B, generator=generator)
    return logits.to(dtype), labels, weights


@pytest.mark.parametrize("most", [1 << 30, 7 * V, 1], ids=["one part", "parts", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_losses_and_gradients_are_megatrons(megatron, tp, dtype, most):
    logits, labels, weights = problem(dtype)
    wanted = torch.nn.functional.cross_entropy(
        logits.double().movedim(-1, 1), labels, reduction="none"
    )
    for ours, theirs in megatron.run(
        "fused_cases.token_losses", (tp, 1), logits, labels, weights, most
    ):
        losses, grads = ours
        assert losses.dtype == torch.float32 and grads.dtype == dtype
        torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(losses, theirs[0], rtol=1e-6, atol=1e-5)
        rtol = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(grads, theirs[1], rtol=rtol, atol=1e-6)


def test_negative_labels_add_nothing(megatron):
    logits, labels, weights = problem(torch.float32)
    logits[0] = torch.inf
    labels[0] = -100
    for (losses, grads), _ in megatron.run(
        "fused_cases.token_losses", (2, 1), logits, labels, weights, 1 << 30
    ):
        assert (losses[0] == 0).all() and (grads[0] == 0).all()
        assert losses[1:].isfinite().all() and grads.isfinite().all() and (grads[1:] != 0).any()


GPT = dict(num_layers=2, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
GPT |= dict(normalization="RMSNorm", hidden_dropout=0.0)
# Loss and gradients of multi-token prediction do not reach what a model returns: an auxiliary loss.
HYBRID = GPT | dict(mtp_num_layers=1, qk_layernorm=True)
LIGHTNING = dict(pattern="1:1", output_gate="sigmoid", output_norm="rms")


@pytest.mark.parametrize(
    "sizes, kind, fields, options",
    [((1, 2), "tnl", TINY, {}), ((2, 1), "tnl", TINY, {}), ((2, 2), "hybrid", HYBRID, LIGHTNING)],
    ids=["cp", "tp", "hybrid with multi-token prediction"],
)
def test_a_model_has_the_gradients_of_its_own_loss(megatron, sizes, kind, fields, options):
    run = ("fused_cases.model_losses", sizes, kind, fields, TOKENS, options)
    for ours, own in megatron.run(*run):
        assert ours[0] == pytest.approx(own[0], rel=1e-6)
        for name, x in own[1].items():
            assert (ours[1][name] - x).norm() <= 3e-6 * x.norm(), name


def test_what_is_no_language_model_is_refused(megatron):
    for message in megatron.run("fused_cases.refused"):
        assert "needs a language model of Megatron's inside" in message


RECOMPUTED = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LOSS = {"log_norm_and_label", "_write_gradient"}
LAYER = {"_silu", "_product_of_halves"}
OVER_TP = {"_squares", "_scaled", "_inner_product", "_gradients"}


@pytest.mark.parametrize(
    "sizes, kind, fields, options, names",
    [
        ((1, 2), "tnl", TINY, dict(megatron=RECOMPUTED), {*LAYER, "_grouped_norm"}),
        ((2, 1), "tnl", TINY, dict(megatron=RECOMPUTED), LAYER | OVER_TP),
        ((1, 2), "hybrid", GPT | RECOMPUTED, LIGHTNING, {"_grouped_norm", "_gated"}),
        ((2, 1), "hybrid", GPT | RECOMPUTED, LIGHTNING, {*OVER_TP, "_product", "_gated"}),
    ],
    ids=["TNL, cp", "TNL, tp", "hybrid, cp", "hybrid, tp"],
)
def test_fused_parts_compile_without_breaks_and_change_nothing(
    megatron, sizes, kind, fields, options, names
):
    """As on a GPU. Each graph takes seconds of the first step."""
    run = ("fused_cases.fused_gradients", sizes, kind, fields, TOKENS, options)
    for (value, grads, compiled), (eager_value, eager, nothing) in megatron.run(*run):
        assert compiled == names | LOSS and not nothing
        assert value == pytest.approx(eager_value, rel=1e-6)
        for name, x in eager.items():
            assert (grads[name] - x).norm() <= 3e-6 * x.norm(), name


def test_no_tokens(megatron):
    logits, labels = torch.zeros(0, 1, V), torch.zeros(0, 1, dtype=torch.int64)
    run = ("fused_cases.token_losses", (2, 1), logits, labels, torch.zeros(0, 1), 1 << 30)
    for (losses, grads), _ in megatron.run(*run):
        assert losses.shape == (0, 1) and grads.shape == (0, 1, V // 2)
