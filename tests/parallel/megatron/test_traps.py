"""What goes wrong silently between Megatron and a linear attention is refused, or made right."""

import re

import pytest
import torch

from lasp import decay

SENTENCES = {
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
    "unagreed layout": "layout='contiguous' over 2 context-parallel ranks",
    "key-value cache": "4 queries meet 8 keys",
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
    "vocabulary": "'vocabulary rows': 63.* do not fit tensor-parallel size 2",
}


@pytest.fixture(scope="module")
def complaints(megatron):
    return megatron.run("traps.complaints")


@pytest.mark.parametrize("name", SENTENCES)
def test_what_is_wrong_gets_a_sentence_on_every_rank(complaints, name):
    for said in complaints:
        assert said.keys() == SENTENCES.keys()
        assert re.search(SENTENCES[name], said[name]), said[name]


def test_zigzag_batches_are_megatrons_own(megatron):
    for pairs in megatron.run("traps.splits"):
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            assert ours["labels"] is None
            for name in ours.keys() - {"labels"}:
                assert torch.equal(ours[name], theirs[name]), name


def test_the_block_spec_brings_its_final_norm(megatron):
    """With a package named apex in reach, Megatron's own choice refuses RMSNorm."""
    for ours, bare in megatron.run("traps.final_norm_where_megatron_has_none"):
        assert ours == "MegatronSRMSNorm"
        assert bare.startswith("(RMSNorm) is not supported")


def test_apex_norms_where_they_are_asked_for(megatron):
    """With a stand-in for apex, which only a GPU machine can have."""
    for ours, apexs, calls in megatron.run("traps.loss_with_apex_norm"):
        assert apexs == pytest.approx(ours, rel=1e-6)
        # Two norms per layer and the final one.
        assert calls == 2 * 3 + 1


def test_a_list_of_comm_types_goes_to_its_layers(megatron):
    """Megatron 0.16 looks the last layer's up behind the end."""
    kinds = ["p2p", "all_gather", "p2p"]
    for seen in megatron.run("traps.exchanges_by_layer", kinds):
        assert seen == ["ring", "all_gather", "ring"]


def test_the_decay_counts_what_it_is_told_to_count(megatron):
    for said, expected in megatron.run("traps.decays_in_a_stack_that_counts_mlps"):
        assert torch.equal(said, expected)


@pytest.mark.slow
def test_pipeline_stages_of_the_hybrid_stack_count_on(megatron):
    pytest.importorskip("triton", reason="Megatron's hybrid stack imports triton")
    stages = megatron.run("traps.decay_on_a_stage_of_the_hybrid_stack")
    assert {stage for stage, *_ in stages} == {0, 1}
    for stage, seen, layer_number, with_lrpe in stages:
        assert torch.equal(seen, decay.tnl(4, stage, 2))
        assert (layer_number, with_lrpe) == (1 + 2 * stage, stage == 0)


def test_megatrons_spec_objects_are_left_alone(megatron):
    for untouched, ours, params in megatron.run("traps.spec_is_left_alone"):
        assert untouched and ours
        assert params == dict(decay="none")


@pytest.mark.parametrize("context_parallel", [1, 2])
def test_packed_documents_do_not_see_each_other(megatron, context_parallel):
    for together, apart in megatron.run("traps.packed_documents", context_parallel):
        torch.testing.assert_close(together, apart)


def test_rates_are_spared_from_weight_decay(megatron):
    for factors in megatron.run("traps.weight_decays"):
        spared = {name for name, factor in factors.items() if factor == 0}
        assert spared == {"decoder.layers.0.self_attention.lrpe.theta"}


def test_virtual_pipeline_stages_count_on(megatron):
    """Decay, LRPE and the embedding's scale follow a layer's number in the whole model."""
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
