"""Functions that the ranks run: models built by megatron-core, to compare with the native TNL.

Imported on the ranks only; importing it makes Megatron run on the CPU.
"""

# ruff: noqa: E402 (Megatron is imported after the shim)

import contextlib
import copy
import functools
import gc
import io
import logging
import multiprocessing
import re
import runpy
import sys
import warnings
from pathlib import Path
from unittest import mock

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from tests.parallel.megatron import cpu_shim

cpu_shim.install()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

import lasp
import lasp.exchange
from lasp.exchange import comm
from lasp.tnl import TNL, TNLConfig
from parallel.megatron import (
    BatchSplitter,
    activation_checkpoint,
    from_megatron,
    get_lasp_gpt_layer_spec,
    get_tnl_block_spec,
    presets,
    tnl_transformer_config,
    to_megatron,
)

ROOT = Path(__file__).parents[3]
_kept_groups = []


def set_up_groups(tp, cp, pp=1, ep=1):
    """Create Megatron's groups over the four ranks; the remaining axis is data parallel."""
    if parallel_state.model_parallel_is_initialized():
        dist.barrier()
        # Megatron does not destroy its groups: their threads would pile up, also of those that a
        # model in a reference cycle holds.
        gc.collect()
        ours = {id(group) for group in _kept_groups}
        for group in list(dist.distributed_c10d._world.pg_map):
            if id(group) not in ours:
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
        dist.barrier()
    else:
        _kept_groups.extend(dist.distributed_c10d._world.pg_map)
        # Of all that was imported: collecting is fast then.
        gc.freeze()
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else None,
    )
    model_parallel_cuda_manual_seed(0)


def sizes_here():
    """TransformerConfig fields that follow from the groups."""
    return dict(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )


def build_tnl(tnl, weights=None, *, megatron=None, **spec):
    """A GPTModel of TNL layers, with the given native weights or those of a seed."""
    tnl = TNLConfig(**tnl)
    config = tnl_transformer_config(tnl, **sizes_here(), **(megatron or {}))
    torch.manual_seed(1)
    model = gpt_model(
        config,
        get_tnl_block_spec(config, tnl, **spec),
        tnl.vocab_size,
        "rope" if tnl.num_softmax_layers else "none",
    )
    if weights is None:
        # Megatron's own weights would depend on the groups: pipeline stages draw differently.
        torch.manual_seed(1)
        weights = TNL(tnl).state_dict()
    first = model.decoder.layers[0].layer_number - 1
    layers = range(first, first + len(model.decoder.layers))
    model.load_state_dict(to_megatron(weights, tnl, **tp_shard(), layers=layers))
    return model


def tp_shard():
    """Arguments of to_megatron for this rank."""
    return dict(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


def build_gpt(fields, *, positions="rope", megatron=None, late=None, **core):
    """A GPTModel of Megatron's layers with our core attention; `late`: fields of the config that
    are set after it is built."""
    config = TransformerConfig(**sizes_here(), **fields, **(megatron or {}))
    torch.manual_seed(1)
    spec = get_lasp_gpt_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), **core)
    model = gpt_model(config, spec, 64, positions)
    for name, value in (late or {}).items():
        setattr(config, name, value)
    return model


def gpt_model(config, spec, vocab_size, positions):
    return GPTModel(
        config,
        spec,
        vocab_size,
        max_sequence_length=256,
        share_embeddings_and_output_weights=True,
        position_embedding_type=positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def batch_of(tokens):
    """This data-parallel rank's rows of tokens [B, T + 1], full sequences."""
    rank = parallel_state.get_data_parallel_rank()
    rows = tokens.chunk(parallel_state.get_data_parallel_world_size())[rank]
    positions = torch.arange(rows.shape[1] - 1).expand(rows.shape[0], -1)
    return dict(tokens=rows[:, :-1], labels=rows[:, 1:], position_ids=positions)


def global_loss(model, split, tokens):
    """This rank's token losses over the number of all tokens of the batch."""
    batch = split(batch_of(tokens))
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses.sum() / (tokens.shape[0] * (tokens.shape[1] - 1))


def summed(x):
    """Sum x over the ranks that hold the same weights."""
    dist.all_reduce(x, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return x


def full_tnl(parts, tnl):
    """Native names and shapes, from the shards of this rank's tensor-parallel group."""
    gathered = [None] * parallel_state.get_tensor_model_parallel_world_size()
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_gather_object(gathered, parts, group=group)
    return from_megatron(gathered, TNLConfig(**tnl))


def full(model, tensors):
    """Megatron names with layers numbered over all pipeline stages -> the tensors of all
    tensor-parallel ranks, concatenated."""
    first = model.decoder.layers[0].layer_number - 1
    size = parallel_state.get_tensor_model_parallel_world_size()
    group = parallel_state.get_tensor_model_parallel_group()
    gathered = [None] * size
    dist.all_gather_object(gathered, tensors, group=group)
    joined = {}
    for name, p in model.named_parameters():
        parts = [of_rank[name] for of_rank in gathered]
        if not getattr(p, "tensor_model_parallel", False):
            joined[global_name(name, first)] = parts[0]
            continue
        # A stride of 2 means two matrices, one above the other, in each rank's shard.
        matrices = zip(*(x.chunk(p.partition_stride, p.partition_dim) for x in parts), strict=True)
        shards = [shard for of_matrix in matrices for shard in of_matrix]
        joined[global_name(name, first)] = torch.cat(shards, p.partition_dim)
    return joined


def global_name(name, first_layer):
    if name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + first_layer}", name)


@contextlib.contextmanager
def counted_exchanges():
    """A list that grows by one for each exchange of states or all-gather of keys and values."""
    seen = []

    def counting(function):
        def call(*args, **kwargs):
            seen.append(function)
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(lasp.exchange, "start", counting(lasp.exchange.start)),
        mock.patch.object(comm, "gather_rows", counting(comm.gather_rows)),
    ):
        yield seen


