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

from parallel.recompute import Exchanges

__all__ = ["KeptExchanges"]


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
            with Exchanges() as exchanges:
                yield
            self._queue.append((ends.clone(), exchanges.noted))
            return
        kept_ends, noted = self._queue.popleft()
        self._check(kept_ends, ends)
        with Exchanges(noted):
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
