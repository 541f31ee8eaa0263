"""Log-likelihoods and continuations of many texts by one model, for lm-evaluation-harness.

The past of a text is a state of constant size. So a context is read once for all of its
continuations, a text may have any length, and contexts of different lengths share a batch: they are
padded on the left, which leaves their states as they are. (Softmax layers have no such state: a
model with some reads its texts one by one.)

Shapes: B texts of a batch, T tokens, N labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.build import ModelFamily
from launch.progress import progress

# A context and its continuation, as tokens; the context is not empty.
Request = tuple[Sequence[int], Sequence[int]]


class TextScorer:
    """Scores and continues tokens.

    Args:
        model: in evaluation mode.
        dtype: of the products; None: that of the weights.
        batch_size: texts that are processed at a time.
        chunk: tokens of a text that are processed at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        *,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
        chunk: int = 2048,
    ) -> None:
        self._model, self._family, self._dtype = model, family, dtype
        self._device = model.head_weight.device
        self._batch_size = batch_size if family.supports_padding(model.config) else 1
        self._chunk = chunk

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For each request: the sum of the log-probabilities of the continuation, in nats, and
        whether each of its tokens is the most likely one."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(number)
        # Similar lengths together. The longest first: too little memory shows at once.
        contexts = sorted(by_context, key=len, reverse=True)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch in progress(list(_batches(contexts, self._batch_size)), "scoring"):
            # The last token of the context is the first input whose output is scored.
            states = self._read([context[:-1] for context in batch])
            rows = [(row, n) for row, context in enumerate(batch) for n in by_context[context]]
            rows.sort(key=lambda each: len(requests[each[1]][1]))
            for part in _batches(rows, self._batch_size):
                entering = _select(states, len(batch), [row for row, _ in part])
                scored = self._score([requests[n] for _, n in part], entering)
                for (_, number), result in zip(part, scored, strict=True):
                    results[number] = result
        return results

    @torch.no_grad()
    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        eos_token_id: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """The tokens that follow each context, up to the first end of document."""
        if max_new_tokens == 0:
            return [[] for _ in contexts]
        order = sorted(range(len(contexts)), key=lambda n: len(contexts[n]), reverse=True)
        generator = torch.Generator(self._device).manual_seed(seed)
        results: list[list[int]] = [[] for _ in contexts]
        for batch in progress(list(_batches(order, self._batch_size)), "generating"):
            prompts = [torch.tensor(contexts[n], device=self._device) for n in batch]
            with self._autocast():
                steps = self._family.stream(
                    self._model,
                    prompts,
                    max_new_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    eos_token_id=eos_token_id,
                    generator=generator,
                )
                columns = [step.tolist() for step in steps]
            for number, row in zip(batch, zip(*columns, strict=True), strict=True):
                end = row.index(eos_token_id) if eos_token_id in row else len(row)
                results[number] = list(row[:end])
        return results

    def _read(self, prefixes: Sequence[Sequence[int]]) -> Any:
        """The states after some prefixes; None if all of them are empty."""
        tokens, mask = self._pad(prefixes)
        states = None
        for start in range(0, tokens.shape[1], self._chunk):
            part = slice(start, start + self._chunk)
            with self._autocast():
                _, states = self._model(
                    tokens[:, part],
                    states=states,
                    return_states=True,
                    return_hidden=True,
                    padding_mask=None if mask is None else mask[:, part],
                )
        return states

    def _score(self, requests: Sequence[Request], states: Any) -> list[tuple[float, bool]]:
        longest = max(len(continuation) for _, continuation in requests)
        inputs = torch.zeros(len(requests), longest, dtype=torch.int64)
        labels = torch.full_like(inputs, -1)
        for row, (context, continuation) in enumerate(requests):
            length = len(continuation)
            if length:
                inputs[row, :length] = torch.tensor([context[-1], *continuation[:-1]])
                labels[row, :length] = torch.tensor(continuation)
        sums = torch.zeros(len(requests), dtype=torch.float64)
        wrong = torch.zeros(len(requests), dtype=torch.int64)
        for start in range(0, longest, self._chunk):
            part = slice(start, start + self._chunk)
            # Padding on the right comes after all labels of its row.
            with self._autocast():
                hidden, states = self._model(
                    inputs[:, part].to(self._device),
                    states=states,
                    return_states=True,
                    return_hidden=True,
                )
            valid = labels[:, part] >= 0
            row_N, label_N = valid.nonzero()[:, 0], labels[:, part][valid]
            losses, is_best = self._compare(hidden[valid.to(self._device)], label_N)
            sums.index_add_(0, row_N, losses)
            wrong.index_add_(0, row_N, (~is_best).long())
        return [(-x, n == 0) for x, n in zip(sums.tolist(), wrong.tolist(), strict=True)]

    def _compare(self, hidden_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of labels, float64, and whether they are the most likely tokens; on the
        CPU."""
        losses, is_best = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.bool)]
        for start in range(0, len(labels_N), self._chunk):
            part = slice(start, start + self._chunk)
            labels = labels_N[part].to(self._device)
            with self._autocast():
                logits = F.linear(hidden_ND[part], self._model.head_weight)
            losses.append(F.cross_entropy(logits.float(), labels, reduction="none").double().cpu())
            is_best.append((logits.argmax(1) == labels).cpu())
        return torch.cat(losses), torch.cat(is_best)

    def _pad(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T] padded on the left, and the mask of what is not padding, if there is
        some."""
        longest = max(map(len, texts))
        rows = [[0] * (longest - len(text)) + list(text) for text in texts]
        tokens = torch.tensor(rows, dtype=torch.int64, device=self._device).view(len(texts), -1)
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        mask = torch.arange(longest, device=self._device) >= longest - lengths[:, None]
        return tokens, None if bool(mask.all()) else mask

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[n : n + size] for n in range(0, len(items), size))


def _select(states: Any, batch_size: int, rows: list[int]) -> Any:
    """The states of some rows of a batch, in that order."""
    # (Softmax layers have caches [2, B, S, G, D]: their batch, of one row, is taken as it is.)
    if states is None or (batch_size == 1 and rows == [0]):
        return states
    index = torch.tensor(rows, device=states.layers[0].device)
    layers = [layer.index_select(0, index) for layer in states.layers]
    return dataclasses.replace(states, layers=layers)
