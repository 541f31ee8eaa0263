"""Rotary positions of this context-parallel rank's tokens, in either layout and within documents.

Megatron's rotary embedding always counts positions in zigzag, and for packed documents it expects
each document to be cut over the ranks by itself. Here a packed sequence is cut as a whole, so
documents may have any length; the positions of each token are computed from the boundaries.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import nn
from torch.distributed import ProcessGroup

from parallel.megatron.layout import segments

__all__ = ["ShardedRotaryEmbedding", "document_positions"]


def document_positions(
    cu_seqlens: torch.Tensor, num_tokens: int, layout: str, group: ProcessGroup
) -> torch.Tensor:
    """Positions, within their documents, of the tokens of this rank: int64 [num_tokens].

    Args:
        cu_seqlens: int32 [N + 1], boundaries of the documents in the full sequence.
        num_tokens: tokens of this rank.
    """
    rank, size = group.rank(), group.size()
    ranges = segments(num_tokens * size, layout, rank, size)
    boundaries = cu_seqlens.long()
    tokens = torch.cat([torch.arange(*each, device=boundaries.device) for each in ranges])
    first = torch.searchsorted(boundaries, tokens, right=True) - 1
    return tokens - boundaries[first]


class ShardedRotaryEmbedding(nn.Module):
    """Megatron's RotaryEmbedding (or Yarn's) for the tokens of a context-parallel rank.

    Args:
        stock: Megatron's; None of its parameters is changed.
        layout: "zigzag" or "contiguous".
        group: the context-parallel ranks; None: those of `stock`, or of the call.
        by_document: whether every layer that is given angles selects those of packed documents
            itself (`parallel.megatron.self_attention`); then a packed call returns the angles of
            all positions.
    """

    def __init__(
        self,
        stock: RotaryEmbedding,
        layout: str,
        group: ProcessGroup | None = None,
        *,
        by_document: bool = False,
    ) -> None:
        super().__init__()
        self.stock, self.layout, self.by_document = stock, layout, by_document
        self._group = [group or stock.cp_group]
        # Positions [t] that the next call returns the angles of, as [t, 1, dim].
        self.positions: torch.Tensor | None = None

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: ProcessGroup | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, float]:
        """Angles [s / cp, 1, 1, dim] of this rank's tokens of a sequence of max_seq_len; Yarn's
        with their factor.

        Raises:
            ValueError: packed documents over ranks, in a model with layers that do not select the
                angles of documents.
        """
        group = cp_group or self._group[0]
        size = 1 if group is None else group.size()
        if self.positions is not None:
            # Megatron's MLA has tokens as [t, H, D] here.
            return self._each(
                self.stock.get_emb(max_seq_len, offset),
                lambda emb: emb[self.positions].squeeze(1),
            )
        if size == 1 or (packed_seq and self.by_document):
            return self.stock.get_emb(max_seq_len, offset)
        if packed_seq:
            raise ValueError(
                f"packed_seq_params (thd) over {size} context-parallel ranks with rotary "
                "positions: the model has attention layers that count them in zigzag. Build all "
                "layers with get_lasp_gpt_layer_spec or get_lightning_hybrid_block_spec, or use "
                "position_embedding_type='none'."
            )
        parts = [
            self.stock.get_emb(stop - start, offset + start)
            for start, stop in segments(max_seq_len, self.layout, group.rank(), size)
        ]
        if isinstance(parts[0], tuple):
            return torch.cat([emb for emb, _ in parts]), parts[0][1]
        return torch.cat(parts)

    def get_rotary_seq_len(self, *args, **kwargs) -> int:
        return self.stock.get_rotary_seq_len(*args, **kwargs)

    @staticmethod
    def _each(result, select):
        return (select(result[0]), result[1]) if isinstance(result, tuple) else select(result)
