"""Activation checkpointing that never repeats a state exchange, and block inputs kept on the host.

A recomputed block would send and receive its state a second time, in the middle of the backward's
own exchange. The operator's exchange is one dispatcher op, `torch.ops.lasp.enter`; its output (one
d x d state per head) is kept, so that the recomputation finds it and stays on its own device.
"""

from __future__ import annotations

import functools
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

__all__ = ["Exchanges", "HostMemory", "checkpointed", "keeping_exchanges", "recompute"]

# By name and not by object, so that this module needs no import of the operators. A softmax layer
# keeps its output: that spares a second gathering, and the quadratic work.
_EXCHANGES = ("lasp::state_fwd", "lasp::softmax_fwd")
# What takes long to compute for its size: products and attention. The rest of a block, norms, gates
# and activations, is as large again and cheap.
_EXPENSIVE = ("lasp::attn_fwd", "aten::mm", "aten::addmm", "aten::bmm")


def recompute(blocks: Sequence[nn.Module], mode: str, *, offload: bool = False) -> None:
    """Make every block recompute activations in the backward; the same modules, same names.

    Args:
        blocks: in the order of the forward.
        mode: "none"; "full": a block keeps its input and what its exchange received; "selective":
            the results of matrix products and attention too.
        offload: keep block inputs in host memory in between, copied under the computation. (The
            last block's stays: its backward comes at once.)

    Raises:
        ValueError: another mode.
    """
    if mode == "none":
        return
    host = HostMemory() if offload else None
    for number, block in enumerate(blocks, 1):
        checkpointed(block, mode, host, stay=number == len(blocks))


def checkpointed(
    block: nn.Module, mode: str = "full", host: HostMemory | None = None, *, stay: bool = False
) -> nn.Module:
    """`recompute` for one block; its input goes to `host`, unless it is to stay on its device."""
    if mode not in _POLICIES:
        raise ValueError(f"mode is {mode!r}: it must be none, full or selective.")
    policy = _POLICIES[mode]

    # A function of this module and not a partial of torch's: torch.compile looks into the former.
    def recomputing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            type(self).forward,
            self,
            *args,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
            # Blocks draw no random numbers.
            preserve_rng_state=False,
            **kwargs,
        )

    # Streams and hooks are not for the compiler; what they stand around is.
    @torch.compiler.disable(recursive=False)
    def hosted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # `checkpoint` saves its inputs as autograd does, so hooks around it see them, and nothing
        # else: what happens inside belongs to its own hooks.
        with saved_tensors_hooks(functools.partial(host.store, stay=stay), host.load):
            return recomputing(self, *args, **kwargs)

    block.forward = types.MethodType(recomputing if host is None else hosted, block)
    return block


def keeping_exchanges(function: Callable) -> Callable:
    """`function` for one call of `torch.utils.checkpoint.checkpoint`, reentrant or not.

        y = checkpoint(keeping_exchanges(block), x, use_reentrant=True)

    Its first run notes what exchanges return, every later one takes that and communicates nothing.
    `checkpointed` needs none of it; this is for checkpoints that take no policy.
    """
    noted: list[Any] | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal noted
        mode = Exchanges(noted)
        with mode:
            result = function(*args, **kwargs)
        noted = mode.noted
        return result

    return run


