"""Weights of the native TNL (`lasp.tnl`) to and from those of its Megatron form.

The rows of the fused projection have the same order in both, so a tensor-parallel shard is a range
of rows or columns. Two exceptions: Megatron's first MLP matrix holds w1 above w2 in each shard, and
its projection in softmax layers is ordered by key head: the queries of a head, its k, its v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lasp.tnl import TNLConfig

__all__ = ["from_megatron", "to_megatron"]

_EMBEDDING = "embedding.word_embeddings.weight"

# (native name, Megatron name, dim that tensor parallelism shards) within a layer.
_EVERY_LAYER = (
    ("token_mixer.out_proj.weight", "self_attention.linear_proj.weight", 1),
    ("channel_mixer.w3.weight", "mlp.linear_fc2.weight", 1),
)
_QKVU = ("token_mixer.qkvu_proj.weight", "self_attention.linear_qkvu.weight", 0)
_THETA = ("token_mixer.lrpe.theta", "self_attention.lrpe.theta", 0)
# In softmax layers.
_Q, _KV = "token_mixer.q_proj.weight", "token_mixer.kv_proj.weight"
_QKV = "self_attention.linear_qkv.weight"
_GATE = ("channel_mixer.w1.weight", "channel_mixer.w2.weight")
_FC1 = "mlp.linear_fc1.weight"


def to_megatron(
    state_dict: Mapping[str, torch.Tensor],
    config: TNLConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    layers: range | None = None,
    padded_vocab_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """`TNL(config).state_dict()` (or gradients by those names) as the shard of a tensor-parallel
    rank, for a GPTModel with get_tnl_block_spec and tied embeddings.

    Args:
        layers: those of a pipeline stage, from 0 over the model; None: all.
        padded_vocab_size: rows of Megatron's embedding; those beyond the vocabulary become zero.

    Raises:
        ValueError: heads, inner width or vocabulary that tp_size does not divide; a learned decay.
    """
    rows = padded_vocab_size or config.vocab_size
    _check(config, tp_size, rows)

    def shard(tensor, dim):
        return tensor.chunk(tp_size, dim)[tp_rank]

    embedding = state_dict["embedding.weight"]
    padding = embedding.new_zeros(rows - config.vocab_size, config.dim)
    embedding = shard(torch.cat([embedding, padding]), 0)
    layers = range(config.num_layers) if layers is None else layers
    converted = {}
    if layers.start == 0:
        converted[_EMBEDDING] = embedding
    elif layers.stop == config.num_layers:
        # The last pipeline stage has its own copy of the tied matrix.
        converted["output_layer.weight"] = embedding
    for local, i in enumerate(layers):
        native, theirs = f"blocks.{i}.", f"decoder.layers.{local}."
        for name, megatron_name, dim in _entries(config, i):
            tensor = state_dict[native + name]
            # Megatron's rates have one dimension.
            tensor = tensor.flatten() if name == _THETA[0] else tensor
            converted[theirs + megatron_name] = shard(tensor, dim)
        if config.is_softmax(i):
            q, kv = state_dict[native + _Q], state_dict[native + _KV]
            converted[theirs + _QKV] = shard(_join_qkv(q, kv, config), 0)
        converted[theirs + _FC1] = torch.cat([shard(state_dict[native + n], 0) for n in _GATE])
    return {name: tensor.clone() for name, tensor in converted.items()}


def from_megatron(
    shards: Sequence[Mapping[str, torch.Tensor]], config: TNLConfig
) -> dict[str, torch.Tensor]:
    """The inverse of `to_megatron`: the shards of all tensor-parallel ranks, in rank order, as a
    `TNL(config)` state dict. Rows that pad the vocabulary are dropped.

    Raises:
        ValueError: heads, inner width or vocabulary that the number of shards does not divide; a
            learned decay.
    """
    rows = sum(shard[_EMBEDDING].shape[0] for shard in shards)
    _check(config, len(shards), rows)

    def full(name, dim):
        return torch.cat([shard[name] for shard in shards], dim)

    converted = {"embedding.weight": full(_EMBEDDING, 0)[: config.vocab_size]}
    for i in range(config.num_layers):
        native, theirs = f"blocks.{i}.", f"decoder.layers.{i}."
        for name, megatron_name, dim in _entries(config, i):
            tensor = full(theirs + megatron_name, dim)
            shape = (config.num_heads, 1, config.head_dim) if name == _THETA[0] else tensor.shape
            converted[native + name] = tensor.view(shape)
        if config.is_softmax(i):
            q, kv = _split_qkv(full(theirs + _QKV, 0), config)
            converted[native + _Q], converted[native + _KV] = q, kv
        halves = [shard[theirs + _FC1].chunk(2) for shard in shards]
        for name, parts in zip(_GATE, zip(*halves, strict=True), strict=True):
            converted[native + name] = torch.cat(parts)
    return converted


def _entries(config, layer):
    if config.is_softmax(layer):
        return _EVERY_LAYER
    with_theta = (_THETA,) if layer in config.lrpe_layers else ()
    return (*_EVERY_LAYER, _QKVU, *with_theta)


def _join_qkv(q, kv, config):
    """Rows of q by head, and of (k, v) by key head -> by key head: its queries, its k, its v."""
    groups = config.num_key_value_heads or config.num_heads
    by_group = q.unflatten(0, (groups, -1)), kv.unflatten(0, (groups, -1))
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _split_qkv(qkv, config):
    groups = config.num_key_value_heads or config.num_heads
    rows = 2 * config.head_dim
    by_group = qkv.unflatten(0, (groups, -1))
    return by_group[:, :-rows].flatten(0, 1), by_group[:, -rows:].flatten(0, 1)


def _check(config, tp_size, rows):
    if variants := config.variants():
        raise ValueError(
            f"the config has {variants}: the layers of the Megatron plug-in are those of released "
            "models. Train this one with launch/train.py."
        )
    if config.decay != "fixed":
        raise ValueError(
            f"decay is {config.decay!r}: the layers of the Megatron plug-in have fixed decays. Use "
            'TNLConfig(decay="fixed"), or train this model with launch/train.py.'
        )
    sizes = {
        "num_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads or 0,
        "glu_dim": config.glu_dim,
        "vocabulary rows": rows,
    }
    uneven = {name: size for name, size in sizes.items() if size % tp_size}
    if uneven or rows < config.vocab_size:
        raise ValueError(
            f"{uneven or {'vocabulary rows': rows}} do not fit tensor-parallel size {tp_size} and "
            f"vocab_size {config.vocab_size}: choose a size that divides them (pad the vocabulary "
            "with padded_vocab_size)."
        )
