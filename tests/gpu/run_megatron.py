"""Under torchrun: gradients of a TNL in megatron-core on GPUs against float64 on the CPU, as JSON.

Started by test_megatron.py. Megatron's groups are those of all ranks, along one axis at a time.
"""

import json
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from lasp.tnl import TNL, TNLConfig
from parallel.loss import chunked_cross_entropy
from parallel.megatron import (
    BatchSplitter,
    from_megatron,
    fuse_cross_entropy,
    get_tnl_block_spec,
    tnl_transformer_config,
    to_megatron,
)

TOKENS = 520
# The released head size, and K = 256 in layer 0.
TNL_CONFIG = TNLConfig(
    vocab_size=256, dim=512, num_layers=3, num_heads=4, glu_dim=768, init_std=0.06
)
LAYOUTS = {
    "tp": dict(tensor_model_parallel_size="all", sequence_parallel=True),
    "tp, recomputed": dict(
        tensor_model_parallel_size="all",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    ),
    "cp": dict(context_parallel_size="all"),
}


def native(tokens):
    """(weights, loss, gradients) of one device in float64."""
    torch.manual_seed(0)
    model = TNL(TNL_CONFIG)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    model.double()
    hidden = model(tokens[:, :-1], return_hidden=True)
    loss = chunked_cross_entropy(hidden, model.head_weight, tokens[:, 1:]) / TOKENS
    loss.backward()
    return weights, loss.item(), {name: p.grad for name, p in model.named_parameters()}


def in_megatron(weights, tokens, fields, layout):
    """(loss, gradients by native names) with all ranks along one axis."""
    size = dist.get_world_size()
    fields = {name: size if value == "all" else value for name, value in fields.items()}
    # Megatron refuses it without tensor parallelism.
    fields["sequence_parallel"] = fields.get("sequence_parallel", False) and size > 1
    tp, cp = (fields.get(f"{axis}_parallel_size", 1) for axis in ("tensor_model", "context"))
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(0)
    config = tnl_transformer_config(TNL_CONFIG, **fields)
    model = GPTModel(
        config,
        get_tnl_block_spec(config, TNL_CONFIG, layout=layout),
        TNL_CONFIG.vocab_size,
        TOKENS,
        share_embeddings_and_output_weights=True,
        position_embedding_type="none",
    ).cuda()
    fuse_cross_entropy(model)
    rank = parallel_state.get_tensor_model_parallel_rank()
    model.load_state_dict(to_megatron(weights, TNL_CONFIG, tp_rank=rank, tp_size=tp))
    positions = torch.arange(TOKENS).expand(tokens.shape[0], -1)
    batch = dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], position_ids=positions)
    batch = {name: x.cuda() for name, x in BatchSplitter(model)(batch).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    loss = losses.sum() / TOKENS
    loss.backward()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for x in (loss.detach_(), *(p.grad for p in model.parameters())):
        dist.all_reduce(x, group=group)
    shards = [None] * tp
    grads = {name: p.grad.cpu() for name, p in model.named_parameters()}
    dist.all_gather_object(shards, grads, group=parallel_state.get_tensor_model_parallel_group())
    parallel_state.destroy_model_parallel()
    return loss.item(), from_megatron(shards, TNL_CONFIG)


def main():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl")
    tokens = torch.randint(256, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    weights, wanted_loss, wanted = native(tokens)
    report = {}
    for name, fields in LAYOUTS.items():
        for layout in ("contiguous", "zigzag") if name == "cp" else ("zigzag",):
            loss, grads = in_megatron(weights, tokens, fields, layout)
            errors = {
                each: ((grads[each].double() - x).norm() / x.norm()).item()
                for each, x in wanted.items()
            }
            report[f"{name}, {layout}"] = [loss / wanted_loss - 1, errors]
    if dist.get_rank() == 0:
        print("report: " + json.dumps(report), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
