"""Which tensors of a published Ling, Ring or MiniMax model make which tensor of its Megatron form.

Names, shapes and orders of rows only: no files. Both forms hold the same numbers, so conversion is
exact in either direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Entry", "is_derived", "ling_entries", "minimax_entries", "other_name"]

# Buffers that published folders may hold, computed from the config: the decays of MiniMax in
# transformers' form, and those of rotary embeddings.
_DERIVED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "slope", "inv_freq")


@dataclass(frozen=True)
class HeadRows:
    """Rows of a fused projection.

    Published: of all queries, all keys, all values and all gates, one after the other; or, if
    `fused`, the q, k, v of the first head, of the second, ..., then all gates. Megatron's: for each
    key head its queries, their gates, its k and its v.

    Attributes:
        heads, groups, dim: query heads, key heads, rows of a head.
        gated: there are gates, one for each query head.
    """

    heads: int
    groups: int
    dim: int
    gated: bool = False
    fused: bool = False

    def by_key_head(self, rows: Tensor) -> Tensor:
        """Published rows in Megatron's order."""
        sizes = [n * self.dim for n in (self.heads, self.groups, self.groups)]
        qkv, *gates = rows.split([sum(sizes), self.heads * self.dim][: 1 + self.gated])
        if self.fused:
            q, k, v = qkv.unflatten(0, (self.groups, 3, self.dim)).unbind(1)
        else:
            q, k, v = (each.unflatten(0, (self.groups, -1)) for each in qkv.split(sizes))
        gates = [each.unflatten(0, (self.groups, -1)) for each in gates]
        return torch.cat([q, *gates, k, v], 1).flatten(0, 1)

    def by_kind(self, rows: Tensor) -> Tensor:
        """The inverse."""
        each_q = self.heads // self.groups * self.dim
        sizes = [each_q, *[each_q] * self.gated, self.dim, self.dim]
        q, *gates, k, v = rows.unflatten(0, (self.groups, -1)).split(sizes, 1)
        if self.fused:
            parts = [torch.cat([q, k, v], 1), *gates]
        else:
            parts = [q, k, v, *gates]
        return torch.cat([each.flatten(0, 1) for each in parts])


@dataclass(frozen=True)
class Entry:
    """One tensor of the Megatron form, or one expert's slice of it.

    Attributes:
        key: its name in a Megatron checkpoint.
        parts: name and shape of the published tensors whose rows, one after the other, it holds.
        heads: reorders these rows; None: they have the same order.
        expert: (index, number of experts), if the tensor holds all experts of a layer.
        padded: its rows, those of the vocabulary, may be followed by padding.
    """

    key: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    heads: HeadRows | None = None
    expert: tuple[int, int] | None = None
    padded: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor or slice."""
        rows = sum(shape[0] for _, shape in self.parts)
        return (rows, *self.parts[0][1][1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The published tensors as one of Megatron's."""
        rows = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return rows if self.heads is None else self.heads.by_key_head(rows)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """The inverse."""
        rows = tensor if self.heads is None else self.heads.by_kind(tensor)
        return rows.split([shape[0] for _, shape in self.parts])


# Names of the norms before attention and MLP: inside the matrices that follow them, as Transformer
# Engine and Megatron's specs without MLA have them, and by themselves.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Likewise of MLA's latents, which Transformer Engine norms in the projections that follow.
_FUSED_LATENT_NORMS = {
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}


def other_name(key: str) -> str:
    """The name that a tensor has with Megatron's other backends; the same for most."""
    for fused, alone in (_FUSED_NORMS | _FUSED_LATENT_NORMS).items():
        for ours, theirs in ((fused, alone), (alone, fused)):
            if key.endswith("." + ours):
                return key.removesuffix(ours) + theirs
    return key


def is_derived(name: str) -> bool:
    """True for a tensor that a published folder may hold although its config determines it."""
    return name.rpartition(".")[2] in _DERIVED


def _same(key: str, name: str, *shape: int) -> Entry:
    return Entry(f"{key}.weight", ((f"{name}.weight", shape),))


def _swiglu(key, name, hidden, inner, names, expert=None) -> Iterator[Entry]:
    """A gated MLP; `names` are those of its gate, its other input and its output matrix."""
    gate, up, down = (f"{name}.{each}.weight" for each in names)
    rows = (inner, hidden)
    yield Entry(f"{key}.linear_fc1.weight", ((gate, rows), (up, rows)), expert=expert)
    yield Entry(f"{key}.linear_fc2.weight", ((down, (hidden, inner)),), expert=expert)


