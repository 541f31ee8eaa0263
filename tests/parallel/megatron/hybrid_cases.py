"""Hybrids of linear and softmax layers that the ranks run: Ling-like (MLA, MoE, MTP) and
MiniMax-like models by Megatron's own schedule, DDP and checkpoints."""

import multiprocessing

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.utils import get_model_config
from torch import distributed as dist

from parallel.megatron import (
    BatchSplitter,
    LaspCoreAttention,
    get_lightning_hybrid_block_spec,
    get_lightning_hybrid_mtp_spec,
)
from tests.parallel.megatron.cases import hybrid_host, loss_and_count, set_up_groups, sizes_here

VOCABULARY = 64


def build_hybrid(fields, options, mtp_kind="S", decay_index=None):
    """A GPTModel of this pipeline stage; `fields` of Megatron's config, `options` of the spec."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    make = MLATransformerConfig if "kv_lora_rank" in fields else TransformerConfig
    config = make(
        **sizes_here(),
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else tp,
        sequence_parallel=tp > 1,
        **{"calculate_per_token_loss": True} | fields,
    )
    torch.manual_seed(1)
    options = dict(options)
    pattern = options.pop("pattern")
    if options.pop("stack", False):
        return build_stack(config, pattern, options)
    spec = get_lightning_hybrid_block_spec(config, pattern, **options)
    mtp = None
    if config.mtp_num_layers:
        mtp = get_lightning_hybrid_mtp_spec(config, mtp_kind, decay_index=decay_index, **options)
    return GPTModel(
        config,
        spec,
        VOCABULARY,
        max_sequence_length=256,
        position_embedding_type="rope",
        rotary_percent=0.5,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        mtp_block_spec=mtp,
    )


def build_stack(config, pattern, options):
    """The model in Megatron's hybrid stack."""
    from parallel.megatron.hybrid import get_lightning_hybrid_stack_spec

    build, pattern_name = hybrid_host()
    return build(
        config,
        get_lightning_hybrid_stack_spec(config, pattern, **options),
        VOCABULARY,
        256,
        position_embedding_type="none" if config.multi_latent_attention else "rope",
        **{pattern_name: pattern},
    )


def documents(lengths):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    longest = max(lengths)
    return PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, longest, longest)


def run_hybrid(
    sizes, fields, options, tokens, folder, *, first=False, lengths=None, masked=0, **mtp
):
    """(loss, gradients by name) of one step, with the weights of the checkpoint folder/weights;
    `first`: draw them, and save them there. Every data-parallel rank has all rows.

    The gradients take the way over a checkpoint, which puts together the parts of all ranks.
    """
    set_up_groups(*sizes)
    # Megatron writes in processes, and daemons may not start any.
    multiprocessing.current_process()._config["daemon"] = False
    inner = build_hybrid(fields, options, **mtp)
    if first:
        save(inner, folder / "weights")
    else:
        restore(inner, folder / "weights")
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(inner.config, ddp, inner)
    inner.config.finalize_model_grads_func = finalize_model_grads
    loss = step(model, BatchSplitter(model), tokens, lengths, masked)
    with torch.no_grad():
        for p in inner.parameters():
            p.copy_(p.main_grad)
    # It keeps a tensor with its graph, whose hooks refer to the model, from where the garbage
    # collector does not look: the process groups and their threads would live on.
    for module in inner.modules():
        if hasattr(module, "token_dispatcher"):
            module.token_dispatcher.probs = None
    name = folder / ("gradients-" + "-".join(map(str, sizes)) + options.get("layout", ""))
    save(inner, name)
    if not first:
        set_up_groups(1, 1)
        inner = build_hybrid(fields, options, **mtp)
        restore(inner, name)
    return loss, {name: p.detach().clone() for name, p in inner.named_parameters()}


def save(model, folder):
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"model": sharded(model)}, folder)


def sharded(model):
    # With layers of multi-token prediction, 0.16 asks for the group.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group})


def restore(model, folder):
    state = dist_checkpointing.load({"model": sharded(model)}, folder)
    model.load_state_dict(state["model"], strict=False)


def step(model, split, tokens, lengths=None, masked=0):
    """Loss over all tokens, of one forward and backward by Megatron's schedule; `masked`: the first
    tokens of each row have no loss."""
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    rows = dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], position_ids=positions)
    rows["loss_mask"] = torch.ones_like(rows["tokens"], dtype=torch.float32)
    rows["loss_mask"][:, :masked] = 0
    num_tokens = rows["loss_mask"].sum()
    packed = None if lengths is None else documents(lengths)

    def forward_step(batches, model):
        batch = split(next(batches))
        # MambaModel takes neither.
        more = {} if packed is None else dict(packed_seq_params=packed)
        if get_model_config(model).mtp_num_layers:
            more["loss_mask"] = batch["loss_mask"]
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)
        if get_model_config(model).calculate_per_token_loss:
            return losses, lambda losses: loss_and_count(losses, batch["loss_mask"])
        return losses, lambda losses: mean_loss(losses, batch["loss_mask"])

    def mean_loss(losses, mask):
        total = (losses * mask).sum()
        report = torch.stack([total.detach(), mask.sum()])
        return total / num_tokens, {"loss": report}

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([rows]),
        model=[model],
        num_microbatches=1,
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=tokens.shape[0],
        forward_only=False,
    )
    total = sum((report["loss"] for report in reports), torch.zeros(2))
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def decays_of_layers(fields, options, decay_index):
    """(log decays of the linear layers, those of the layer of multi-token prediction)."""
    set_up_groups(1, 1)
    model = build_hybrid(fields, options, "L", decay_index)
    cores = {
        name: module.log_decay(torch.device("cpu"))
        for name, module in model.named_modules()
        if isinstance(module, LaspCoreAttention)
    }
    predicting = [decay for name, decay in cores.items() if name.startswith("mtp.")]
    return [decay for name, decay in cores.items() if name.startswith("decoder.")], predicting
