"""Wrong configurations and calls that the ranks run, and what else could go wrong silently."""

import copy
import dataclasses
import inspect
import sys
import types

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import transformer_block
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

import lasp
from lasp.tnl import TNLConfig
from parallel.megatron import (
    BatchSplitter,
    LaspCoreAttention,
    LaspSoftmaxAttention,
    get_lasp_gpt_layer_spec,
    get_lightning_hybrid_block_spec,
    get_lightning_hybrid_layer_spec,
    get_lightning_hybrid_mtp_spec,
    get_tnl_block_spec,
    get_tnl_layer_spec,
    split_batch,
    tnl_layer_spec,
    tnl_transformer_config,
    to_megatron,
)
from parallel.megatron.apex import require_apex
from parallel.megatron.lightning_hybrid import ling_layer_spec, minimax_layer_spec
from tests.parallel.megatron.cases import build_tnl, hybrid_host, set_up_groups, sizes_here, step

TINY = dict(vocab_size=64, dim=32, num_layers=3, num_heads=4, glu_dim=48)


def config(**fields):
    return tnl_transformer_config(TNLConfig(**TINY), **sizes_here(), **fields)


def core(fields=None, **options):
    return LaspCoreAttention(config(**(fields or {})), 1, AttnMaskType.causal, **options)


def called(core, s=4, keys=None, heads=4, **keywords):
    q = torch.ones(s, 1, heads, 8)
    k = torch.ones(keys or s, 1, heads, 8)
    core(q, k, k, **keywords)


def packed(core, qkv_format="thd"):
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    x = torch.ones(4, 4, 8)
    core(x, x, x, packed_seq_params=PackedSeqParams(qkv_format, cu_seqlens, cu_seqlens))


def stack_of_two_layouts():
    one, other = core(layout="zigzag"), core(layout="contiguous")
    BatchSplitter([one, other])


def repeated_prediction_layer():
    layer = core(layout="zigzag")
    for name, value in (("mtp_use_repeated_layer", True), ("mtp_num_layers", 2)):
        setattr(layer.config, name, value)
    BatchSplitter(layer)
    layer.config.recompute_granularity = "full"
    BatchSplitter(layer)


def stack_with_zigzag_only_attention():
    named_as_te = type("TEDotProductAttention", (torch.nn.Module,), {})
    BatchSplitter([core(layout="contiguous"), named_as_te()])


def inference_in_a_tnl_layer():
    layer = build_tnl(TINY).decoder.layers[0].self_attention
    layer(torch.ones(4, 1, 32), inference_context=object())


def base_without_slot():
    base = copy.deepcopy(get_gpt_layer_local_spec())
    base.submodules.self_attention = torch.nn.Identity
    get_lasp_gpt_layer_spec(base)


def pattern_without_linear_layers():
    from parallel.megatron.hybrid import get_tnl_hybrid_stack_spec

    get_tnl_hybrid_stack_spec("*-*-")


def hybrid(pattern="LLS", fields=None, **options):
    return get_lightning_hybrid_block_spec(config(**(fields or {})), pattern, **options)


def latent_config(num_layers=3):
    """Of a model with MLA."""
    return MLATransformerConfig(
        **sizes_here(),
        num_layers=num_layers,
        hidden_size=32,
        num_attention_heads=4,
        kv_channels=8,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=8,
        rope_type="rope",
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def latent_attention():
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, normalization="RMSNorm")
    TransformerBlock(latent_config(), get_lasp_gpt_layer_spec(spec))


def in_fp8(fields, spec_of, name="hybrid"):
    fields.fp8 = name
    TransformerBlock(fields, spec_of(fields))


def fused_latent_rotary():
    fields = latent_config()
    fields.apply_rope_fusion = True
    TransformerBlock(fields, get_lightning_hybrid_block_spec(fields, "LLS"))


def prediction_layer(**core):
    """A GPT of lasp layers with a layer of multi-token prediction of the same kind."""
    fields = config(mtp_num_layers=1)
    spec = get_lasp_gpt_layer_spec(get_gpt_layer_local_spec(), **core)
    TransformerBlock(fields, spec)


