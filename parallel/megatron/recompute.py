"""Megatron's activation recomputation without a second exchange of states.

Megatron recomputes with its own reentrant checkpoint, which knows nothing of single operations. So
a core attention keeps what its exchange gave in the first forward, and the recomputation takes that
instead of asking the other ranks again. Per layer the backward comes in the order of the forward
(pipeline schedules included), hence a queue.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["KeptExchanges"]

# As in parallel.recompute: of a softmax layer the output is kept, which spares the quadratic work.
_EXCHANGES = ("lasp::enter", "lasp::start", "lasp::finish", "lasp::softmax_attend")


class KeptExchanges:
    """The results of one layer's exchanges, from their first forward to their recomputation."""

    def __init__(self) -> None:
        self._queue: deque = deque()

    @contextlib.contextmanager
    def around(self, k: torch.Tensor) -> Iterator[None]:
        """Run the operator inside: nothing happens outside Megatron's checkpoints.

        Args:
            k: [B, T, H, D], the keys. Their first and last tokens tell whether a recomputation
                is that of the forward whose result is next in the queue.

        Raises:
            RuntimeError: it is not.
        """
        recomputing = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
        recording = not torch.is_grad_enabled()
        if not is_checkpointing() or not (recording or (recomputing and self._queue)):
            yield
            return
        ends = k.detach()[:, :: max(1, k.shape[1] - 1)]
        if recording:
            record = _Record()
            with record:
                yield
            self._queue.append((ends.clone(), record.results))
            return
        kept_ends, results = self._queue.popleft()
        self._check(kept_ends, ends)
        with _Replay(results):
            yield

    def _check(self, kept: torch.Tensor, seen: torch.Tensor) -> None:
        complaint = (
            "a recomputation met the exchange of other tokens. A forward in training mode under "
            "recomputation must be followed by its backward; evaluate with model.eval()."
        )
        if kept.shape != seen.shape:
            raise RuntimeError(complaint)
        # Recomputed values may differ by rounding.
        error = (kept.float() - seen.float()).norm()
        same = error <= 0.05 * seen.float().norm() + 1e-30
        if same.is_cuda:
            # Looked at on the GPU, which the host need not wait for.
            torch._assert_async(same, complaint)
        elif not same:
            raise RuntimeError(complaint)


class _Record(TorchDispatchMode):
    """Note what each exchange returns."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in _EXCHANGES:
            self.results.append(result)
        return result


class _Replay(TorchDispatchMode):
    """Return what was noted, in the same order, without calling anything."""

    def __init__(self, results: list) -> None:
        super().__init__()
        self.results = iter(results)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in _EXCHANGES:
            return next(self.results)
        return func(*args, **(kwargs or {}))
