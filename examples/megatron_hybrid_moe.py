"""Train a hybrid like Ling-2.6 with megatron-core: linear layers beside MLA, experts, and
multi-token prediction, over tensor, context, pipeline and expert parallel ranks.

    python launch/prepare_data.py                # once: data/stdlib
    torchrun --nproc_per_node 4 examples/megatron_hybrid_moe.py --bf16 \\
        --context-parallel-size 2 --expert-model-parallel-size 2 --save checkpoints/hybrid

A restart resumes from the newest checkpoint, also with other parallel sizes; but Megatron has one
optimizer with an expert parallel size of 1 and two with more, and reads no state of the other kind.
With --hf FOLDER the model has the shape of a published one, and with --load-weights CHECKPOINT the
weights that megatron_weights.py beside this file has made of them. The training loop is that of
megatron_gpt.py.
"""

import json

import megatron_gpt

from parallel.megatron.hf_weights import load_weights
from parallel.megatron.presets import from_hf_folder, ling_2_6_flash

# Seven linear layers and one MLA; the first has a dense MLP, the others 16 experts of which a token
# takes four, beside one that all take. 60M parameters.
SMALL = dict(
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    moe_intermediate_size=256,
)


def parse_arguments(argv=None):
    parser = megatron_gpt.argument_parser("Train a Ling-like hybrid with megatron-core.")
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--hf", help="Hugging Face folder, for the shape of its config.json")
    parser.add_argument("--load-weights", help="checkpoint to start from, of megatron_weights.py")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON that overrides SMALL")
    return parser.parse_args(argv)


def train(args):
    """Train within Megatron's groups; returns the losses since this start."""
    run = megatron_gpt.set_up(args, build=build_model, vocab_size=512)
    return megatron_gpt.take_steps(args, run)


def build_model(args, vocab_size, softmax_core=None):
    """(the model in Megatron's wrappers, the GPTModel inside)."""
    experts = args.expert_model_parallel_size
    fields = megatron_gpt.config_fields(args) | dict(
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=1 if experts > 1 else args.tensor_model_parallel_size,
        mtp_loss_scaling_factor=0.1,
        # Compiled, which pays on a GPU.
        bias_activation_fusion=args.device == "cuda",
    )
    if args.hf:
        preset = from_hf_folder(args.hf, megatron=fields)
        vocab_size = max(vocab_size, preset.model.hf["vocab_size"])
    else:
        preset = ling_2_6_flash(vocab_size=vocab_size, megatron=fields, **SMALL | args.shape)
    preset.spec.update(
        layout=args.linear_cp_layout,
        exchange=args.cp_exchange,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
    )
    bare = preset.gpt_model(max_sequence_length=args.seq_length, vocab_size=vocab_size)
    if args.load_weights:
        load_weights(bare, args.load_weights)
    return megatron_gpt.wrap(args, bare), bare


if __name__ == "__main__":
    megatron_gpt.main(parse_arguments(), train)