def inference_in_a_lightning_layer():
    fields = config()
    block = TransformerBlock(fields, hybrid("L"))
    block.layers[0].self_attention(torch.ones(4, 1, 32), None, inference_context=object())


def built(pattern="LLS", fields=None, **options):
    """The block of a hybrid."""
    fields = config(**(fields or {}))
    TransformerBlock(fields, get_lightning_hybrid_block_spec(fields, pattern, **options))


def tnl_mixer_with_unknown_option():
    spec = get_tnl_layer_spec()
    spec.submodules.self_attention.params["featuremap"] = "none"
    TransformerBlock(config(), spec)


def odd_vocabulary():
    tnl = TNLConfig(**(TINY | dict(vocab_size=63)))
    to_megatron(lasp.tnl.TNL(tnl).state_dict(), tnl, tp_size=2)


def learned_decay():
    tnl = TNLConfig(**(TINY | dict(decay="learned")))
    to_megatron(lasp.tnl.TNL(tnl).state_dict(), tnl)


def variant():
    tnl = TNLConfig(**(TINY | dict(norm="layer")))
    to_megatron(lasp.tnl.TNL(tnl).state_dict(), tnl)


def rotary(kind="RotaryEmbedding", stock_layer=False):
    model = torch.nn.Module()
    if stock_layer:
        spec = get_gpt_layer_local_spec().submodules.self_attention.submodules
        spec = dataclasses.replace(spec, core_attention=ModuleSpec(module=LaspCoreAttention))
        model.attention = SelfAttention(config(), spec, 1, AttnMaskType.causal)
        model.attention.core_attention = torch.nn.Identity()
    model.rotary_pos_emb = getattr(rotary_pos_embedding, kind)(8, 1.0)
    model.core = core(layout="contiguous")
    BatchSplitter(model)
    return model.rotary_pos_emb


def packed_in_a_layer(longest=4, confirm=True):
    """Two documents of 4 tokens over two ranks, through a layer with rotary positions."""
    block = TransformerBlock(config(), hybrid("L", rotary="own"))
    if confirm:
        BatchSplitter(block)
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, longest, longest)
    block.layers[0](torch.ones(4, 1, 32), packed_seq_params=packed)