def step(model, tokens):
    """(loss, this rank's gradients by name, exchanges) of one step without Megatron's DDP."""
    split = BatchSplitter(model)
    with counted_exchanges() as exchanges:
        loss = global_loss(model, split, tokens)
        loss.backward()
    grads = {name: summed(p.grad) for name, p in model.named_parameters()}
    return summed(loss.detach()).item(), grads, len(exchanges)


def native_gradients(sizes, tnl, weights, tokens, options):
    """(loss, gradients by native names, exchanges) of the Megatron TNL with native weights."""
    set_up_groups(*sizes)
    loss, grads, exchanges = step(build_tnl(tnl, weights, **options), tokens)
    return loss, full_tnl(grads, tnl), exchanges


def gradients(sizes, kind, fields, tokens, options):
    """(loss, gradients by Megatron's names, exchanges) of a model with a seed's weights."""
    set_up_groups(*sizes)
    model = {"tnl": build_tnl, "gpt": build_gpt}[kind](fields, **options)
    loss, grads, exchanges = step(model, tokens)
    return loss, full(model, grads), exchanges


def train(sizes, tnl, tokens, options, *, steps=3, ddp=None, save=None, load=None, micro=1):
    """(losses, weights by Megatron's names) of training with Megatron's DDP, optimizer, schedule.

    Args:
        ddp: fields of DistributedDataParallelConfig.
        save, load: checkpoint folders.
    """
    set_up_groups(*sizes)
    megatron = dict(calculate_per_token_loss=True) | options.pop("megatron", {})
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **(ddp or {}))
    inner = build_tnl(tnl, megatron=megatron, **options)
    model = DistributedDataParallel(inner.config, ddp, inner)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=2e-3,
            clip_grad=1.0,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
        ),
        [model],
    )
    inner.config.finalize_model_grads_func = finalize_model_grads
    split = BatchSplitter(model)
    if load is not None:
        restore(load, inner, optimizer)
    losses = []
    for _ in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(megatron_step(model, split, tokens, micro))
        assert optimizer.step()[0]
    if save is not None:
        parts = inner.sharded_state_dict()
        state = {"model": parts, "optimizer": optimizer.sharded_state_dict(parts)}
        # Megatron writes in processes, and daemons may not start any.
        multiprocessing.current_process()._config["daemon"] = False
        dist_checkpointing.save(state, save)
    return losses, full(inner, {n: p.detach() for n, p in inner.named_parameters()})


def restore(folder, model, optimizer):
    parts = model.sharded_state_dict()
    state = {"model": parts, "optimizer": optimizer.sharded_state_dict(parts, is_loading=True)}
    state = dist_checkpointing.load(state, folder)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])


def loss_and_count(losses, mask=None):
    """What Megatron's schedule asks of a loss: the sum, the number of tokens, a report."""
    mask = torch.ones_like(losses) if mask is None else mask
    total, count = (losses * mask).sum(), mask.sum().int()
    return total, count, {"loss": torch.stack([total.detach(), count.float()])}


