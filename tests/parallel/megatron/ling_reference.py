"""The Ling and Ring linear models (2.0, 2.5, 2.6) as plain functions of their published weights.

Written from the definitions in the code that is published with the weights
(modeling_bailing_moe_v2_5.py of inclusionAI/Ring-V2.5); no installable library has these models.
Attention is a loop over tokens, experts a loop over tokens and choices.

Shapes: B batch, T tokens, H heads, D head dim, V vocabulary. `w` maps names to tensors, which are
those below `prefix`.
"""

import math

import torch
import torch.nn.functional as F


def is_softmax(cfg, layer):
    group = cfg["layer_group_size"]
    return (layer + 1) % group == 0 or layer >= cfg["num_hidden_layers"] // group * group


def logits(w, cfg, tokens):
    """int64 [B, T] -> [B, T, V], and of each MTP layer likewise, in the weights' dtype."""
    embedding, head = w["model.word_embeddings.weight"], w["lm_head.weight"]
    hidden = embedding[tokens]
    for layer in range(cfg["num_hidden_layers"]):
        hidden = block(w, cfg, layer, hidden)
    hidden = rms_norm(hidden, w["model.norm.weight"], cfg["rms_norm_eps"])
    outputs = [hidden @ head.T]
    for depth in range(cfg.get("num_nextn_predict_layers", 0)):
        # A token that follows the text is token 0.
        tokens = F.pad(tokens[:, 1:], (0, 1))
        hidden = mtp_block(w, cfg, cfg["num_hidden_layers"] + depth, embedding[tokens], hidden)
        outputs.append(hidden @ head.T)
    return outputs


def block(w, cfg, layer, x):
    eps, name = cfg["rms_norm_eps"], f"model.layers.{layer}."
    normed = rms_norm(x, w[name + "input_layernorm.weight"], eps)
    x = x + attention(w, cfg, layer, normed)
    normed = rms_norm(x, w[name + "post_attention_layernorm.weight"], eps)
    if layer < cfg["first_k_dense_replace"]:
        return x + mlp(w, name + "mlp.", normed)
    return x + moe(w, cfg, name + "mlp.", normed)


def mtp_block(w, cfg, layer, embedded, hidden):
    eps, name = cfg["rms_norm_eps"], f"model.layers.{layer}."
    both = [
        rms_norm(embedded, w[name + "enorm.weight"], eps),
        rms_norm(hidden, w[name + "hnorm.weight"], eps),
    ]
    x = torch.cat(both, -1) @ w[name + "eh_proj.weight"].T
    normed = rms_norm(x, w[name + "input_layernorm.weight"], eps)
    x = x + latent_attention(w, cfg, name + "attention.", normed)
    normed = rms_norm(x, w[name + "post_attention_layernorm.weight"], eps)
    x = x + moe(w, cfg, name + "mlp.", normed)
    return rms_norm(x, w[name + "final_layernorm.weight"], eps)


def attention(w, cfg, layer, x):
    """The attention of a layer on its normalised input."""
    name = f"model.layers.{layer}.attention."
    if not is_softmax(cfg, layer):
        return linear_attention(w, cfg, layer, name, x)
    if cfg.get("kv_lora_rank"):
        return latent_attention(w, cfg, name, x)
    return grouped_attention(w, cfg, name, x)


