"""What could go wrong silently between Megatron and linear attention is refused or handled."""

import re

import pytest
import torch

from lasp import decay

MESSAGES = {
    "dropout": "attention_dropout is 0.1",
    "mask": "attn_mask_type is padding: attention is causal",
    "cross attention": "attention_type is 'cross'",
    "window": r"config.window_size is \(8, 0\)",
    "layout": "layout is 'striped': choose one of contiguous, zigzag",
    "exchange": "exchange is 'p2p': choose one of all_gather, auto, doubling, ring",
    "comm type": "cp_comm_type is 'a2a'",
    "decay": "decay is 'alibi': choose one of tnl, minimax, ling, retention, none",
    "decay index": "layer is 3: layers are counted from 0 to num_layers - 1 = 2",
    "feature map": "feature_map is 'relu'",
    "unconfirmed layout": "layout='contiguous' over 2 context-parallel ranks",
    "key-value cache": "4 queries and 8 keys are given",
    "heads": "query has 2 heads: this rank was built for 4",
    "bias": "attention_bias is given",
    "mask in the call": "attn_mask_type is no_mask",
    "packed over ranks": r"packed_seq_params \(thd\) over 2 context-parallel ranks in zigzag",
    "packed rotary positions": r"packed_seq_params \(thd\) over 2 .* with rotary positions",
    "other rotary positions": "has a MultimodalRotaryEmbedding, which supports zigzag only",
    "latent attention": "config.multi_latent_attention is True",
    "softmax": "config.softmax_type is 'off-by-one'",
    "packed otherwise": "qkv_format is 'sbhd'",
    "two layouts": "name the layouts .*zigzag.*: there must be exactly one",
    "no layout": r"name the layouts set\(\): there must be exactly one",
    "zigzag only": "has a TEDotProductAttention, which supports zigzag only",
    "length": "a sequence of 6 tokens does not split into 4 equal chunks",
    "inference": "does not support Megatron's inference",
    "layer types": "layer_types is 'LLLS'.*a divisor of that \\(3\\)",
    "base spec": "it needs submodules.self_attention.submodules.core_attention",
    "norm": "norm is 'fused': choose one of torch, apex",
    "apex norm": "apex's FusedRMSNorm is requested.*fused_layer_norm_cuda.*PyPI is another program",
    "apex fusion": "gradient accumulation fusion is requested.*fused_weight_gradient_mlp_cuda",
    "pattern": r"pattern is '\*-\*-': it needs a [GM] \(linear attention\)",
    "learned decay": "decay is 'learned': the layers of the Megatron plug-in have fixed decays",
    "variant": "the config has {'norm': 'layer'}: the layers of the Megatron plug-in are those",
    "vocabulary": "'vocabulary rows': 63.* do not fit tensor-parallel size 2",
}


@pytest.fixture(scope="module")
def errors(megatron):
    return megatron.run("traps.errors")


@pytest.mark.parametrize("name", MESSAGES)
def test_mistakes_are_refused_on_every_rank(errors, name):
    for messages in errors:
        assert messages.keys() == MESSAGES.keys()
        assert re.search(MESSAGES[name], messages[name]), messages[name]


def test_zigzag_batches_are_megatrons_own(megatron):
    for pairs in megatron.run("traps.splits"):
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            assert ours["labels"] is None
            for name in ours.keys() - {"labels"}:
                assert torch.equal(ours[name], theirs[name]), name


def test_the_block_spec_brings_its_final_norm(megatron):
    """Megatron's default refuses RMSNorm if any package named apex is installed."""
    for ours, bare in megatron.run("traps.final_norm_where_megatron_has_none"):
        assert ours == "MegatronSRMSNorm"
        assert bare.startswith("(RMSNorm) is not supported")


def test_apex_norms_are_used_on_request(megatron):
    """With a stand-in for apex, which needs a GPU."""
    for ours, apexs, calls in megatron.run("traps.loss_with_apex_norm"):
        assert apexs == pytest.approx(ours, rel=1e-6)
        # Two norms per layer and the final one.
        assert calls == 2 * 3 + 1


def test_a_list_of_comm_types_is_indexed_by_layer(megatron):
    """Megatron 0.16 reads the last layer's beyond the end."""
    kinds = ["p2p", "all_gather", "p2p"]
    for seen in megatron.run("traps.exchanges_by_layer", kinds):
        assert seen == ["ring", "all_gather", "ring"]


def test_decay_index_overrides_the_layer_number(megatron):
    for actual, expected in megatron.run("traps.decays_in_a_stack_that_counts_mlps"):
        assert torch.equal(actual, expected)


@pytest.mark.slow
def test_pipeline_stages_of_the_hybrid_stack_continue_the_layer_count(megatron):
    pytest.importorskip("triton", reason="Megatron's hybrid stack imports triton")
    stages = megatron.run("traps.decay_on_a_stage_of_the_hybrid_stack")
    assert {stage for stage, *_ in stages} == {0, 1}
    for stage, seen, layer_number, with_lrpe in stages:
        assert torch.equal(seen, decay.tnl(4, stage, 2))
        assert (layer_number, with_lrpe) == (1 + 2 * stage, stage == 0)


def test_megatrons_spec_objects_are_not_changed(megatron):
    for unchanged, ours, params in megatron.run("traps.specs_after_replacing_the_core"):
        assert unchanged and ours
        assert params == dict(decay="none")


@pytest.mark.parametrize("context_parallel", [1, 2])
def test_packed_documents_do_not_see_each_other(megatron, context_parallel):
    for packed, separate in megatron.run("traps.packed_documents", context_parallel):
        torch.testing.assert_close(packed, separate)


def test_lrpe_rates_have_no_weight_decay(megatron):
    for factors in megatron.run("traps.weight_decays"):
        assert {name for name, factor in factors.items() if factor == 0} == {
            "decoder.layers.0.self_attention.lrpe.theta"
        }


def test_virtual_pipeline_stages_continue_the_layer_count(megatron):
    """Decay, LRPE and the embedding's scale follow a layer's number in the full model."""
    fields = dict(vocab_size=64, dim=32, num_layers=4, num_heads=4, glu_dim=48, lrpe_layers=(0, 2))
    seen = megatron.run("traps.layers_of_virtual_stages", fields)
    numbers = {number for of_rank in seen for number, *_ in of_rank}
    assert numbers == set(range(4))
    for of_rank in seen:
        assert [number % 2 for number, *_ in of_rank] in ([0, 0], [1, 1])
        for number, seen_decay, with_lrpe, scale in of_rank:
            assert torch.equal(seen_decay, decay.tnl(4, number, 4))
            assert with_lrpe == (number in (0, 2))
            assert scale == (32**0.5 if number == 0 else None)