def megatron_step(model, split, tokens, micro):
    """One forward and backward by Megatron's schedule; the loss over all tokens."""
    rows = batch_of(tokens)
    batches = iter(
        [
            dict(zip(rows, x, strict=True))
            for x in zip(*(v.chunk(micro) for v in rows.values()), strict=True)
        ]
    )

    def forward_step(batches, model):
        batch = split(next(batches))
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, loss_and_count

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=micro,
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=rows["tokens"].shape[0] // micro,
        forward_only=False,
    )
    total = sum((report["loss"] for report in reports), torch.zeros(2))
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def unsaved_parameters(tnl, gpt, hybrid):
    """Parameters that sharded_state_dict leaves out, of models with every optional weight."""
    set_up_groups(1, 2)
    norm = dict(output_norm="rms")
    tnl = TNLConfig(**tnl)
    config = tnl_transformer_config(tnl, **sizes_here())
    preset = presets.ling_2_6_flash(megatron=sizes_here(), **hybrid)
    models = {
        "TNL": gpt_model(config, get_tnl_block_spec(config, tnl, **norm), tnl.vocab_size, "rope"),
        "GPT": build_gpt(gpt, **norm),
        "hybrid": preset.gpt_model(64, vocab_size=64),
    }
    found = {}
    for kind, model in models.items():
        kept, _ = extract_sharded_tensors_and_factories(model.sharded_state_dict())
        kept = {id(entry.data) for entry in nested_values(kept)}
        parameters = dict(model.named_parameters())
        assert any("core_attention.norm" in name for name in parameters), kind
        found[kind] = [name for name, x in parameters.items() if id(x) not in kept]
    return found


def recompute_after_a_lost_forward(tnl, tokens):
    """The error of a backward after a forward in training mode without one."""
    set_up_groups(1, 2)
    recompute = dict(recompute_granularity="full", recompute_method="uniform")
    model = build_tnl(tnl, megatron=recompute | dict(recompute_num_layers=1))
    split = BatchSplitter(model)
    global_loss(model, split, tokens)
    try:
        global_loss(model, split, tokens.flip(1)).backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def half_precision(tnl, tokens):
    """(decay used by the first layer, its exact value, LRPE rates, loss) under Float16Module."""
    set_up_groups(1, 2)
    inner = build_tnl(tnl | dict(init_std=0.02), megatron=dict(bf16=True))
    model = Float16Module(inner.config, inner)
    attention = inner.decoder.layers[0].self_attention
    loss = summed(global_loss(model, BatchSplitter(model), tokens).detach())
    decay = attention.core_attention.log_decay(torch.device("cpu"))
    expected = lasp.decay.tnl(tnl["num_heads"], 0, tnl["num_layers"])
    return decay, expected, attention.lrpe.theta.detach(), loss.item()


def example(sizes, argv, name="megatron_gpt.py"):
    """Losses of an example with these options."""
    set_up_groups(*sizes)
    tp, cp, *pp = sizes
    if len(pp) > 1:
        argv = [*argv, f"--expert-model-parallel-size={pp[1]}"]
    argv = [*argv, "--device=cpu", "--data-path=random", "--seq-length=64", "--lr=2e-3"]
    argv += [f"--tensor-model-parallel-size={tp}", f"--context-parallel-size={cp}"]
    argv += [f"--pipeline-model-parallel-size={pp[0] if pp else 1}"]
    # Megatron writes in processes, and daemons may not start any.
    multiprocessing.current_process()._config["daemon"] = False
    script = load_example(name)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return script["train"](script["parse_arguments"](argv))
        except ValueError as error:
            return str(error)


def load_example(name):
    """The names that an example defines, as if Python had started it."""
    folder = str(ROOT / "examples")
    with mock.patch("sys.path", [folder, *sys.path]):
        return runpy.run_path(f"{folder}/{name}")


