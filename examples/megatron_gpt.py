"""Train a TNL with megatron-core: its layers, groups, DDP, optimizer, schedules and checkpoints.

    python launch/prepare_data.py                # once: data/stdlib
    torchrun --nproc_per_node 4 examples/megatron_gpt.py \
        --tensor-model-parallel-size 2 --context-parallel-size 2 --save checkpoints/megatron

Options have the names of Megatron-LM's. A restart resumes from the newest checkpoint, also with
other parallel sizes. examples/megatron.md shows how to do the same in Megatron-LM itself.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    Adam,
    OptimizerConfig,
    clip_grads,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import local_multi_tensor_l2_norm

from lasp import SequenceShard
from lasp.tnl import TNLConfig
from launch.data import DataFolder, RandomSource, read_batch, sample_order, step_samples
from parallel.megatron import (
    BatchSplitter,
    fuse_cross_entropy,
    get_tnl_block_spec,
    tnl_transformer_config,
)
from parallel.megatron.apex import require_apex

# Megatron's own linear layers, or Transformer Engine's.
IMPLEMENTATIONS = ("local", "transformer_engine")
# The distributed optimizer's default format cannot be saved any more.
FORMAT = dict(metadata=dict(distrib_optim_sharding_type="fully_reshardable"))


def parse_arguments(argv=None):
    parser = argument_parser("Train a TNL with megatron-core.")
    parser.add_argument("--preset", default="tiny", help="shape of the model: tiny, 385m, 1b, 7b")
    parser.add_argument("--layer-types", default="L", help="such as LLLS: S is a softmax layer")
    parser.add_argument("--norm", choices=["torch", "apex"], default="torch")
    return parser.parse_args(argv)


def argument_parser(description):
    """The options that do not depend on the model; examples/megatron_hybrid_moe.py has them too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--linear-cp-layout", choices=["zigzag", "contiguous"], default="zigzag")
    parser.add_argument("--cp-exchange", default="ring", help="ring, all_gather or doubling")
    parser.add_argument("--data-path", default="data/stdlib", help="a prepared folder, or: random")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a full sequence")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--train-iters", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--transformer-impl", choices=IMPLEMENTATIONS, default="local")
    parser.add_argument(
        "--fp8-format",
        choices=["hybrid", "e4m3"],
        help="with --transformer-impl transformer_engine",
    )
    parser.add_argument("--fp8-recipe", help="of --fp8-format: tensorwise (default), delayed, ...")
    parser.add_argument(
        "--attention-backend",
        choices=AttnBackend.__members__,
        default="auto",
        help="of Transformer Engine's softmax attention, which only the hybrid has",
    )
    parser.add_argument("--recompute", action="store_true", help="all layers; repeats no exchange")
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--overlap-grad-reduce", action="store_true")
    parser.add_argument("--overlap-param-gather", action="store_true", help="also needs the above")
    parser.add_argument(
        "--gradient-accumulation-fusion",
        action="store_true",
        help="needs apex or Transformer Engine",
    )
    parser.add_argument("--save", type=Path, help="folder of checkpoints, also to resume from")
    parser.add_argument("--save-interval", type=int, default=50)
    parser.add_argument("--device", default="cuda", help="cpu: only if CUDA's calls are redirected")
    return parser


def main(args, train):
    """Run train(args) in the process groups that the options ask for."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(f"start it with: torchrun --nproc_per_node N {sys.argv[0]}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("megatron-core needs a GPU, and this machine has none.")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    experts = getattr(args, "expert_model_parallel_size", 1)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=1 if experts > 1 else None,
    )
    train(args)
    dist.destroy_process_group()


def train(args):
    """Train within Megatron's groups; returns the losses since this start."""
    return take_steps(args, set_up(args))


def take_steps(args, run):
    """Resume from the newest checkpoint, and take the steps that are left; returns their losses."""
    losses = []
    done = load_checkpoint(args, run.bare, run.optimizer)
    for iteration in range(done + 1, args.train_iters + 1):
        started = time.perf_counter()
        loss, grad_norm, updated = take_step(args, run, iteration)
        seconds = time.perf_counter() - started
        losses.append(loss)
        if dist.get_rank() == 0:
            tokens_per_second = args.global_batch_size * args.seq_length / seconds
            print(
                f"iteration {iteration} | loss {loss:.6f} | grad norm {grad_norm:.3f} | "
                f"{tokens_per_second:,.0f} tokens/s" + ("" if updated else " | skipped"),
                flush=True,
            )
        if args.save and (iteration % args.save_interval == 0 or iteration == args.train_iters):
            save_checkpoint(args, run.bare, run.optimizer, iteration)
    if args.device == "cuda" and dist.get_rank() == 0:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    return losses


