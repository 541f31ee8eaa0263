"""The loss of Megatron's language models, read from 16-bit logits without a float32 copy.

Megatron's own loss, its fused one too, writes the logits in float32, then their exponentials, then
the softmax, of which the backward makes the gradient: several times the memory that the logits
take, and its traffic. Here the forward reads the logits once and keeps them; the backward reads
them again and writes their gradient.

Shapes, Megatron's order: s tokens of this context-parallel rank, b batch, V vocabulary rows of this
tensor-parallel rank; inside, N = s * b.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import nn
from torch.distributed import ProcessGroup

from parallel.compile import fused
from parallel.loss import log_norm_and_label, reduce_over_vocabulary
from parallel.megatron.layout import modules_of

__all__ = ["fuse_cross_entropy", "vocab_parallel_cross_entropy"]

# Of a kernel: its indices fit 32 bits.
_MOST_LOGITS = 1 << 30


def fuse_cross_entropy(model: nn.Module | Iterable[nn.Module]) -> None:
    """Replace the loss of a model, in place, by `vocab_parallel_cross_entropy`.

        fuse_cross_entropy(model)          # once, after building the model

    For any model of Megatron's that computes its loss by compute_language_model_loss (GPTModel,
    MambaModel, HybridModel, their multi-token prediction).

    Args:
        model: a model or a list of model chunks, wrapped in DDP and the like or not.

    Raises:
        ValueError: no such model.
    """
    modules = modules_of(model)
    models = [module for module in modules if isinstance(module, LanguageModule)]
    if not models:
        names = sorted({type(module).__name__ for module in modules})
        raise ValueError(f"the model has {names}: it needs a language model of Megatron's inside.")
    for each in models:
        each.compute_language_model_loss = functools.partial(_model_loss, each.tp_group)


def _model_loss(group, labels, logits):
    """Megatron's compute_language_model_loss: labels [b, s], logits [s, b, V] -> [b, s]."""
    losses = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1), group)
    return losses.transpose(0, 1).contiguous()


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup
) -> torch.Tensor:
    """-log softmax(logits)[label] over the vocabulary of all ranks of `group`, float32 [s, b]
    (float64 for float64).

    Args:
        logits: [s, b, V] of this rank's rows of the vocabulary, any floating dtype. They are kept
            for the backward and must not change until then.
        labels: int64 [s, b], the same on all ranks; the loss of a negative one is 0, without
            gradient.
        group: the tensor-parallel ranks.
    """
    losses = _CrossEntropy.apply(logits.flatten(0, -2), labels.reshape(-1, 1), group)
    return losses.view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, labels_N1, group):
        valid_N1 = labels_N1 >= 0
        labels_N1 = labels_N1 - group.rank() * logits_NV.shape[1]
        local_N1 = valid_N1 & (labels_N1 >= 0) & (labels_N1 < logits_NV.shape[1])
        # -1 matches no row.
        labels_N1 = labels_N1.masked_fill(~local_N1, -1)
        parts = [
            _log_norm_and_label(logits_NV[part], labels_N1[part]) for part in _parts(logits_NV)
        ]
        log_norm_N1, label_N1 = (torch.cat(each) for each in zip(*parts, strict=True))
        # A label that no rank holds gives an infinite loss, not a wrong one.
        label_N1 = label_N1.masked_fill(~local_N1, -torch.inf)
        if group.size() > 1:
            log_norm_N1, label_N1 = reduce_over_vocabulary(log_norm_N1, label_N1, group)
        ctx.save_for_backward(logits_NV, log_norm_N1, labels_N1, valid_N1)
        return (log_norm_N1 - label_N1).masked_fill(~valid_N1, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N1):
        logits_NV, *others = ctx.saved_tensors
        into_NV = torch.empty_like(logits_NV)
        for part in _parts(logits_NV):
            _write_gradient(
                logits_NV[part], into_NV[part], *(x[part] for x in others), grad_N1[part]
            )
        return into_NV, None, None


def _parts(logits_NV: torch.Tensor) -> Iterator[slice]:
    """Ranges of tokens, all but the last of one length."""
    total, rows = logits_NV.shape
    number = max(-(-total * rows // _MOST_LOGITS), 1)
    length = max(-(-total // number), 1)
    # One part, an empty one, of no tokens.
    return (slice(start, start + length) for start in range(0, max(total, 1), length))


_log_norm_and_label = fused(log_norm_and_label)


@fused
def _write_gradient(logits_CV, into_CV, log_norm_C1, labels_C1, valid_C1, grad_C1):
    softmax = torch.exp(logits_CV.to(log_norm_C1.dtype) - log_norm_C1)
    # A comparison, because a scatter would split the kernel in two.
    one_hot = (torch.arange(logits_CV.shape[1], device=logits_CV.device) == labels_C1).to(softmax)
    into_CV.copy_(((softmax - one_hot) * grad_C1).masked_fill(~valid_C1, 0))