class Exchanges(TorchDispatchMode):
    """Notes in `noted` what exchanges return; given that list, returns it in the same order instead
    of exchanging anything."""

    def __init__(self, noted: list[Any] | None = None) -> None:
        super().__init__()
        self.noted = [] if noted is None else noted
        self._again = None if noted is None else iter(noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_exchange = func.name().split(".")[0] in _EXCHANGES
        if is_exchange and self._again is not None:
            return next(self._again)
        result = func(*args, **(kwargs or {}))
        if is_exchange:
            self.noted.append(result)
        return result


def _keep_exchanges(context: Any, op: Any, *args: Any, **kw: Any) -> CheckpointPolicy:
    return _keep(op, _EXCHANGES)


def _keep_expensive(context: Any, op: Any, *args: Any, **kw: Any) -> CheckpointPolicy:
    return _keep(op, _EXCHANGES + _EXPENSIVE)


def _keep(op: Any, names: tuple[str, ...]) -> CheckpointPolicy:
    if op.name().split(".")[0] in names:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_POLICIES = {"full": _keep_exchanges, "selective": _keep_expensive}


class HostMemory:
    """Where saved tensors wait for the backward: pinned host memory, filled by a stream of its own.

    The forward goes on while a tensor is copied out, and waits for that copy where the next one is
    stored: so no more than two are on the device, however far the host is ahead. The backward takes
    tensors in reverse order; whoever takes one starts the copy back of the one before it, which
    then runs under the computation in between. The host is never waited for.

    Args:
        minimum_bytes: smaller tensors stay where they are.
    """

    def __init__(self, minimum_bytes: int = 1 << 20) -> None:
        self._minimum = minimum_bytes
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._latest: weakref.ref[_Stored] | None = None
        self._leaving: _Stored | None = None

    def store(self, tensor: Tensor, stay: bool = False) -> Tensor | _Stored:
        """Start to copy `tensor` to the host; what stands for it until `load`."""
        small = tensor.numel() * tensor.element_size() < self._minimum
        if small or not tensor.is_floating_point() or isinstance(tensor, torch.nn.Parameter):
            return tensor
        previous = None if self._latest is None else self._latest()
        self._let_go()
        stored = _Stored(tensor, previous, self._stream(tensor.device), stay)
        self._latest = weakref.ref(stored)
        self._leaving = None if stay else stored
        return stored

    def load(self, stored: Tensor | _Stored) -> Tensor:
        """The tensor on its device again."""
        if not isinstance(stored, _Stored):
            return stored
        self._let_go()
        stored.start_return()
        if stored.previous is not None:
            stored.previous.start_return()
        return stored.on_device()

    def _let_go(self) -> None:
        if self._leaving is not None:
            self._leaving.let_go()
            self._leaving = None

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Stored:
    """One tensor on its way to the host and back."""

    def __init__(
        self,
        tensor: Tensor,
        previous: _Stored | None,
        stream: torch.cuda.Stream | None,
        stay: bool,
    ) -> None:
        self.previous = previous
        self._device = tensor.device
        self._stream = stream
        self._returned: Tensor | None = tensor.detach() if stay else None
        self._ready: torch.cuda.Event | None = None
        self._host: Tensor | None = None
        self._source: Tensor | None = None
        if stay:
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
            self._copied = stream.record_event()
        # Held, and not recorded as used by the stream: the allocator would see the end of that use
        # only when the host comes by later, and the host is ahead by many blocks.
        self._source = tensor.detach()

    def let_go(self) -> None:
        """Leave the tensor's memory to what the current stream does next, after the copy."""
        if self._source is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._source = None

    def start_return(self) -> None:
        """Start the copy to the device, unless that has been done."""
        if self._returned is not None:
            return
        assert self._host is not None
        if self._stream is None:
            self._returned = self._host.to(self._device, copy=True)
            return
        # Allocated by the stream that will read it, and handed to the copy's stream only once what
        # used that memory before is through.
        current = torch.cuda.current_stream(self._device)
        self._returned = torch.empty_like(self._host, device=self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._returned.copy_(self._host, non_blocking=True)
            self._ready = self._stream.record_event()

    def on_device(self) -> Tensor:
        """The tensor, for the current stream. (A second backward would copy it once more.)"""
        returned = self._returned
        assert returned is not None
        if self._host is not None:
            self._returned = None
        if self._ready is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready)
            self._ready = None
        return returned

    def __del__(self) -> None:
        # On its way back and never taken, as where a backward was given up.
        if self._ready is not None and self._returned is not None and self._stream is not None:
            self._returned.record_stream(self._stream)