def ling_entries(hf: Mapping[str, Any]) -> Iterator[Entry]:
    """Of a Ling or Ring linear model, 2.0 (softmax layers with grouped queries) to 2.6 (MLA).

    Args:
        hf: the content of its config.json.
    """
    hidden, vocab, layers = hf["hidden_size"], hf["vocab_size"], hf["num_hidden_layers"]
    table = (("model.word_embeddings.weight", (vocab, hidden)),)
    yield Entry("embedding.word_embeddings.weight", table, padded=True)
    for layer in range(layers):
        name, key = f"model.layers.{layer}", f"decoder.layers.{layer}"
        yield from _ling_layer(hf, layer, name, key)
    yield _same("decoder.final_layernorm", "model.norm", hidden)
    yield Entry("output_layer.weight", (("lm_head.weight", (vocab, hidden)),), padded=True)
    for depth in range(hf.get("num_nextn_predict_layers") or 0):
        name, key = f"model.layers.{layers + depth}", f"mtp.layers.{depth}"
        for each in ("enorm", "hnorm", "final_layernorm"):
            yield _same(f"{key}.{each}", f"{name}.{each}", hidden)
        yield _same(f"{key}.eh_proj", f"{name}.eh_proj", hidden, 2 * hidden)
        yield from _ling_layer(hf, layers + depth, name, f"{key}.transformer_layer")


def _ling_layer(hf, layer, name, key):
    hidden, mlp = hf["hidden_size"], f"{name}.mlp"
    norms = zip(_FUSED_NORMS.items(), ("input", "post_attention"), strict=True)
    for (fused, alone), place in norms:
        norm = alone if hf.get("kv_lora_rank") else fused
        yield Entry(f"{key}.{norm}", ((f"{name}.{place}_layernorm.weight", (hidden,)),))
    attention = f"{key}.self_attention", f"{name}.attention"
    if not is_softmax_layer(hf, layer):
        yield from _ling_linear(hf, *attention)
    elif hf.get("kv_lora_rank"):
        yield from _ling_latent(hf, *attention)
    else:
        yield from _ling_grouped(hf, *attention)
    names = ("gate_proj", "up_proj", "down_proj")
    if layer < hf["first_k_dense_replace"]:
        yield from _swiglu(f"{key}.mlp", mlp, hidden, hf["intermediate_size"], names)
        return
    experts, inner = hf["num_experts"], hf["moe_intermediate_size"]
    yield _same(f"{key}.mlp.router", f"{mlp}.gate", experts, hidden)
    bias = ((f"{mlp}.gate.expert_bias", (experts,)),)
    yield Entry(f"{key}.mlp.router.expert_bias", bias)
    for expert in range(experts):
        place, all_of_them = f"{mlp}.experts.{expert}", f"{key}.mlp.experts.experts"
        yield from _swiglu(all_of_them, place, hidden, inner, names, (expert, experts))
    shared = inner * hf["num_shared_experts"]
    yield from _swiglu(f"{key}.mlp.shared_experts", f"{mlp}.shared_experts", hidden, shared, names)


def is_softmax_layer(hf: Mapping[str, Any], layer: int) -> bool:
    """True if a layer of a Ling or Ring linear model has softmax attention (MTP layers have)."""
    group, layers = hf["layer_group_size"], hf["num_hidden_layers"]
    return (layer + 1) % group == 0 or layer >= layers // group * group


def _ling_linear(hf, key, name):
    heads, width = hf["num_attention_heads"], hf["num_attention_heads"] * hf["head_dim"]
    gates = (f"{name}.g_proj.weight", (width, hf["hidden_size"]))
    yield from _ling_qkv(hf, key, name, heads, (gates,))
    yield _same(f"{key}.core_attention.norm", f"{name}.g_norm", width)


def _ling_grouped(hf, key, name):
    yield from _ling_qkv(hf, key, name, hf["num_key_value_heads"])


