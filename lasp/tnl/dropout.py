"""Dropout whose masks are a function of seed, layer, position and channel, and of nothing else.

A value x becomes x / (1 - rate) or, with probability `rate`, zero. Which of them is decided by a
hash of (the sequence's seed, the place in the model, the token's position in the global sequence,
the channel). No random state is kept, so that a block that is recomputed has the masks of its first
run, and a sequence the same masks on any number of ranks, in segments, and in a resumed run.

Shapes: B batch, T tokens of this shard, d model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["DropoutKey", "dropout"]

_MASK = 0xFFFFFFFF
# Odd, to spread small numbers over 32 bits; below 2^31, so that no product leaves int64.
_SPREAD = 0x1E3779B1


class DropoutKey(NamedTuple):
    """What the masks of a layer depend on.

    Attributes:
        rows: int64 [B, T], a hash of the sequence's seed, the layer, and the token's position.
        rate: probability of zero.
    """

    rows: torch.Tensor
    rate: float

    @classmethod
    def of(cls, seeds: torch.Tensor, positions: torch.Tensor, rate: float) -> DropoutKey:
        """The key of sequences with `seeds` int64 [B], for tokens at `positions` int64 [T]."""
        of_sequence = _mix(_mix(seeds) + (seeds >> 32))
        of_position = _mix(_mix(positions) + (positions >> 32))
        return cls(_mix(of_sequence[:, None] * 3 + of_position), rate)

    def of_layer(self, number: int) -> DropoutKey:
        """The key of a layer. (A compiled block then sees other values, and no other constants.)"""
        return DropoutKey(_mix(self.rows + number * _SPREAD), self.rate)


def dropout(x: torch.Tensor, key: DropoutKey | None, place: int = 0) -> torch.Tensor:
    """x [B, T, d] with dropout, of its dtype; x itself without a key.

    Args:
        place: in the layer; each has other masks.
    """
    if key is None:
        return x
    channels = torch.arange(x.shape[-1], device=x.device)
    here = _mix(key.rows + (place + 1) * _SPREAD)[..., None]
    drawn = _mix(here ^ _mix(channels))
    kept = drawn >= round(key.rate * (1 << 32))
    return torch.where(kept, x * (1 / (1 - key.rate)), 0).to(x.dtype)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 numbers through a bijection in which every bit of the input reaches
    every bit of the output: shifts and factors of github.com/skeeto/hash-prospector."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
