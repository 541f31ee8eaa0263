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
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from lasp.shard import LAYOUTS, token_ranges
from parallel.megatron.validation import check_choice

__all__ = [
    "BatchSplitter",
    "ContiguousRotaryEmbedding",
    "segments",
    "sequence_layout",
    "split_batch",
]

# Entries of a batch that have no token dimension.
_NOT_SHARDED = frozenset(
    ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
)


def segments(total: int, layout: str, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the tokens that a rank of `size` holds, in local order.

    Raises:
        ValueError: an unknown layout, or a length that it does not shard evenly, as Megatron needs.
    """
    layout = sequence_layout(None, layout)
    count = size * (2 if layout == "zigzag" else 1)
    if size == 1:
        return ((0, total),)
    if total % count:
        raise ValueError(
            f"a sequence of {total} tokens does not split into {count} equal chunks ({layout} over "
            f"{size} context-parallel ranks): choose a multiple of {count}."
        )
    return token_ranges(total, size, rank, layout)


def sequence_layout(config: TransformerConfig | None, layout: str | None) -> str:
    """`layout`, or if None that of Megatron's config, or zigzag; ValueError for an unknown one."""
    layout = layout or getattr(config, "linear_cp_layout", None) or "zigzag"
    check_choice("layout", layout, LAYOUTS)
    return layout


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

    Reads the layout from the model's lasp attention layers. For "contiguous" it also replaces the
    model's rotary embedding, since Megatron's own always counts positions in zigzag.

    Args:
        model: a model or a list of model chunks, wrapped in DDP and the like or not.
        layout: needed only if no layer has one (a pipeline stage with Megatron's softmax layers
            only).

    Raises:
        ValueError: layers that disagree, or that do not support the layout.
    """

    def __init__(self, model: nn.Module | Iterable[nn.Module], layout: str | None = None) -> None:
        chunks = [model] if isinstance(model, nn.Module) else list(model)
        modules = [module for chunk in chunks for module in chunk.modules()]
        cores = [module for module in modules if hasattr(module, "sequence_layout")]
        layouts = {core.sequence_layout for core in cores} | ({layout} - {None})
        if len(layouts) != 1:
            raise ValueError(
                f"the model's attention layers (and the argument) name the layouts {layouts}: "
                "there must be exactly one. Give every layer spec the same layout=."
            )
        self.layout = layouts.pop()
        self.cp_group = cores[0].cp_group if cores else get_context_parallel_group()
        if self.layout == "contiguous" and self.cp_group.size() > 1:
            for module in modules:
                _check_contiguous(module)
            for module in modules:
                rotary = getattr(module, "rotary_pos_emb", None)
                if isinstance(rotary, RotaryEmbedding):
                    module.rotary_pos_emb = ContiguousRotaryEmbedding(rotary)
        for core in cores:
            core.layout_confirmed = True

    def __call__(self, batch: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """As `split_batch`."""
        return split_batch(batch, self.layout, self.cp_group)


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


class ContiguousRotaryEmbedding(nn.Module):
    """Megatron's RotaryEmbedding, sharded contiguously over the context-parallel ranks."""

    def __init__(self, stock: RotaryEmbedding) -> None:
        super().__init__()
        self.stock = stock

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Angles [s / cp, 1, 1, dim] of this rank's tokens of a sequence of max_seq_len."""
        group = cp_group or self.stock.cp_group
        if group is None or group.size() == 1:
            return self.stock.get_emb(max_seq_len, offset)
        if packed_seq:
            # Megatron selects angles document by document, in zigzag.
            raise ValueError(
                f"packed_seq_params (thd) over {group.size()} context-parallel ranks with rotary "
                "positions: Megatron counts them in zigzag. Use position_embedding_type='none', "
                "or one context-parallel rank."
            )
        ((start, stop),) = segments(max_seq_len, "contiguous", group.rank(), group.size())
        return self.stock.get_emb(stop - start, offset + start)

    def get_rotary_seq_len(self, *args, **kwargs) -> int:
        return self.stock.get_rotary_seq_len(*args, **kwargs)
