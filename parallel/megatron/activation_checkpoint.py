"""Megatron's activation checkpointing without a second exchange between ranks.

Megatron's own checkpoint is reentrant and takes no policy. So a core attention saves the results of
its exchanges in the first forward, and recomputation replays them. The backwards of a layer come in
the order of its forwards, also in pipeline schedules: hence a queue.

With FP8 or FP4, Megatron uses Transformer Engine's checkpoint instead, which sets no flag while it
runs. There the config decides, which Megatron's blocks follow in training.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.activation_checkpoint import ReplayExchanges

__all__ = ["SavedExchanges"]


class SavedExchanges:
    """The results of one layer's exchanges, from the first forward to its recomputation."""

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config
        self._queue: deque = deque()

    @contextlib.contextmanager
    def around(self, k: torch.Tensor, *, training: bool) -> Iterator[None]:
        """Run the core attention inside; does nothing outside Megatron's checkpoints.

        Args:
            k: [B, T, G, D], the keys. Their first and last tokens identify the forward: they must
                match those saved with the next result in the queue.
            training: whether the layer is in training mode.

        Raises:
            RuntimeError: they do not.
        """
        recomputing = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
        recording = not torch.is_grad_enabled()
        by_transformer_engine = training and self._uses_transformer_engine()
        if by_transformer_engine and not (recording or recomputing):
            # This layer is not checkpointed: what a forward without gradients left is not needed.
            self._queue.clear()
        checkpointed = is_checkpointing() or by_transformer_engine
        if not checkpointed or not (recording or (recomputing and self._queue)):
            yield
            return
        ends = k.detach()[:, :: max(1, k.shape[1] - 1)]
        if recording:
            with ReplayExchanges() as exchanges:
                yield
            self._queue.append((ends.clone(), exchanges.results))
            return
        saved_ends, results = self._queue.popleft()
        _check_same(saved_ends, ends)
        with ReplayExchanges(results):
            yield

    def _uses_transformer_engine(self):
        config = self._config
        is_quantized = config.fp8 or getattr(config, "fp4", None)
        return bool(is_quantized) and config.recompute_granularity == "full"


def _check_same(saved: torch.Tensor, actual: torch.Tensor) -> None:
    message = (
        "a recomputation met the exchange of other tokens. A forward in training mode under "
        "activation checkpointing must be followed by its backward; evaluate with model.eval()."
    )
    if saved.shape != actual.shape:
        raise RuntimeError(message)
    # Recomputed values may differ by rounding.
    error = (saved.float() - actual.float()).norm()
    same = error <= 0.05 * actual.float().norm() + 1e-30
    if same.is_cuda:
        # Checked on the GPU, so that the host need not wait.
        torch._assert_async(same, message)
    elif not same:
        raise RuntimeError(message)
