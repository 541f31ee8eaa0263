"""Hybrids with MLA, experts and multi-token prediction: any mix of ranks gives one process's
loss and gradients."""

import pytest
import torch

from lasp import decay

slow = pytest.mark.slow

LING = dict(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    kv_channels=8,
    normalization="RMSNorm",
    add_bias_linear=False,
    gated_linear_unit=True,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    init_method_std=0.05,
    qk_layernorm=True,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=8,
    rope_type="rope",
    num_moe_experts=4,
    moe_ffn_hidden_size=24,
    moe_shared_expert_intermediate_size=24,
    moe_router_topk=2,
    moe_router_num_groups=2,
    moe_router_group_topk=1,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
    mtp_num_layers=1,
    mtp_loss_scaling_factor=0.3,
)
LING_SPEC = dict(
    pattern="3:1",
    dense_first=1,
    decay="ling",
    feature_map="none",
    scale=8**-0.5,
    rotary_percent=0.5,
    output_gate="sigmoid",
    output_norm="rms",
    output_norm_groups=4,
)


def check(outcomes, loss, grads, bound=3e-6):
    for seen_loss, seen in outcomes:
        assert seen_loss == pytest.approx(loss, rel=bound)
        assert seen.keys() == grads.keys()
        for name, expected in grads.items():
            error = (seen[name] - expected).norm() / expected.norm()
            assert error < bound, (name, error.item())


class Reference:
    """One process's loss and gradients of a model, and its weights in a checkpoint folder, from
    which other mixes of ranks start."""

    def __init__(self, megatron, folder, fields, options, *, lengths=None, **keywords):
        self.megatron, self.folder, self.fields, self.options = megatron, folder, fields, options
        self.lengths, self.keywords = lengths, keywords
        shape = (2, 33) if lengths is None else (1, sum(lengths) + 1)
        self.tokens = torch.randint(64, shape, generator=torch.Generator().manual_seed(1))
        self.loss, self.grads = self.run((1, 1), options, first=True)[0]

    def run(self, sizes, options, **keywords):
        return self.megatron.run(
            "hybrid_cases.run_hybrid",
            sizes,
            self.fields,
            options,
            self.tokens,
            self.folder,
            lengths=self.lengths,
            **self.keywords,
            **keywords,
        )

    def check(self, sizes, layout):
        outcomes = self.run(sizes, self.options | dict(layout=layout))
        check(outcomes, self.loss, self.grads)


# Tensor, context, pipeline and expert parallel.
MIXES = [
    ((2, 2, 1, 2), "zigzag"),
    ((1, 2, 2, 2), "contiguous"),
    pytest.param((1, 2, 2, 2), "zigzag", marks=slow),
    pytest.param((2, 2, 1, 2), "contiguous", marks=slow),
    pytest.param((1, 4, 1, 4), "zigzag", marks=slow),
    pytest.param((1, 4, 1, 1), "contiguous", marks=slow),
    pytest.param((2, 1, 2, 2), "zigzag", marks=slow),
    pytest.param((4, 1, 1, 4), "zigzag", marks=slow),
]


@pytest.fixture(scope="module")
def ling(megatron, tmp_path_factory):
    return Reference(megatron, tmp_path_factory.mktemp("ling"), LING, LING_SPEC)


@pytest.mark.parametrize(("sizes", "layout"), MIXES, ids=str)
def test_loss_and_gradients_are_those_of_one_process(ling, sizes, layout):
    """With weights and gradients that cross dist_checkpointing from one mix of ranks to another."""
    ling.check(sizes, layout)


@pytest.fixture(scope="module")
def packed(megatron, tmp_path_factory):
    """Documents of any length, also of one token."""
    folder = tmp_path_factory.mktemp("packed")
    return Reference(megatron, folder, LING, LING_SPEC, lengths=[13, 1, 29, 21])


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ((2, 2, 1, 2), "zigzag"),
        ((1, 4, 1, 4), "contiguous"),
        pytest.param((1, 4, 1, 1), "zigzag", marks=slow),
        pytest.param((1, 2, 2, 2), "contiguous", marks=slow),
    ],
    ids=str,
)
def test_packed_documents_have_positions_of_their_own_over_ranks(packed, sizes, layout):
    """Rotary positions, states, scores and predicted tokens end with a document."""
    packed.check(sizes, layout)


@pytest.mark.parametrize("masked", [8, 24])
@pytest.mark.parametrize("per_token", [False, True])
def test_predicted_tokens_weigh_the_same_over_ranks(megatron, tmp_path, per_token, masked):
    """Of 32 tokens; with 24 masked the first rank has no loss. The loss is a sum of tokens, or a
    mean, which Megatron takes by default."""
    fields = LING | dict(calculate_per_token_loss=per_token)
    reference = Reference(megatron, tmp_path, fields, LING_SPEC, masked=masked)
    reference.check((1, 2), "contiguous")


@slow
def test_prediction_layers_may_be_linear(megatron, tmp_path):
    options = dict(mtp_kind="L", decay_index=2)
    reference = Reference(megatron, tmp_path, LING, LING_SPEC, **options)
    for layout in ("zigzag", "contiguous"):
        reference.check((1, 2, 2, 2), layout)


_NOT_MINIMAX = (
    *(name for name in LING if "lora" in name or "head_dim" in name or "mtp" in name),
    *("qk_layernorm", "rope_type", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_enable_expert_bias", "moe_router_topk_scaling_factor"),
    "moe_shared_expert_intermediate_size",
)
MINIMAX = {name: LING[name] for name in LING if name not in _NOT_MINIMAX} | dict(
    num_query_groups=2, moe_router_score_function="softmax"
)
MINIMAX_SPEC = dict(
    pattern="3:1",
    decay="minimax",
    feature_map="silu_qkv",
    output_norm="rms",
    output_norm_eps=1e-6,
    output_gate="sigmoid",
    rotary="none",
    residual=dict(linear=(1.1, 0.9), softmax=(1.2, 0.8), mlp=(1.3, 0.7)),
)


@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=slow)])
def test_a_residual_after_the_norm_beside_grouped_queries(megatron, tmp_path, layout):
    """MiniMax-01's: all heads in linear layers, two key heads and rotary positions in softmax
    layers, one norm over the heads of both tensor-parallel ranks."""
    Reference(megatron, tmp_path, MINIMAX, MINIMAX_SPEC).check((2, 2, 1, 2), layout)


@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=slow)])
def test_patterns_of_the_hybrid_stack(megatron, tmp_path, layout):
    """Experts and, where Megatron has them, latent attention and multi-token prediction."""
    pytest.importorskip("triton", reason="Megatron's hybrid stack imports triton")
    from megatron.core import __version__

    options = {name: LING_SPEC[name] for name in LING_SPEC if name != "dense_first"}
    if __version__ < "0.18":
        fields = MINIMAX | dict(num_layers=4)
        options = MINIMAX_SPEC | dict(pattern="M-*E")
        del options["residual"]
    else:
        fields = LING | dict(num_layers=6)
        options["pattern"] = "G-GE+E/+E"
    Reference(megatron, tmp_path, fields, options | dict(stack=True)).check((2, 2, 1, 2), layout)


def test_decays_count_all_layers_and_those_of_prediction_follow_the_spec(megatron):
    """Megatron's versions give layers of multi-token prediction different numbers."""
    seen, predicting = megatron.run("hybrid_cases.decays_of_layers", LING, LING_SPEC, 2)[0]
    expected = [decay.ling(4, layer, 4) for layer in range(3)]
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    torch.testing.assert_close(predicting, [decay.ling(4, 2, 4)], rtol=0, atol=0)