@dataclass
class Run:
    """What a step needs: the wrapped model, the GPTModel inside (bare), and the rest."""

    model: torch.nn.Module
    bare: GPTModel
    optimizer: Any
    split: BatchSplitter
    source: Any


def set_up(args, softmax_core=None, *, build=None, vocab_size=None):
    """Build the Run.

    Args:
        softmax_core: as in get_tnl_block_spec.
        build: builds another model than build_model, which also says what it takes and returns.
        vocab_size: of random data; None: the preset's.
    """
    if args.save and args.use_distributed_optimizer and not distrib_optimizer.HAVE_APEX_OR_TE:
        raise ValueError(
            "--save with --use-distributed-optimizer: megatron-core 0.16 to 0.19 cannot load the "
            "state of that optimizer with torch's Adam. Drop one of these options, or install "
            "Transformer Engine or apex."
        )
    if args.fp8_format and args.transformer_impl == "local":
        raise ValueError(
            "--fp8-format needs --transformer-impl transformer_engine: Megatron's local linear "
            "layers ignore FP8."
        )
    if args.fp8_recipe and not args.fp8_format:
        raise ValueError("--fp8-recipe without --fp8-format: give the format, such as hybrid.")
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed)
    source, vocab_size = open_data(args, vocab_size)
    model, bare = (build or build_model)(args, vocab_size, softmax_core)
    fuse_cross_entropy(bare)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=args.lr,
            adam_beta2=0.95,
            weight_decay=0.1,
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_param_gather=args.overlap_param_gather,
        ),
        [model],
    )
    use_few_kernels(optimizer)
    bare.config.finalize_model_grads_func = finalize_model_grads
    bare.config.grad_scale_func = optimizer.scale_loss
    bare.config.no_sync_func = model.no_sync
    if args.overlap_param_gather:
        bare.config.param_sync_func = model.start_param_sync
    if dist.get_rank() == 0 and build is None:
        print(" | ".join(f"{part}: {which}" for part, which in ingredients(args).items()))
    # Shards batches in the layout of the model's layers; see parallel/megatron/context_parallel.py.
    split = BatchSplitter(model, args.linear_cp_layout)
    return Run(model, bare, optimizer, split, source)


def use_few_kernels(optimizer):
    """Without Transformer Engine and apex, Megatron takes torch's AdamW in its default form, of
    several kernels, and waits for the norm of each tensor's gradient before that of the next."""
    if isinstance(Adam, type) and issubclass(Adam, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group.update(foreach=False, fused=True)
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm


def l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor):
    """As Megatron's local_multi_tensor_l2_norm: (norm of all tensors [1], nothing per tensor)."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).float().reshape(1), None


def ingredients(args):
    """Where apex is used: Megatron takes its Adam if it is installed."""
    has_te = args.transformer_impl == "transformer_engine"
    fused_by = f"fused with their sum by {'Transformer Engine' if has_te else 'apex'}"
    dtype = "bfloat16" if args.bf16 else "float32"
    return {
        "optimizer": f"{Adam.__module__.partition('.')[0]}'s {Adam.__name__}",
        "norms": f"{args.norm}'s",
        "weight gradients": fused_by if args.gradient_accumulation_fusion else "not fused",
        "linear layers": "Transformer Engine's" if has_te else "Megatron's",
        "matmuls": f"FP8 ({fp8_recipe(args)})" if args.fp8_format else dtype,
    }


def fp8_recipe(args):
    return args.fp8_recipe or "tensorwise"


def take_step(args, run, iteration):
    """(mean loss, norm of the gradient, whether the weights were updated) of one global batch."""
    run.model.zero_grad_buffer()
    run.optimizer.zero_grad()
    loss = forward_backward(args, run.model, run.split, run.source, iteration)
    updated, grad_norm, _ = run.optimizer.step()
    # With Transformer Engine or apex it is a tensor on the GPU.
    return loss, float(grad_norm), updated


def open_data(args, vocab_size=None):
    """(samples of seq_length + 1 tokens, vocabulary padded to what tensor parallelism divides)."""
    if args.data_path == "random":
        vocab_size = vocab_size or TNLConfig.preset(args.preset).vocab_size
        return RandomSource(vocab_size, args.seed), vocab_size
    folder = DataFolder(Path(args.data_path))
    multiple = 128 * args.tensor_model_parallel_size
    vocab_size = -(-folder.tokenizer.vocab_size // multiple) * multiple
    return folder.source("train", args.seq_length, vocab_size), vocab_size


def config_fields(args):
    """Fields of Megatron's config that do not depend on the model."""
    recompute = dict(recompute_granularity="full", recompute_method="uniform")
    return dict(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        pipeline_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        gradient_accumulation_fusion=args.gradient_accumulation_fusion,
        fp8=args.fp8_format,
        fp8_recipe=fp8_recipe(args),
        attention_backend=AttnBackend[args.attention_backend],
        use_cpu_initialization=args.device == "cpu",
        # The loss function returns sums, and Megatron divides by the tokens of all ranks.
        calculate_per_token_loss=True,
        **(recompute | dict(recompute_num_layers=1) if args.recompute else {}),
    )


