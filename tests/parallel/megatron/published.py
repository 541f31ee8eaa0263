"""Small models of the published kinds: their config.json and random weights, as folders."""

import json

import torch
from safetensors.torch import save_file

from parallel.megatron.hf_config import published_model

# The published proportions: groups of layers, groups of experts, half of each head rotated.
LING_2_0 = dict(
    model_type="bailing_moe_linear",
    vocab_size=64,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    layer_group_size=5,
    group_norm_size=2,
    first_k_dense_replace=1,
    num_experts=8,
    num_experts_per_tok=4,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
    moe_intermediate_size=24,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    partial_rotary_factor=0.5,
)
LING_2_6 = LING_2_0 | dict(
    model_type="bailing_hybrid",
    num_key_value_heads=4,
    layer_group_size=3,
    num_hidden_layers=6,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=10,
    num_nextn_predict_layers=1,
)
MINIMAX = dict(
    model_type="minimax_text_01",
    vocab_size=64,
    hidden_size=48,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts_per_tok=2,
    num_local_experts=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rotary_dim=8,
    postnorm=True,
    attn_type_list=[0, 0, 0, 1],
    layernorm_linear_attention_alpha=1.5,
    layernorm_full_attention_alpha=1.25,
    layernorm_mlp_alpha=1.75,
)


def random_weights(values, dtype=torch.float32, seed=0):
    """Tensors of the published form by name; norms differ from one, so that a swap shows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry in published_model(values).entries():
        for name, shape in entry.parts:
            x = torch.randn(shape, generator=generator)
            if name.endswith("expert_bias"):
                weights[name] = 0.1 * x
            elif len(shape) == 1:
                weights[name] = (1 + 0.2 * x).to(dtype)
            else:
                weights[name] = (x / shape[-1] ** 0.5).to(dtype)
    return weights


def write_folder(path, values, weights, files=1):
    """A Hugging Face folder with that many weight files."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values | {"torch_dtype": "bfloat16"}))
    (path / "tokenizer.json").write_text("{}")
    names = list(weights)
    if files == 1:
        save_file(weights, path / "model.safetensors")
        return path
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: weights[name] for name in names[number::files]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
