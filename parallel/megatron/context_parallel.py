"""Batches and positions sharded over context-parallel ranks: zigzag (Megatron's own) or contiguous.

With P ranks, "contiguous" gives rank r the r-th of P chunks; "zigzag" gives it chunks r and
2P - 1 - r of 2P, which balances causal softmax attention. A batch in one layout and a model built
for the other give a plausible loss and wrong gradients. So the layout is declared once, in the
spec; `BatchSplitter` reads it from the model, and a contiguous core attention refuses to run
without.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import (
    MultimodalRotaryEmbedding,
    RotaryEmbedding,
)
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.transformer.attention import Attention
from torch import nn
from torch.distributed import ProcessGroup

from parallel.megatron.layout import modules_of, segments
from parallel.megatron.multi_token import follow_layout
from parallel.megatron.rotary import ShardedRotaryEmbedding
from parallel.megatron.self_attention import PackedAttention

__all__ = ["BatchSplitter", "split_batch"]

# Entries of a batch that have no token dimension.
_NOT_SHARDED = frozenset(
    ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
)


def split_batch(
    batch: dict[str, torch.Tensor | None], layout: str, cp_group: ProcessGroup
) -> dict[str, torch.Tensor | None]:
    """This rank's shard of every tensor of a batch, in Megatron's local order.

    Args:
        batch: tensors [b, s, ...] of the full sequence (tokens, labels, loss_mask, position_ids),
            labels already shifted; "attention_mask" [b, 1, s, s]. None and Megatron's description
            of packed documents (cu_seqlens, max_seqlen, ...) are returned unchanged.

    Raises:
        ValueError: an unknown layout, or a length that it does not shard evenly.
    """
    rank, size = cp_group.rank(), cp_group.size()
    split = {}
    for name, x in batch.items():
        if x is not None and size > 1 and name not in _NOT_SHARDED:
            dim = 2 if name == "attention_mask" else 1
            ranges = segments(x.shape[dim], layout, rank, size)
            x = torch.cat([x.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        split[name] = x
    return split


class BatchSplitter:
    """Shards batches in the layout that a model was built for.

        split = BatchSplitter(model)          # once, after building the model
        batch = split(batch)                  # in place of Megatron's get_batch_on_this_cp_rank

    Reads the layout from the model's lasp attention layers. Over several ranks it also replaces the
    model's rotary embedding: Megatron's own always counts positions in zigzag, and those of packed
    documents as if each was cut over the ranks by itself. Multi-token prediction then follows the
    layout too (`multi_token.py`).

    Args:
        model: a model or a list of model chunks, wrapped in DDP and the like or not.
        layout: needed only if no layer has one (a pipeline stage with Megatron's softmax layers
            only).

    Raises:
        ValueError: layers that disagree, or that do not support the layout; a repeated layer of
            multi-token prediction that is recomputed.
    """

    def __init__(self, model: nn.Module | Iterable[nn.Module], layout: str | None = None) -> None:
        modules = modules_of(model)
        cores = [module for module in modules if hasattr(module, "sequence_layout")]
        layouts = {core.sequence_layout for core in cores} | ({layout} - {None})
        if len(layouts) != 1:
            raise ValueError(
                f"the model's attention layers (and the argument) name the layouts {layouts}: "
                "there must be exactly one. Give every layer spec the same layout=."
            )
        self.layout = layouts.pop()
        self.cp_group = cores[0].cp_group if cores else get_context_parallel_group()
        if self.cp_group.size() > 1:
            if self.layout == "contiguous":
                for module in modules:
                    _check_contiguous(module)
            # Layers of Megatron's classes cut each packed document over the ranks by itself.
            stock = [
                module
                for module in modules
                if isinstance(module, Attention) and not isinstance(module, PackedAttention)
            ]
            for module in modules:
                rotary = getattr(module, "rotary_pos_emb", None)
                if isinstance(rotary, RotaryEmbedding):
                    module.rotary_pos_emb = ShardedRotaryEmbedding(
                        rotary, self.layout, by_document=not stock
                    )
            config = next((each.config for each in modules if hasattr(each, "config")), None)
            _check_repeated_layer(config)
            per_token = getattr(config, "calculate_per_token_loss", False)
            follow_layout(self.cp_group, self.layout, per_token_loss=per_token)
        for core in cores:
            core.layout_confirmed = True

    def __call__(self, batch: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """As `split_batch`."""
        return split_batch(batch, self.layout, self.cp_group)


def _check_repeated_layer(config: object) -> None:
    """Raise ValueError for a layer that runs several times per batch and is recomputed: exchanges
    are kept for recomputation in the order of batches."""
    repeats = getattr(config, "mtp_use_repeated_layer", False)
    depth = getattr(config, "mtp_num_layers", None) or 0
    if repeats and depth > 1 and getattr(config, "recompute_granularity", None) == "full":
        raise ValueError(
            "config.mtp_use_repeated_layer is True with recompute_granularity 'full' over "
            "context-parallel ranks: a layer that runs several times per batch cannot be "
            "recomputed. Use separate layers of multi-token prediction, or do not recompute."
        )


def _check_contiguous(module: nn.Module) -> None:
    """Raise ValueError for a module that supports zigzag only."""
    rotary = getattr(module, "rotary_pos_emb", None)
    zigzag_only = None
    if type(module).__name__ == "TEDotProductAttention":
        zigzag_only = "TEDotProductAttention"
    elif isinstance(rotary, MultimodalRotaryEmbedding):
        zigzag_only = "MultimodalRotaryEmbedding"
    if zigzag_only:
        raise ValueError(
            f"the model has a {zigzag_only}, which supports zigzag only, beside layers with "
            "layout='contiguous': use layout='zigzag'."
        )
