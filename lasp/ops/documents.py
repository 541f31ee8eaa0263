"""Small host-side facts about device tensors, read once and remembered.

Reading a value from a GPU stops the host until the GPU is done. Document boundaries and decays are
needed on the host (to plan the work and to refuse bad values), so they are read once per tensor and
version; on the CPU reading is free and nothing is remembered.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["decay_rates", "document_offsets"]

_remembered = WeakIdKeyDictionary()


def document_offsets(
    cu_seqlens: torch.Tensor | None, seq_len: int | None
) -> tuple[int, ...] | None:
    """The boundaries of packed documents as host integers (0, ..., seq_len); None if dense.

    Raises ValueError unless they start at 0, never descend, and end at seq_len (None: anywhere).
    Equal neighbours are an empty document.
    """
    if cu_seqlens is None:
        return None
    offsets = _read_once(cu_seqlens, _check_offsets)
    if seq_len is not None and offsets[-1] != seq_len:
        raise ValueError(
            f"cu_seqlens ends at {offsets[-1]}, but q, k, v hold {seq_len} tokens: its last entry "
            "must be the number of tokens."
        )
    return offsets


def decay_rates(log_decay: torch.Tensor | None) -> tuple[float, ...] | None:
    """log_decay as host floats, one per head; ValueError unless all are finite and <= 0."""
    return None if log_decay is None else _read_once(log_decay, _check_rates)


def _check_offsets(offsets: tuple[int, ...]) -> None:
    if not offsets or offsets[0] != 0:
        raise ValueError(f"cu_seqlens is {list(offsets[:8])}...: it must start with 0.")
    for n, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens descends from {start} to {stop} at entry {n + 1}: it holds the "
                "cumulative lengths of the documents and must ascend."
            )


def _check_rates(rates: tuple[float, ...]) -> None:
    for head, rate in enumerate(rates):
        if rate > 0:
            raise ValueError(
                f"log_decay of head {head} is {rate:g}: it must be <= 0, as decay is "
                "exp(log_decay). If these are ALiBi-style slopes, pass their negative."
            )
        if not math.isfinite(rate):
            raise ValueError(f"log_decay of head {head} is {rate}: it must be finite and <= 0.")


def _read_once(tensor: torch.Tensor, check: Callable[[tuple], None]) -> tuple:
    if not tensor.is_cuda:
        values = tuple(tensor.tolist())
        check(values)
        return values
    version, values = _remembered.get(tensor, (None, ()))
    # Tensors made under inference_mode keep no version: read them every time.
    if tensor.is_inference() or version != tensor._version:
        values = tuple(tensor.tolist())
        check(values)
        if not tensor.is_inference():
            _remembered[tensor] = (tensor._version, values)
    return values
