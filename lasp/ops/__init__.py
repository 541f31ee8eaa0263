"""The arithmetic of lightning attention on one device. Nothing here knows of other ranks.

`reference` is the definition, `chunked` the CPU backend in plain torch, `triton` the GPU kernels.
The functions of this module pick the backend by where the tensors are.
"""

import functools
from types import ModuleType

import torch

from lasp.ops import chunked, reference

__all__ = [
    "fake_segment_states",
    "one_pass",
    "prefix_states",
    "reference",
    "relay",
    "scan",
    "scan_gradients",
    "scan_pair",
    "step",
]


def prefix_states(
    k, v, log_decay, *, offsets=None, held=None, reverse=False, scale=1.0, with_total=True
):
    """Local states; see `lasp.ops.chunked.prefix_states`."""
    return _backend(k).prefix_states(
        k,
        v,
        log_decay,
        offsets=offsets,
        held=held,
        reverse=reverse,
        scale=scale,
        with_total=with_total,
    )


def fake_segment_states(k, v, cu_seqlens, with_total):
    """A tensor of the shape of what `prefix_states` returns first, or of none at all where it is
    left out (`one_pass`, and nobody wants the total), for tracing."""
    state_dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    if not k.is_cuda:
        return k.new_empty(0, dtype=state_dtype)
    from lasp.ops.triton.plan import segment_state_rows
    from lasp.ops.triton.scan_chained import applies

    packed = cu_seqlens is not None
    # How a sequence is cut depends on its length in no simple way: a traced graph is of one length.
    batch, seq_len, num_heads, key_dim = map(int, k.shape)
    value_dim = int(v.shape[-1])
    num_documents = int(cu_seqlens.shape[0]) - 1 if packed else batch
    if not packed and not with_total and applies(k, v, None):
        return k.new_empty(0, dtype=state_dtype)
    rows = segment_state_rows(seq_len, num_documents, packed, key_dim, value_dim, num_heads)
    if rows == 0:
        return k.new_empty(0, dtype=state_dtype)
    return k.new_empty(rows, num_heads, key_dim, value_dim, dtype=state_dtype)


def one_pass(k, v, offsets=None, reverse=False):
    """Whether a scan needs no states of segments: `prefix_states` has use for its total alone."""
    backend = _backend(k)
    return backend is chunked or backend.is_one_pass(k, v, offsets=offsets, reverse=reverse)


def scan(
    a, b, x, log_decay, *, scale, initial_state=None, segment_states=None, offsets=None, held=None,
    reverse=False,
):  # fmt: skip
    """One pass over the tokens; see `lasp.ops.chunked.scan`."""
    return _backend(a).scan(
        a,
        b,
        x,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        segment_states=segment_states,
        offsets=offsets,
        held=held,
        reverse=reverse,
    )


def scan_pair(
    a, b, x, c, log_decay, *, scale, initial_state=None, segment_states=None, offsets=None,
    held=None, reverse=False,
):  # fmt: skip
    """(`scan` of a, b, x; `scan` of c, x, b with the states transposed): dv and dk, reversed."""
    backend = _backend(a)
    common = dict(scale=scale, offsets=offsets, held=held, reverse=reverse)
    states = dict(initial_state=initial_state, segment_states=segment_states)
    if backend is not chunked:
        both = backend.scan_pair(a, b, x, c, log_decay, **states, **common)
        if both is not None:
            return both
    y = backend.scan(a, b, x, log_decay, **states, **common)
    states = {k: None if s is None else s.transpose(-1, -2) for k, s in states.items()}
    return y, backend.scan(c, x, b, log_decay, **states, **common)


def scan_gradients(q, k, v, do, log_decay, *, scale, initial_state=None):
    """(dq, dk, dv) of whole sequences; see `lasp.ops.triton.scan.scan_gradients`. None where there
    is no kernel for all of them: the caller scans for each."""
    if not q.is_cuda:
        return None
    return _kernels().scan_gradients(
        q, k, v, do, log_decay, scale=scale, initial_state=initial_state
    )


def step(q, k, v, state, log_decay, *, scale):
    """One token of decoding; see `lasp.ops.chunked.step`."""
    # The kernel has no gradient; plain torch does.
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state))
    backend = chunked if needs_grad else _backend(q)
    return backend.step(q, k, v, state, log_decay, scale=scale)


def relay(local, log_decay, length, entering, mine, previous, following, **options):
    """Pass a state on through memory, on GPUs; see `lasp.ops.triton.relay.relay`."""
    _kernels().relay(local, log_decay, length, entering, mine, previous, following, **options)


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