def build_model(args, vocab_size, softmax_core=None):
    """(the model in Megatron's wrappers, the GPTModel inside)."""
    tnl = TNLConfig.preset(args.preset, vocab_size=vocab_size, layer_types=args.layer_types)
    config = tnl_transformer_config(
        tnl,
        **config_fields(args),
    )
    if args.gradient_accumulation_fusion and args.transformer_impl == "local":
        require_apex("gradient accumulation fusion")
    spec = get_tnl_block_spec(
        config,
        tnl,
        backend=backend(args),
        norm=args.norm,
        softmax_core=softmax_core,
        layout=args.linear_cp_layout,
        exchange=args.cp_exchange,
    )
    bare = GPTModel(
        config,
        spec,
        vocab_size,
        args.seq_length,
        share_embeddings_and_output_weights=True,
        # TNL's positions are its decay and LRPE; softmax layers need rotary ones.
        position_embedding_type="rope" if tnl.num_softmax_layers else "none",
        rotary_base=tnl.rope_base,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    return wrap(args, bare), bare


def backend(args):
    """Megatron's provider of linear layers."""
    if args.transformer_impl == "local":
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def wrap(args, bare):
    """Megatron's wrappers around a GPTModel."""
    model = bare.to(args.device)
    if args.bf16:
        model = Float16Module(bare.config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
    )
    return DistributedDataParallel(bare.config, ddp, model)


def forward_backward(args, model, split, source, iteration):
    """Run one global batch by Megatron's schedule; returns its mean loss."""
    first = (iteration - 1) * args.global_batch_size
    micro_batches = step_samples(
        sample_order(first, args.global_batch_size, source.num_samples, args.seed),
        local_batch_size=args.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
    )

    def forward_step(samples, model):
        # Full sequences with shifted labels; then this rank's shard.
        batch = read_batch(source, next(samples), SequenceShard.whole(args.seq_length))
        positions = torch.arange(args.seq_length).expand_as(batch.inputs)
        batch = split(dict(tokens=batch.inputs, labels=batch.labels, position_ids=positions))
        batch = {name: x.to(args.device) for name, x in batch.items()}
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, sum_of_losses

    def sum_of_losses(losses):
        total, count = losses.float().sum(), losses.numel()
        report = torch.stack([total.detach(), total.new_tensor(count)])
        return total, torch.tensor(count, dtype=torch.int, device=losses.device), {"loss": report}

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    # Only the last pipeline stage has losses; the others add zeros.
    total = sum((report["loss"] for report in reports), torch.zeros(2, device=args.device))
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def sharded_weights(model):
    # Layers of multi-token prediction on another stage than the embedding ask for the group.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group})


def save_checkpoint(args, model, optimizer, iteration):
    """One folder per checkpoint; the file that names the newest is written last."""
    folder = args.save / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    weights = sharded_weights(model)
    state = dict(model=weights, optimizer=optimizer.sharded_state_dict(weights, **FORMAT))
    dist_checkpointing.save(state, folder)
    if dist.get_rank() == 0:
        (args.save / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def load_checkpoint(args, model, optimizer):
    """Load the newest checkpoint; returns its iteration, or 0 if there is none."""
    latest = args.save and args.save / "latest_checkpointed_iteration.txt"
    if not latest or not latest.is_file():
        return 0
    iteration = int(latest.read_text())
    weights = sharded_weights(model)
    empty = optimizer.sharded_state_dict(weights, is_loading=True, **FORMAT)
    state = dict(model=weights, optimizer=empty)
    state = dist_checkpointing.load(state, args.save / f"iter_{iteration:07d}")
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return iteration


if __name__ == "__main__":
    main(parse_arguments(), train)
