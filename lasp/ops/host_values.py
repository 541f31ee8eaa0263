"""Values that the host reads from device tensors, or computes from them, once per tensor.

Reading a value from a GPU makes the host wait for it. Document boundaries and decays are needed on
the host (to plan the work and to refuse bad values), so they are read once per tensor and version.
On the CPU reading is free and nothing is remembered.
"""

import math
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lasp import replay

__all__ = [
    "check_token_decays",
    "compute_once",
    "decay_rates",
    "document_boundaries",
    "filled",
    "with_unit_stride",
]

T = TypeVar("T")

# id of a tensor -> (reference to it, version, {key: value}); torch's WeakIdKeyDictionary does the
# same and takes ten times as long to look up.
_remembered: dict[int, tuple[weakref.ref, int, dict]] = {}
_NOTHING = (lambda: None, None, {})
# What a tensor views -> (reference to the storage, version, the same values): a compiled backward
# passes a new tensor of the same memory in every step. A storage that has been freed keeps its
# number for as long as there is a reference.
_of_views: dict[tuple, tuple[StorageWeakRef, int, dict]] = {}
# Values that are kept per tensor, and views whose values are kept.
_MAX_VALUES, _MAX_VIEWS = 64, 1024


def document_boundaries(
    cu_seqlens: torch.Tensor | None, seq_len: int | None
) -> tuple[int, ...] | None:
    """The boundaries of packed documents as host integers (0, ..., seq_len); None if not packed.

    Equal neighbours are an empty document.

    Raises:
        ValueError: they do not start at 0, descend, or do not end at seq_len (None: anywhere).
    """
    if cu_seqlens is None:
        return None
    boundaries = compute_once(cu_seqlens, "values", _read_boundaries)
    if seq_len is not None and boundaries[-1] != seq_len:
        raise ValueError(
            f"cu_seqlens ends at {boundaries[-1]}, but q, k, v hold {seq_len} tokens: its last "
            "entry must be the number of tokens."
        )
    return boundaries


def decay_rates(log_decay: torch.Tensor | None) -> tuple[float, ...] | None:
    """log_decay as host floats, one per head; ValueError unless all are finite and <= 0.

    None for a decay per token, which no host reads.
    """
    if log_decay is None or log_decay.dim() > 1:
        return None
    return compute_once(log_decay, "values", _read_rates)


def check_token_decays(log_decay: torch.Tensor) -> None:
    """Raise ValueError unless all values of a decay per token are <= 0; on the CPU only."""
    if log_decay.device.type == "cpu" and not bool((log_decay <= 0).all()):
        where = (~(log_decay <= 0)).nonzero()[0].tolist()
        value = log_decay[tuple(where)].item()
        raise ValueError(
            f"log_decay is {value:g} at {where}: it must be <= 0, as decay is exp(log_decay). "
            "(-inf resets the state.)"
        )


def compute_once(tensor: torch.Tensor, key: Hashable, compute: Callable[[torch.Tensor], T]) -> T:
    """compute(tensor), remembered on GPUs until the tensor's memory is freed or changed in place.

    Changes that torch does not count (through .data, or by a collective) are not seen. What
    `compute` raises is not remembered.
    """
    # Tensors made under inference_mode have no version.
    if not tensor.is_cuda or tensor.is_inference():
        return compute(tensor)
    reference, version, values = _remembered.get(id(tensor), _NOTHING)
    if reference() is not tensor or version != tensor._version:
        values = _values_of_view(tensor)
    if key in values:
        return values[key]
    value = compute(tensor)
    # Memory that is allocated during a capture belongs to the graph.
    if not torch.cuda.is_current_stream_capturing():
        if len(values) >= _MAX_VALUES:
            values.clear()
        values[key] = value
        if reference() is not tensor:
            reference = weakref.ref(tensor, partial(_forget, id(tensor)))
        _remembered[id(tensor)] = reference, tensor._version, values
    return value


def _values_of_view(tensor: torch.Tensor) -> dict:
    """The values of a tensor that is not remembered: those of another one of the same view."""
    reference = StorageWeakRef(tensor.untyped_storage())
    where = reference.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    _, version, values = _of_views.get(where, (None, None, {}))
    if version != tensor._version:
        # Of a copy: another thread may add views meanwhile.
        for each, (storage, *_) in list(_of_views.items()):
            if storage.expired():
                _of_views.pop(each, None)
        # Boundaries that are another part of one large tensor in every step.
        if len(_of_views) >= _MAX_VIEWS:
            _of_views.clear()
        values = {}
        _of_views[where] = reference, tensor._version, values
    return values


def _forget(number: int, reference: weakref.ref) -> None:
    """Drop the values of a tensor that has been freed, unless its id has a new owner."""
    if _remembered.get(number, _NOTHING)[0] is reference:
        del _remembered[number]


_filled: dict[Hashable, torch.Tensor] = {}


def filled(value: float, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor [size] of one value, made once per device and not to be written to."""
    key = value, size, dtype, device
    tensor = _filled.get(key)
    if tensor is None:
        tensor = torch.full((size,), value, dtype=dtype, device=device)
        if device.type == "cuda":
            # Memory that is allocated during a capture belongs to the graph.
            if torch.cuda.is_current_stream_capturing():
                return tensor
            # Other streams will read it.
            torch.cuda.current_stream(device).synchronize()
        _filled[key] = tensor
    replay.note_constants(tensor)
    return tensor


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is contiguous, else one copy, made once for all readers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _read_boundaries(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    boundaries = tuple(cu_seqlens.tolist())
    if not boundaries or boundaries[0] != 0:
        raise ValueError(f"cu_seqlens is {list(boundaries[:8])}...: it must start with 0.")
    for n, (start, stop) in enumerate(pairwise(boundaries)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens descends from {start} to {stop} at entry {n + 1}: it holds the "
                "cumulative lengths of the documents and must ascend."
            )
    return boundaries


def _read_rates(log_decay: torch.Tensor) -> tuple[float, ...]:
    rates = tuple(log_decay.tolist())
    for head, rate in enumerate(rates):
        if rate > 0:
            raise ValueError(
                f"log_decay of head {head} is {rate:g}: it must be <= 0, as decay is "
                "exp(log_decay). If these are ALiBi-style slopes, pass their negative."
            )
        if not math.isfinite(rate):
            raise ValueError(f"log_decay of head {head} is {rate}: it must be finite and <= 0.")
    return rates