def optimizer_states(sizes, folder, *, save):
    """Float32 copies and moments of the example's optimizer in bfloat16, each by the name of the
    whole parameter: as saved and as loaded from a plain state dict (save=True), or as loaded from
    the checkpoint. Weights with and without weight decay beside LRPE's float32 rates."""
    set_up_groups(*sizes)
    multiprocessing.current_process()._config["daemon"] = False
    script = load_example("megatron_gpt.py")
    options = ["--bf16", "--device=cpu", "--data-path=random", "--seq-length=64"]
    options += [f"--tensor-model-parallel-size={sizes[0]}", f"--save={folder}"]
    options += [f"--context-parallel-size={sizes[1]}"]
    normed = functools.partial(get_tnl_block_spec, output_norm="rms")

    def set_up(seed):
        args = script["parse_arguments"]([*options, f"--seed={seed}"])
        with mock.patch.dict(script["set_up"].__globals__, get_tnl_block_spec=normed):
            return args, script["set_up"](args)

    (args, run), found = set_up(0), {}
    if save:
        for iteration in (1, 2):
            script["take_step"](args, run, iteration)
        found["saved"] = _optimizer_state(run)
        script["save_checkpoint"](args, run.bare, run.optimizer, 2)
        other = set_up(1)[1]
        other.bare.load_state_dict(run.bare.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        found["from a plain state dict"] = _optimizer_state(other)
    else:
        script["load_checkpoint"](args, run.bare, run.optimizer)
        found["from the checkpoint"] = _optimizer_state(run)
    return found


def _optimizer_state(run):
    (optimizer,) = run.optimizer.chained_optimizers
    found = {"copies": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in run.bare.named_parameters():
        copy_of_it = getattr(parameter, "main_param", parameter)
        found["copies"][name] = copy_of_it.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[moment][name] = optimizer.optimizer.state[copy_of_it][moment].clone()
    return {name: full(run.bare, tensors) for name, tensors in found.items()}


def saved_without_gradients():
    """Numbers of saved exchanges of a layer in FP8, whose checkpoint is Transformer Engine's."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.fp8, config.recompute_granularity = "hybrid", "full"
    exchanges = activation_checkpoint.SavedExchanges(config)
    keys, lengths = torch.ones(1, 4, 1, 8), []
    for grad, training in ((False, False), (False, True), (False, True), (True, True)):
        with (
            # An earlier job may have failed inside a checkpoint of Megatron's.
            mock.patch.object(activation_checkpoint, "is_checkpointing", lambda: False),
            torch.set_grad_enabled(grad),
            exchanges.around(keys, training=training),
        ):
            pass
        lengths.append(len(exchanges._queue))
    return lengths


def norms_of_example(tensors):
    """The norm of all tensors by the example's function, and by Megatron's that it replaces."""
    from megatron.core.utils import local_multi_tensor_l2_norm

    functions = load_example("megatron_gpt.py")["l2_norm"], local_multi_tensor_l2_norm
    return [function(0, None, [tensors], False)[0] for function in functions]


def step_of_example(grad_norm):
    """What the example's take_step returns if the optimizer gives this norm."""
    script = load_example("megatron_gpt.py")
    run = mock.Mock(**{"optimizer.step.return_value": (True, grad_norm, None)})
    with mock.patch.dict(script["take_step"].__globals__, forward_backward=lambda *args: 0.5):
        return script["take_step"](None, run, 1)


def hybrid_model_gradients(sizes, tnl, weights, tokens):
    """As native_gradients, of the model in Megatron's hybrid stack."""
    from parallel.megatron.hybrid import LINEAR, get_tnl_hybrid_stack_spec

    set_up_groups(*sizes)
    native = TNLConfig(**tnl)
    mixers = ["*" if native.is_softmax(i) else LINEAR for i in range(native.num_layers)]
    pattern = "".join(f"{mixer}-" for mixer in mixers)
    config = tnl_transformer_config(native, **sizes_here())
    config.num_layers = len(pattern)
    build, pattern_name = hybrid_host()
    model = build(
        config,
        get_tnl_hybrid_stack_spec(pattern, lrpe_layers=native.lrpe_layers),
        native.vocab_size,
        256,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope" if native.num_softmax_layers else "none",
        rotary_base=native.rope_base,
        **{pattern_name: pattern},
    )
    part = to_megatron(weights, native, **tp_shard())
    model.load_state_dict({in_stack(name): x for name, x in part.items()})
    loss, grads, exchanges = step(model, tokens)
    names = {in_stack(name): name for name in part}
    return loss, full_tnl({names[name]: x for name, x in grads.items()}, tnl), exchanges


def in_stack(name):
    """The name in the hybrid stack, where a block's two mixers are two layers."""
    offset = 1 if ".mlp." in name else 0
    return re.sub(r"layers\.(\d+)", lambda m: f"layers.{2 * int(m[1]) + offset}", name)


def hybrid_host():
    """(Megatron's model class, its name for the pattern)."""
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridModel, "hybrid_layer_pattern"
    except ImportError:
        from megatron.core.models.mamba import MambaModel

        return MambaModel, "hybrid_override_pattern"


def logits_and_weights(sizes, tnl, weights, tokens, padded):
    """(logits, weights by native names) of the Megatron TNL, its vocabulary padded."""
    set_up_groups(*sizes)
    config = tnl_transformer_config(TNLConfig(**tnl), **sizes_here())
    model = gpt_model(config, get_tnl_block_spec(config, TNLConfig(**tnl)), padded, "none")
    shard = to_megatron(weights, TNLConfig(**tnl), **tp_shard(), padded_vocab_size=padded)
    model.load_state_dict(shard)
    split = BatchSplitter(model)
    batch = split(dict(tokens=tokens, position_ids=torch.zeros_like(tokens)))
    with torch.no_grad():
        logits = model(*batch.values(), None, runtime_gather_output=True)
    return logits, full_tnl(dict(model.named_parameters()), tnl)
