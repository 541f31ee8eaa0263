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
    "decay index": "decay_index is 3: layers are counted from 0 to 2",
    "feature map": "feature_map is 'relu'",
    "unconfirmed layout": "layout='contiguous' over 2 context-parallel ranks",
    "key-value cache": "4 queries and 8 keys are given",
    "heads": "query has 2 heads: this rank was built for 4",
    "bias": "attention_bias is given",
    "mask in the call": "attn_mask_type is no_mask",
    "packed over ranks": r"packed_seq_params \(thd\) over 2 context-parallel ranks in zigzag",
    "packed rotary positions": r"packed_seq_params \(thd\) over 2 .* with rotary positions",
    "other rotary positions": "has a MultimodalRotaryEmbedding, which supports zigzag only",
    "latent attention": r"latent attention \(MLA\).*get_lightning_hybrid_block_spec",
    "documents of Megatron's splitter": r"packed_seq_params \(thd\) over 2 .*is cut as a whole",
    "longest document": "max_seqlen_q=3 and a document of 4 tokens",
    "padding mask": r"an attention_mask of shape \(1, 1, 4, 4\) is given",
    "misspelt decay": "decays='ling' is no option of LaspCoreAttention: did you mean 'decay'",
    "misspelt feature map": "featuremap='none' is no option.*did you mean 'feature_map'",
    "option of softmax core": "decay='tnl' is no option of LaspSoftmaxAttention",
    "option of a layer": "output_gates='sigmoid' is no option.*did you mean 'output_gate'",
    "option of a TNL layer": r"lrpe_layer=\(0,\) is no option of LaspCoreAttention",
    "option of a TNL mixer": "featuremap='none' is no option of TNLSelfAttention",
    "softmax scale": "softmax_scale is 0.5: linear attention has no softmax",
    "softmax type": "config.softmax_type is 'learnable'",
    "largest logit": "config.log_max_attention_logit is True",
    "softmax comm type": "cp_comm_type is 'a2a': softmax layers gather",
    "no decay layers": "num_decay_layers is 0",
    "short decay index": "decay_index has 2 entries and none for layer 3",
    "no decay index": "decay_index has 3 entries and none for layer 2",
    "decay indices of a hybrid": r"decay_index has 2 entries: it needs one per layer \(3\)",
    "multi-token prediction": "config.mtp_num_layers is 1 and decay_index is not given",
    "prediction without decay": "decay_index is None for linear layers of multi-token prediction",
    "output norm": "output_norm is 'layer': choose one of srms, rms, none",
    "output norm groups": "output_norm_groups is 3: it must divide the 32 features",
    "output gate": "output_gate is 'tanh': choose one of sigmoid, silu, none",
    "own rotary": "rotary_percent is 0.5.*with rotary='model'",
    "key heads": "num_query_groups is 3: it must divide the 4 heads",
    "hybrid pattern": r"pattern is '3:1': .*a divisor of that \(3\)",
    "latent softmax": "softmax is 'mla' and config.multi_latent_attention False",
    "dense first": "dense_first is 1 with None experts",
    "qk norm": "qk_norm is True and config.qk_layernorm False",
    "residual": "residual has no factors for softmax",
    "residual name": "lineer=.* is no option of residual: did you mean 'linear'",
    "fused latent rotary": "config.apply_rope_fusion is True with latent attention: its kernel",
    "inference in a hybrid": "a linear-attention layer has no key-value cache",
    "softmax": "config.softmax_type is 'off-by-one'",
    "packed otherwise": "qkv_format is 'sbhd'",
    "repeated prediction layer": "config.mtp_use_repeated_layer is True with recompute",
    "two layouts": "name the layouts .*zigzag.*: there must be exactly one",
    "no layout": r"name the layouts set\(\): there must be exactly one",
    "zigzag only": "has a TEDotProductAttention, which supports zigzag only",
    "length": "a sequence of 6 tokens does not split into 4 equal chunks",
    "inference": "does not support Megatron's inference",
    "layer types": "layer_types is 'LLLS'.*a divisor of that \\(3\\)",
    "FP8 in a TNL layer": r"config.fp8 is 'hybrid' with .* local .*TESpecProvider\(\)",
    "FP8 in a GPT layer": "config.fp8 is 'hybrid' with Megatron's local linear",
    "FP8 in a hybrid": "config.fp8 is 'e4m3' with Megatron's local .*use_transformer_engine=True",
    "FP8 in latent attention": "config.fp8 is 'hybrid' with Megatron's local linear",
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


def test_one_spec_object_gives_each_layer_its_kind(megatron):
    """As Megatron-LM's --spec needs it, over pipeline stages too."""
    stages = megatron.run("traps.layers_of_one_spec", "LLSLLS")
    seen = stages[0] + stages[-1]
    assert [number for number, *_ in seen] == [1, 2, 3, 4, 5, 6]
    for number, kind, log_decay in seen:
        if number % 3 == 0:
            assert kind == "LaspSelfAttention" and log_decay is None
        else:
            assert kind == "LightningSelfAttention"
            torch.testing.assert_close(log_decay, decay.tnl(4, number - 1, 6), rtol=0, atol=0)


def test_spec_objects_of_released_models(megatron):
    assert megatron.run("traps.released_spec_objects")[0] == [
        ("LightningSelfAttention", "LaspMLASelfAttention", 8),
        ("LightningSelfAttention", "LaspSelfAttention", 1),
    ]