# All run at context-parallel size 2.
WRONG = {
    "dropout": lambda: core(dict(attention_dropout=0.1)),
    "mask": lambda: LaspCoreAttention(config(), 1, AttnMaskType.padding),
    "cross attention": lambda: core(attention_type="cross"),
    "window": lambda: core(dict(window_size=(8, 0))),
    "layout": lambda: core(layout="striped"),
    "exchange": lambda: core(exchange="p2p"),
    "comm type": lambda: core(cp_comm_type="a2a"),
    "decay": lambda: core(decay="alibi"),
    "decay index": lambda: core(decay_index=3),
    "feature map": lambda: core(feature_map="relu"),
    "unconfirmed layout": lambda: called(core(layout="contiguous")),
    "key-value cache": lambda: called(core(), keys=8),
    "heads": lambda: called(core(), heads=2),
    "bias": lambda: called(core(), attention_bias=torch.zeros(1)),
    "mask in the call": lambda: called(core(), attn_mask_type=AttnMaskType.no_mask),
    "packed over ranks": lambda: packed(core()),
    "packed rotary positions": lambda: rotary(stock_layer=True)(8, packed_seq=True),
    "documents of Megatron's splitter": lambda: packed_in_a_layer(confirm=False),
    "longest document": lambda: packed_in_a_layer(longest=3),
    "padding mask": lambda: called(
        core(),
        attention_mask=torch.zeros(1, 1, 4, 4, dtype=torch.bool),
        attn_mask_type=AttnMaskType.padding_causal,
    ),
    "misspelt decay": lambda: core(decays="ling"),
    "misspelt feature map": lambda: core(featuremap="none"),
    "option of softmax core": lambda: LaspSoftmaxAttention(config(), 1, decay="tnl"),
    "option of a layer": lambda: built(output_gates="sigmoid"),
    "option of a TNL layer": lambda: TransformerBlock(
        config(), get_tnl_layer_spec(lrpe_layer=(0,))
    ),
    "option of a TNL mixer": tnl_mixer_with_unknown_option,
    "softmax scale": lambda: core(dict(softmax_scale=0.5), softmax_scale=0.5),
    "softmax type": lambda: core(dict(softmax_type="learnable")),
    "largest logit": lambda: core(dict(log_max_attention_logit=True)),
    "softmax comm type": lambda: LaspSoftmaxAttention(config(), 1, cp_comm_type="a2a"),
    "no decay layers": lambda: core(num_decay_layers=0),
    "short decay index": lambda: LaspCoreAttention(config(), 3, decay_index=[0, 1]),
    "no decay index": lambda: LaspCoreAttention(config(), 2, decay_index=[0, None, 1]),
    "decay indices of a hybrid": lambda: hybrid(decay_index=[0, 1]),
    "multi-token prediction": prediction_layer,
    "prediction without decay": lambda: get_lightning_hybrid_mtp_spec(
        config(mtp_num_layers=1), "L"
    ),
    "output norm": lambda: core(output_norm="layer"),
    "output norm groups": lambda: core(output_norm_groups=3),
    "output gate": lambda: built(output_gate="tanh"),
    "own rotary": lambda: built(rotary_percent=0.5),
    "key heads": lambda: built(num_query_groups=3),
    "hybrid pattern": lambda: hybrid("3:1"),
    "latent softmax": lambda: hybrid(softmax="mla"),
    "dense first": lambda: hybrid(dense_first=1),
    "qk norm": lambda: hybrid(qk_norm=True),
    "residual": lambda: hybrid(residual=dict(linear=(1.0, 1.0), mlp=(1.0, 1.0))),
    "residual name": lambda: hybrid(residual=dict(lineer=(1.0, 1.0))),
    "fused latent rotary": fused_latent_rotary,
    "inference in a hybrid": inference_in_a_lightning_layer,
    "other rotary positions": lambda: rotary("MultimodalRotaryEmbedding"),
    "latent attention": latent_attention,
    "softmax": lambda: LaspSoftmaxAttention(config(softmax_type="off-by-one"), 1),
    "packed otherwise": lambda: packed(core(), "sbhd"),
    "repeated prediction layer": repeated_prediction_layer,
    "two layouts": stack_of_two_layouts,
    "no layout": lambda: BatchSplitter(torch.nn.Identity()),
    "zigzag only": stack_with_zigzag_only_attention,
    "length": lambda: split_batch(
        dict(tokens=torch.ones(1, 6)), "zigzag", parallel_state.get_context_parallel_group()
    ),
    "inference": inference_in_a_tnl_layer,
    "layer types": lambda: get_tnl_block_spec(config(), layer_types="LLLS"),
    "FP8 in a TNL layer": lambda: in_fp8(config(), get_tnl_block_spec),
    "FP8 in a GPT layer": lambda: in_fp8(
        config(), lambda fields: get_lasp_gpt_layer_spec(get_gpt_layer_local_spec())
    ),
    "FP8 in a hybrid": lambda: in_fp8(
        config(), lambda fields: get_lightning_hybrid_block_spec(fields, "2:1"), "e4m3"
    ),
    "FP8 in latent attention": lambda: in_fp8(
        latent_config(), lambda fields: get_lightning_hybrid_block_spec(fields, "S")
    ),
    "base spec": base_without_slot,
    "norm": lambda: get_tnl_block_spec(config(), norm="fused"),
    "apex norm": lambda: TransformerBlock(config(), get_tnl_block_spec(config(), norm="apex")),
    "apex fusion": lambda: require_apex("gradient accumulation fusion"),
    "pattern": pattern_without_linear_layers,
    "vocabulary": odd_vocabulary,
    "learned decay": learned_decay,
    "variant": variant,
}


