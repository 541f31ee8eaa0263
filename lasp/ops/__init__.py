"""The arithmetic of lightning attention on one device. Nothing here knows of other ranks.

`reference` is the definition, `chunked` the CPU backend in plain torch, `triton` the GPU kernels.
The functions of this module pick the backend by where the tensors are.
"""

import functools
from types import ModuleType

import torch

from lasp.ops import chunked, reference

__all__ = [
    "chunk_states",
    "fake_segment_states",
    "needs_segment_states",
    "reference",
    "scan",
    "scan_dkdv",
    "send_recv_state",
    "step",
]


def chunk_states(k, *args, **options):
    """The states that the documents' own tokens add up to; see the backends."""
    return _backend(k).chunk_states(k, *args, **options)


def needs_segment_states(k, v, *, cu_seqlens=None):
    """True if `scan` needs segment states; else `chunk_states` is for its total alone."""
    return _backend(k).needs_segment_states(k, v, cu_seqlens=cu_seqlens)


def fake_segment_states(k, v, cu_seqlens):
    """A tensor shaped like the segment states that `chunk_states` returns, for tracing."""
    state_dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    shape = (0,)
    if k.is_cuda:
        # How a sequence is divided depends on its length: a traced graph is of one length.
        sizes = tuple(map(int, k.shape))
        shape = _kernels().segment_states_shape(sizes, int(v.shape[-1]), cu_seqlens is not None)
    return k.new_empty(shape, dtype=state_dtype)


def scan(a, *args, **options):
    """One pass over the tokens; see the backends."""
    return _backend(a).scan(a, *args, **options)


def scan_dkdv(q, *args, **options):
    """(dk, dv), two scans; see the backends."""
    return _backend(q).scan_dkdv(q, *args, **options)


def step(q, k, v, state, log_decay, *, scale):
    """One token of decoding; see `lasp.ops.chunked.step`."""
    # The kernel has no gradient; plain torch does.
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state))
    backend = chunked if needs_grad else _backend(q)
    return backend.step(q, k, v, state, log_decay, scale=scale)


def send_recv_state(*args, **options):
    """Pass a state on through memory, on GPUs; see `lasp.ops.triton.send_recv_state`."""
    _kernels().send_recv_state(*args, **options)


def _backend(x: torch.Tensor) -> ModuleType:
    return _kernels() if x.is_cuda else chunked


@functools.cache
def _kernels() -> ModuleType:
    try:
        from lasp.ops import triton
    except ImportError as error:
        raise ImportError(
            "lasp on a GPU needs triton, which comes with torch's CUDA builds: pip install triton."
        ) from error
    return triton
