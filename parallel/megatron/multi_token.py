"""Megatron's multi-token prediction in either layout and with packed documents.

The layers that predict further tokens read and predict rolled sequences: each token's successor.
Megatron's roll over context-parallel ranks assumes zigzag, and for packed documents that each is
cut over the ranks by itself; a contiguous batch then gets the successors of other tokens, at a
plausible loss. `BatchSplitter` therefore puts `roll_tensor` of this module in the place of
Megatron's. It gives all other groups what Megatron's gives.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import gpt_model
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from torch.distributed import ProcessGroup

from parallel.megatron.layout import segments

__all__ = ["follow_layout", "roll_tensor"]

_megatron_roll = multi_token_prediction.roll_tensor
# The layout that batches of a context-parallel group have, and whether the loss is per token.
_layouts: weakref.WeakKeyDictionary[ProcessGroup, tuple[str, bool]] = weakref.WeakKeyDictionary()


def follow_layout(cp_group: ProcessGroup, layout: str, *, per_token_loss: bool) -> None:
    """From now on Megatron rolls the sequences of `cp_group` in `layout`; `per_token_loss`: of the
    model's config (calculate_per_token_loss)."""
    _layouts[cp_group] = layout, per_token_loss
    for module in (multi_token_prediction, gpt_model):
        # Since 0.17 gpt_model has none of its own.
        if hasattr(module, "roll_tensor"):
            module.roll_tensor = roll_tensor


def roll_tensor(
    tensor: torch.Tensor,
    shifts: int = -1,
    dims: int = -1,
    cp_group: ProcessGroup | None = None,
    packed_seq_params: PackedSeqParams | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's roll_tensor: (each token's successor, this rank's count of them), zero where the
    sequence or the document ends.

    The count of a mask of tokens is by what Megatron divides the loss. Counts of single ranks would
    make the gradients depend on the number of ranks, for masks differ from rank to rank, and only
    the last one has a token without successor. With calculate_per_token_loss, Megatron (since 0.18)
    gives the tokens that have a successor the weight of all: this rank's count is its number of
    tokens before the first roll, times the part of all ranks' that is left. Without it, the mean
    over ranks is taken: the count is the mean of all ranks' too.

    Args:
        tensor: [..., s], tokens of this rank along the last dimension.

    Raises:
        ValueError: another shift or dimension, over ranks whose layout is known.
    """
    known = None if cp_group is None or cp_group.size() == 1 else _layouts.get(cp_group)
    if known is None:
        return _megatron_roll(tensor, shifts, dims, cp_group, packed_seq_params)
    if shifts != -1 or dims not in (-1, tensor.dim() - 1):
        raise ValueError(
            f"shifts is {shifts} and dims {dims}: sequences over context-parallel ranks are rolled "
            "by one token to the left, along the last dimension."
        )
    layout, per_token_loss = known
    rank, size = cp_group.rank(), cp_group.size()
    total = tensor.shape[-1] * size
    rolled = _successors(tensor, segments(total, layout, rank, size), cp_group, layout)
    if packed_seq_params is not None:
        padded = packed_seq_params.cu_seqlens_q_padded
        cu_seqlens = packed_seq_params.cu_seqlens_q if padded is None else padded
        places = torch.cat(
            [torch.arange(*each) for each in segments(total, layout, rank, size)]
        ).to(tensor.device)
        ends = torch.isin(places + 1, cu_seqlens.to(tensor.device))
        rolled = rolled.masked_fill(ends, 0)
    return rolled, _count(tensor, rolled, cp_group, per_token_loss)


def _count(tensor, rolled, group, per_token_loss):
    sums = torch.stack([tensor.sum().double(), rolled.sum().double()])
    local = sums[0].clone()
    dist.all_reduce(sums, group=group)
    # Further rolls of a mask refer to the first.
    rolled.lasp_tokens = local, total = getattr(tensor, "lasp_tokens", (local, sums[0]))
    if not per_token_loss:
        # Not 0: 0.16 divides by it.
        return sums[1].clamp(min=1) / group.size()
    return local * sums[1] / total.clamp(min=1)


def _successors(tensor: torch.Tensor, ranges: Any, group: ProcessGroup, layout: str):
    """Each token's successor [..., s]; zero after the last token of the sequence."""
    size = group.size()
    chunks = tensor.split([stop - start for start, stop in ranges], dim=-1)
    first = torch.stack([chunk[..., 0] for chunk in chunks]).contiguous()
    firsts = [torch.empty_like(first) for _ in range(size)]
    dist.all_gather(firsts, first, group=group)
    total = tensor.shape[-1] * size
    # Start of a chunk -> its first tokens.
    at = {
        start: firsts[rank][i]
        for rank in range(size)
        for i, (start, _) in enumerate(segments(total, layout, rank, size))
    }
    at[total] = torch.zeros_like(first[0])
    return torch.cat(
        [
            torch.cat([chunk[..., 1:], at[stop].unsqueeze(-1)], dim=-1)
            for chunk, (_, stop) in zip(chunks, ranges, strict=True)
        ],
        dim=-1,
    )