def errors():
    """Name -> the ValueError's message, or what happened instead."""
    set_up_groups(1, 2)
    messages = {}
    for name, wrong in WRONG.items():
        try:
            wrong()
            messages[name] = "accepted"
        except ValueError as error:
            messages[name] = str(error)
        except Exception as error:
            messages[name] = repr(error)
    return messages


def splits():
    """For 1, 2 and 4 context-parallel ranks: (our zigzag batch, Megatron's own)."""
    pairs = []
    for cp in (1, 2, 4):
        set_up_groups(1, cp)
        tokens = torch.arange(2 * 24).view(2, 24)
        batch = dict(
            tokens=tokens,
            loss_mask=tokens.float(),
            labels=None,
            attention_mask=torch.arange(24)[:, None].expand(1, 1, 24, 24),
        )
        group = parallel_state.get_context_parallel_group()
        ours = split_batch(dict(batch), "zigzag", group)
        # From 0.18 on Megatron asks for one more argument.
        asks = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
        more = dict(is_hybrid_cp=False) if asks else {}
        pairs.append((ours, get_batch_on_this_cp_rank(dict(batch), cp_group=group, **more)))
    return pairs


def final_norm_where_megatron_has_none():
    """(name of the final norm of the block spec, the error of a bare layer spec) when Megatron's
    choice of a final norm refuses RMSNorm, as it does once a package named apex can be imported."""

    class Refuses:
        def __init__(self, **keywords):
            raise AssertionError("(RMSNorm) is not supported in FusedLayerNorm")

    set_up_groups(1, 1)
    fields = config()
    stock, transformer_block.LayerNormImpl = transformer_block.LayerNormImpl, Refuses
    try:
        block = TransformerBlock(fields, get_tnl_block_spec(fields))
        try:
            TransformerBlock(fields, tnl_layer_spec)
            bare = "built"
        except AssertionError as error:
            bare = str(error)
    finally:
        transformer_block.LayerNormImpl = stock
    return type(block.final_layernorm).__name__, bare


def exchanges_by_layer(comm_types):
    """The exchange of each layer under a list of cp_comm_type."""
    set_up_groups(1, 2)
    fields = config(cp_comm_type=comm_types)
    block = TransformerBlock(fields, get_tnl_block_spec(fields))
    return [layer.self_attention.core_attention.exchange for layer in block.layers]


def decays_in_a_stack_that_counts_mlps():
    """(decay by decay_index, expected) of the second of two linear layers, the third of three
    layers."""
    set_up_groups(1, 1)
    core = LaspCoreAttention(config(), 3, decay_index=1, num_decay_layers=2)
    return core.log_decay(torch.device("cpu")), lasp.decay.tnl(4, 1, 2)


def specs_after_replacing_the_core():
    """(Megatron's shared spec is unchanged, the copy has our core attention, its options)."""
    base = get_gpt_layer_local_spec()
    before = base.submodules.self_attention.submodules.core_attention
    ours = get_lasp_gpt_layer_spec(base, decay="none")
    after = base.submodules.self_attention.submodules.core_attention
    changed = ours.submodules.self_attention.submodules.core_attention
    return before is after, changed.module is LaspCoreAttention, changed.params


def packed_documents(cp):
    """(output of packed documents, of each separately) for this rank's tokens."""
    set_up_groups(1, 1)
    attention = core()
    torch.manual_seed(0)
    qkv = torch.randn(3, 12, 4, 8)
    documents = qkv[:, :5], qkv[:, 5:]
    separate = torch.cat([attention(*each.unsqueeze(2)).squeeze(1) for each in documents])

    set_up_groups(1, cp)
    attention = core(layout="contiguous")
    local = BatchSplitter(attention)(dict(qkv=qkv, separate=separate[None]))
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    params = PackedSeqParams("thd", cu_seqlens, cu_seqlens)
    return attention(*local["qkv"], packed_seq_params=params), local["separate"][0]


