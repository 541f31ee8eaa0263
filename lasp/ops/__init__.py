"""The arithmetic of attention on one device. Nothing here knows of other ranks.

`reference` is the definition, `chunked` the CPU backend in plain torch, `triton` the GPU kernels:
two modules with the same functions. `sdpa` is softmax attention.
"""

import contextlib
import functools
from types import ModuleType

import torch

from lasp import replay
from lasp.ops import chunked, reference

__all__ = [
    "PLAIN_CALL",
    "backend",
    "needs_grad",
    "reference",
    "remembered_call",
    "segment_states_shape",
    "send_recv_state",
    "step",
]


def backend(x: torch.Tensor) -> ModuleType:
    """The module that serves tensors like x: `lasp.ops.triton` on GPUs, else `lasp.ops.chunked`."""
    return _triton() if x.is_cuda else chunked


def step(q, k, v, state, log_decay, *, scale, inplace):
    """One token of decoding; see `lasp.ops.chunked.step`."""
    # The kernel has no gradient; plain torch does.
    module = chunked if needs_grad(q, k, v, state, log_decay) else backend(q)
    return module.step(q, k, v, state, log_decay, scale=scale, inplace=inplace)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True if a gradient will be asked of what is computed from these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _PlainCall:
    """A call that is never recorded."""

    recording = None

    def record(self):
        return contextlib.nullcontext()

    def finish(self, results):
        pass


PLAIN_CALL = _PlainCall()


def remembered_call(name, tensors, options, group=None):
    """A call that is repeated as it was recorded, on GPUs; see `lasp.replay`."""
    first = tensors[0]
    if not first.is_cuda:
        return PLAIN_CALL
    triton = _triton()
    if triton.has_hooks():
        return PLAIN_CALL
    # A CUDA graph would read a recording's tensors, which may be freed before it.
    if group is not None and torch.cuda.is_current_stream_capturing():
        return PLAIN_CALL
    stream = triton.current_stream(first.get_device())
    return replay.Call(name, tensors, options, stream=stream, group=group)


def segment_states_shape(k, v, log_decay, cu_seqlens) -> tuple[int, ...]:
    """The shape of the segment states that `chunk_states` returns, (0,) for none, for tracing.

    `log_decay`: [H] or [B, T, H], or None.
    """
    if not k.is_cuda:
        return (0,)
    # How a sequence is divided depends on its length: a traced graph is of one length.
    sizes = tuple(map(int, k.shape))
    packed = cu_seqlens is not None
    by_token = log_decay is not None and log_decay.dim() > 1
    value_dim = int(v.shape[-1])
    return _triton().segment_states_shape(sizes, value_dim, packed, k.device, by_token=by_token)


def send_recv_state(*args, **options):
    """Pass a state on in peer memory, on GPUs; see `lasp.ops.triton.send_recv_state`."""
    _triton().send_recv_state(*args, **options)


@functools.cache
def _triton() -> ModuleType:
    try:
        from lasp.ops import triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "lasp on a GPU needs triton, which comes with torch's CUDA builds: pip install triton."
        ) from error
    return triton