def _ling_qkv(hf, key, name, groups, gates=()):
    heads, dim, hidden = hf["num_attention_heads"], hf["head_dim"], hf["hidden_size"]
    qkv = (f"{name}.query_key_value.weight", ((heads + 2 * groups) * dim, hidden))
    order = HeadRows(heads, groups, dim, gated=bool(gates))
    yield Entry(f"{key}.linear_qkv.weight", (qkv, *gates), heads=order)
    yield _same(f"{key}.q_layernorm", f"{name}.query_layernorm", dim)
    yield _same(f"{key}.k_layernorm", f"{name}.key_layernorm", dim)
    yield _same(f"{key}.linear_proj", f"{name}.dense", hidden, heads * dim)


def _ling_latent(hf, key, name):
    heads, hidden, latent = hf["num_attention_heads"], hf["hidden_size"], hf["kv_lora_rank"]
    plain, rotated, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    rank, queries = hf.get("q_lora_rank"), heads * (plain + rotated)
    if rank is None:
        yield _same(f"{key}.linear_q_proj", f"{name}.q_proj", queries, hidden)
    else:
        yield _same(f"{key}.linear_q_down_proj", f"{name}.q_a_proj", rank, hidden)
        yield _same(f"{key}.q_layernorm", f"{name}.q_a_layernorm", rank)
        yield _same(f"{key}.linear_q_up_proj", f"{name}.q_b_proj", queries, rank)
    down, up = latent + rotated, heads * (plain + value)
    yield _same(f"{key}.linear_kv_down_proj", f"{name}.kv_a_proj_with_mqa", down, hidden)
    yield _same(f"{key}.kv_layernorm", f"{name}.kv_a_layernorm", latent)
    yield _same(f"{key}.linear_kv_up_proj", f"{name}.kv_b_proj", up, latent)
    yield _same(f"{key}.linear_proj", f"{name}.dense", hidden, heads * value)


def minimax_entries(hf: Mapping[str, Any]) -> Iterator[Entry]:
    """Of MiniMax-Text-01 and M1.

    Args:
        hf: the content of its config.json, with "layer_types".
    """
    hidden, vocab = hf["hidden_size"], hf["vocab_size"]
    table = (("model.embed_tokens.weight", (vocab, hidden)),)
    yield Entry("embedding.word_embeddings.weight", table, padded=True)
    for layer, kind in enumerate(hf["layer_types"]):
        name, key = f"model.layers.{layer}", f"decoder.layers.{layer}"
        yield _same(f"{key}.residual_norm", f"{name}.input_layernorm", hidden)
        yield _same(f"{key}.post_attention_norm", f"{name}.post_attention_layernorm", hidden)
        attention = _minimax_linear if kind == "linear_attention" else _minimax_softmax
        yield from attention(hf, f"{key}.self_attention", f"{name}.self_attn")
        moe, experts = f"{name}.block_sparse_moe", hf["num_local_experts"]
        yield _same(f"{key}.mlp.router", f"{moe}.gate", experts, hidden)
        for expert in range(experts):
            yield from _swiglu(
                f"{key}.mlp.experts.experts",
                f"{moe}.experts.{expert}",
                hidden,
                hf["intermediate_size"],
                ("w1", "w3", "w2"),
                (expert, experts),
            )
    yield _same("decoder.final_layernorm", "model.norm", hidden)
    yield Entry("output_layer.weight", (("lm_head.weight", (vocab, hidden)),), padded=True)


def _minimax_linear(hf, key, name):
    hidden, heads, dim = hf["hidden_size"], hf["num_attention_heads"], hf["head_dim"]
    width = heads * dim
    parts = (
        (f"{name}.qkv_proj.weight", (3 * width, hidden)),
        (f"{name}.output_gate.weight", (width, hidden)),
    )
    order = HeadRows(heads, heads, dim, gated=True, fused=True)
    yield Entry(f"{key}.linear_qkv.weight", parts, heads=order)
    yield _same(f"{key}.core_attention.norm", f"{name}.norm", width)
    yield _same(f"{key}.linear_proj", f"{name}.out_proj", hidden, width)


def _minimax_softmax(hf, key, name):
    hidden, dim = hf["hidden_size"], hf["head_dim"]
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    parts = tuple(
        (f"{name}.{kind}_proj.weight", (count * dim, hidden))
        for kind, count in (("q", heads), ("k", groups), ("v", groups))
    )
    yield Entry(f"{key}.linear_qkv.weight", parts, heads=HeadRows(heads, groups, dim))
    yield _same(f"{key}.linear_proj", f"{name}.o_proj", hidden, heads * dim)