def loss_with_apex_norm():
    """(loss with torch's norms, with apex's, how many of apex's were built)."""
    built = []

    class FusedRMSNorm(torch.nn.RMSNorm):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            assert self.weight is None
            built.append(self)

    set_up_groups(1, 1)
    tokens = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(0))
    names = ("fused_layer_norm_cuda", "apex", "apex.normalization")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules["apex.normalization"].FusedRMSNorm = FusedRMSNorm
    try:
        losses = [step(build_tnl(TINY, norm=norm), tokens)[0] for norm in ("torch", "apex")]
    finally:
        for name in names:
            del sys.modules[name]
    return *losses, len(built)


def decay_on_a_stage_of_the_hybrid_stack():
    """(stage, decay of its linear layer, number of that layer, whether it has LRPE)."""
    from parallel.megatron.hybrid import LINEAR, get_tnl_hybrid_stack_spec

    set_up_groups(1, 1, 2)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    build, pattern_name = hybrid_host()
    separator = "|" if LINEAR == "G" else ""
    pattern = f"{LINEAR}-{separator}{LINEAR}-"
    fields = config(num_layers=4)
    model = build(
        fields,
        get_tnl_hybrid_stack_spec(pattern),
        64,
        256,
        pre_process=stage == 0,
        post_process=stage == 1,
        **{pattern_name: pattern},
    )
    mixer = model.decoder.layers[0].self_attention
    decay = mixer.core_attention.log_decay(torch.device("cpu"))
    return stage, decay, mixer.layer_number, mixer.lrpe is not None


def weight_decays():
    """Name -> the factor of weight decay that Megatron's optimizer gives a parameter."""
    set_up_groups(1, 2)
    model = build_tnl(TINY)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1.0, weight_decay=0.1), [ddp])
    factors = {id(p): group["wd_mult"] for group in optimizer.param_groups for p in group["params"]}
    return {name: factors[id(p)] for name, p in model.named_parameters()}


def layers_of_virtual_stages(tnl):
    """For this rank's model chunks: (number of each layer from 0, decay, whether it has LRPE, input
    scale)."""
    set_up_groups(1, 1, 2)
    fields = config(virtual_pipeline_model_parallel_size=2, num_layers=tnl["num_layers"])
    seen = []
    for stage in range(2):
        spec = get_tnl_block_spec(fields, TNLConfig(**tnl), vp_stage=stage)
        block = TransformerBlock(fields, spec, vp_stage=stage)
        for layer in block.layers:
            mixer = layer.self_attention
            decay = mixer.core_attention.log_decay(torch.device("cpu"))
            number = layer.layer_number - 1
            seen.append((number, decay, mixer.lrpe is not None, layer.input_scale))
    return seen


def layers_of_one_spec(pattern):
    """(number, attention, log decay or None) of each layer of this stage, built from one object."""
    set_up_groups(1, 1, 2)
    fields = config(num_layers=len(pattern))
    spec = get_lightning_hybrid_layer_spec(pattern, output_norm="rms", output_gate="sigmoid")
    seen = []
    for layer in TransformerBlock(fields, spec).layers:
        core = layer.self_attention.core_attention
        is_linear = isinstance(core, LaspCoreAttention)
        decay = core.log_decay(torch.device("cpu")) if is_linear else None
        seen.append((layer.layer_number, type(layer.self_attention).__name__, decay))
    return seen


def released_spec_objects():
    """(attention of the first layer, of the last, groups of the first one's output norm) of the
    objects for Ling 2.5 and MiniMax-01."""
    set_up_groups(1, 1)
    blocks = [
        TransformerBlock(latent_config(8), ling_layer_spec),
        TransformerBlock(config(num_layers=8), minimax_layer_spec),
    ]
    seen = []
    for block in blocks:
        first, last = (block.layers[i].self_attention for i in (0, 7))
        norm = first.core_attention.norm
        groups = norm.local_width // norm.group_width
        seen.append((type(first).__name__, type(last).__name__, groups))
    return seen
