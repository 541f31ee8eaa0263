"""Under torchrun: layers on Transformer Engine's linear layers, what was seen or an error, as JSON.

Started by test_transformer_engine.py. Megatron's groups are those of all ranks.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.tnl import TNLConfig
from parallel.megatron import (
    BatchSplitter,
    get_lasp_gpt_layer_spec,
    get_tnl_block_spec,
    tnl_transformer_config,
)
from parallel.megatron.presets import ling_2_6_flash

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import megatron_gpt
import megatron_hybrid_moe

VOCAB, TOKENS = 256, 512
TNL_CONFIG = TNLConfig(
    vocab_size=VOCAB, dim=512, num_layers=3, num_heads=4, glu_dim=768, init_std=0.06
)
GPT = dict(num_layers=3, hidden_size=512, num_attention_heads=4, normalization="RMSNorm")
GPT |= dict(attention_dropout=0.0, hidden_dropout=0.0, add_bias_linear=False, init_method_std=0.06)
HYBRID = dict(megatron_hybrid_moe.SMALL, num_hidden_layers=4, layer_group_size=4)
# Where Transformer Engine has the norm inside a linear layer, which changes its name.
NORMS = ("layernorm", "layer_norm", "_extra_state")


def gpt_model(config, spec, **options):
    options.setdefault("share_embeddings_and_output_weights", True)
    return GPTModel(config, spec, VOCAB, TOKENS, **options)


def tnl(has_te):
    config = tnl_transformer_config(TNL_CONFIG)
    spec = get_tnl_block_spec(config, TNL_CONFIG, backend=TESpecProvider() if has_te else None)
    return gpt_model(config, spec, position_embedding_type="none")


def gpt(has_te):
    config = TransformerConfig(**GPT)
    base = get_gpt_layer_with_transformer_engine_spec() if has_te else None
    base = base or get_gpt_layer_local_spec(normalization="RMSNorm")
    spec = get_lasp_gpt_layer_spec(base, decay="tnl")
    return gpt_model(config, spec, position_embedding_type="rope")


def hybrid(has_te):
    """MLA, MoE and multi-token prediction beside linear layers."""
    preset = ling_2_6_flash(vocab_size=VOCAB, megatron=dict(init_method_std=0.06), **HYBRID)
    preset.spec.update(use_transformer_engine=has_te)
    return preset.gpt_model(max_sequence_length=TOKENS, vocab_size=VOCAB)


def gradients(model, tokens):
    """(loss, gradients by name)."""
    positions = torch.arange(TOKENS).expand(tokens.shape[0], -1)
    batch = dict(tokens=tokens[:, :-1], labels=tokens[:, 1:], position_ids=positions)
    batch = {name: x.cuda() for name, x in BatchSplitter(model)(batch).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    loss = losses.float().mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def same_as_local(build):
    """The relative differences of loss and gradients from those of Megatron's local layers, and
    the weights, beside norms, that only one of them has or gives a gradient."""
    tokens = torch.randint(VOCAB, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    local, other = build(False).cuda(), build(True).cuda()
    weights, names = local.state_dict(), other.state_dict().keys()
    lacking = weights.keys() ^ names
    # All norms start with ones.
    other.load_state_dict({n: x for n, x in weights.items() if n in names}, strict=False)
    (wanted_loss, wanted), (loss, seen) = gradients(local, tokens), gradients(other, tokens)
    errors = {
        name: ((seen[name] - x).norm() / x.norm().clamp_min(1e-20)).item()
        for name, x in wanted.items()
        if name in seen
    }
    lacking |= wanted.keys() ^ seen.keys()
    lacking = sorted(name for name in lacking if not any(x in name for x in NORMS))
    return dict(lacking=lacking, loss=loss / wanted_loss - 1, errors=errors)


def example(*options, module=megatron_gpt):
    """Losses of an example in bfloat16."""
    argv = ["--bf16", "--data-path=random", f"--seq-length={TOKENS}", "--recompute", *options]
    with contextlib.redirect_stdout(io.StringIO()):
        return module.train(module.parse_arguments(argv))


def restarted(*options, steps):
    """Losses of an example that is started again after half of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            example(*options, f"--save={folder}", f"--train-iters={end}")
            for end in (steps // 2, steps)
        ]
    return runs[0] + runs[1]


TE = ("--transformer-impl=transformer_engine",)


def fp8():
    """Losses of the same steps in bfloat16 and FP8, and with FP8 resumed from a checkpoint."""
    eight = (*TE, "--fp8-format=hybrid")
    losses = {"local": example("--train-iters=6"), "TE": example(*TE, "--train-iters=6")}
    for recipe in ("tensorwise", "delayed"):
        losses[recipe] = example(*eight, f"--fp8-recipe={recipe}", "--train-iters=6")
    losses["resumed"] = restarted(*eight, steps=6)
    return losses


def distributed():
    """Losses of the same steps with the distributed optimizer, without and with a restart."""
    options = (*TE, "--use-distributed-optimizer")
    return {
        "at once": example(*options, "--train-iters=4"),
        "resumed": restarted(*options, steps=4),
    }


def hybrid_fp8():
    # The fused one needs libraries of cuDNN's that torch does not install everywhere.
    options = (f"--shape={json.dumps(HYBRID)}", "--train-iters=4", "--attention-backend=unfused")
    run = megatron_hybrid_moe
    return {
        "local": example(*options, module=run),
        "TE": example(*options, *TE, module=run),
        "FP8": example(*options, *TE, "--fp8-format=hybrid", module=run),
    }


CASES = {
    "TNL": lambda: same_as_local(tnl),
    "GPT": lambda: same_as_local(gpt),
    "hybrid": lambda: same_as_local(hybrid),
    "TNL in FP8": fp8,
    "distributed optimizer": distributed,
    "hybrid in FP8": hybrid_fp8,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl")
    report = {}
    for name in parser.parse_args().cases:
        parallel_state.initialize_model_parallel(1)
        model_parallel_cuda_manual_seed(0)
        began = time.perf_counter()
        # Megatron sets them by the first model's attention backend and refuses another.
        for kind in ("FLASH", "FUSED", "UNFUSED"):
            os.environ.pop(f"NVTE_{kind}_ATTN", None)
        try:
            report[name] = CASES[name]()
        except Exception:
            report[name] = {"failed": traceback.format_exc()[-1500:]}
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        print("report: " + json.dumps(report), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