def linear_attention(w, cfg, layer, prefix, x):
    heads, dim, eps = cfg["num_attention_heads"], cfg["head_dim"], cfg["rms_norm_eps"]
    q, k, v = (x @ w[prefix + "query_key_value.weight"].T).chunk(3, -1)
    q, k, v = (each.unflatten(-1, (heads, dim)) for each in (q, k, v))
    q = half_rotary(cfg, rms_norm(q, w[prefix + "query_layernorm.weight"], eps))
    k = half_rotary(cfg, rms_norm(k, w[prefix + "key_layernorm.weight"], eps))
    depth = 1 - (layer - 1) / (cfg["num_hidden_layers"] - 1) + 1e-5
    slopes = torch.tensor(alibi(heads), dtype=torch.float32).to(x.dtype)
    decay = torch.exp(-slopes * depth)[:, None, None]
    state, outputs = x.new_zeros(x.shape[0], heads, dim, dim), []
    for t in range(x.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhd,bhde->bhe", q[:, t] * dim**-0.5, state))
    o = torch.stack(outputs, 1).flatten(2)
    grouped = o.unflatten(-1, (cfg["group_norm_size"], -1))
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    o = grouped.flatten(-2) * w[prefix + "g_norm.weight"]
    o = o * torch.sigmoid(x @ w[prefix + "g_proj.weight"].T)
    return o @ w[prefix + "dense.weight"].T


def alibi(heads):
    """Slopes of ALiBi, also for a number of heads that is no power of two."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    more = [2 ** (-4 * (h + 1) / power) for h in range(0, 2 * power, 2)]
    return slopes + more[: heads - power]


def grouped_attention(w, cfg, prefix, x):
    heads, groups = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    dim, eps = cfg["head_dim"], cfg["rms_norm_eps"]
    rows = (x @ w[prefix + "query_key_value.weight"].T).unflatten(-1, (-1, dim))
    q, k, v = rows.split([heads, groups, groups], dim=-2)
    q = half_rotary(cfg, rms_norm(q, w[prefix + "query_layernorm.weight"], eps))
    k = half_rotary(cfg, rms_norm(k, w[prefix + "key_layernorm.weight"], eps))
    k, v = (each.repeat_interleave(heads // groups, dim=-2) for each in (k, v))
    return softmax(q, k, v) @ w[prefix + "dense.weight"].T


def latent_attention(w, cfg, prefix, x):
    heads, plain, rotated = (
        cfg[name] for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    if cfg["q_lora_rank"] is None:
        q = x @ w[prefix + "q_proj.weight"].T
    else:
        q = rms_norm(x @ w[prefix + "q_a_proj.weight"].T, w[prefix + "q_a_layernorm.weight"], 1e-6)
        q = q @ w[prefix + "q_b_proj.weight"].T
    q = q.unflatten(-1, (heads, plain + rotated))
    latent = x @ w[prefix + "kv_a_proj_with_mqa.weight"].T
    latent, k_rotated = latent.split([cfg["kv_lora_rank"], rotated], -1)
    latent = rms_norm(latent, w[prefix + "kv_a_layernorm.weight"], 1e-6)
    kv = (latent @ w[prefix + "kv_b_proj.weight"].T).unflatten(-1, (heads, -1))
    k, v = kv.split([plain, cfg["v_head_dim"]], -1)
    # One rotated key for all heads; neighbours are pairs.
    k_rotated = pair_rotary(cfg, k_rotated[:, :, None]).expand(-1, -1, heads, -1)
    q = torch.cat([q[..., :plain], pair_rotary(cfg, q[..., plain:])], -1)
    return softmax(q, torch.cat([k, k_rotated], -1), v) @ w[prefix + "dense.weight"].T


def softmax(q, k, v):
    """[B, T, H, *] -> [B, T, H * D], causal."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhe->bihe", weights, v).flatten(2)


def angles(cfg, tokens, dim, dtype):
    """[T, 1, dim / 2]."""
    rates = cfg["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (torch.arange(tokens, dtype=torch.float32)[:, None] * rates).to(dtype)[:, None]


def half_rotary(cfg, x):
    """Rotates the first part of each head: dimension i with dimension i + half of that part."""
    dim = int(x.shape[-1] * cfg["partial_rotary_factor"])
    a, b, rest = x.split([dim // 2, dim // 2, x.shape[-1] - dim], -1)
    turn = angles(cfg, x.shape[1], dim, x.dtype)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def pair_rotary(cfg, x):
    """Rotates neighbouring dimensions: 2i with 2i + 1."""
    turn = angles(cfg, x.shape[1], x.shape[-1], x.dtype)
    cos, sin = turn.cos(), turn.sin()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def mlp(w, prefix, x):
    gate, up = (x @ w[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up"))
    return (F.silu(gate) * up) @ w[prefix + "down_proj.weight"].T


def moe(w, cfg, prefix, x):
    experts = []
    for token in x.flatten(0, -2):
        chosen, shares = route(w, cfg, prefix, token)
        parts = [
            share * mlp(w, f"{prefix}experts.{expert}.", token)
            for expert, share in zip(chosen, shares, strict=True)
        ]
        experts.append(sum(parts))
    return torch.stack(experts).view_as(x) + mlp(w, prefix + "shared_experts.", x)


def route(w, cfg, prefix, token):
    """The experts of a token, and their shares."""
    scores = torch.sigmoid(w[prefix + "gate.weight"] @ token)
    biased = scores + w[prefix + "gate.expert_bias"].to(scores.dtype)
    groups = biased.view(cfg["n_group"], -1)
    strength = groups.topk(2, dim=1).values.sum(1)
    allowed = torch.full_like(groups, -math.inf)
    best = strength.topk(cfg["topk_group"]).indices
    allowed[best] = groups[best]
    chosen = allowed.flatten().topk(cfg["num_experts_per_tok"]).indices
    shares = scores[chosen] / (scores[chosen].sum() + 1e-20) * cfg["routed_scaling_factor"]
    return chosen.tolist(), shares
