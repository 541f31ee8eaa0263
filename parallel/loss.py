"""Cross-entropy that never holds the logits of more than a chunk of tokens.

The float32 logits of a million tokens over a vocabulary of 64,000 are 250 GiB. Here the logits of a
chunk are computed, turned into the loss and, if needed, at once into the gradients of the hidden
states and of the head; then they are dropped. The backward only scales these gradients, so the
head's matmul is not repeated.

Under tensor parallelism each rank has the logits of its shard of the vocabulary, and they are never
gathered: two numbers per token and rank (log-sum-exp, the label's logit) give every rank the loss.

Shapes: B batch, T tokens of this rank, D width, V vocabulary (inside the autograd function, this
rank's shard of it), N = B * T, C tokens of a chunk, R ranks.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from lasp.exchange.comm import all_gather_flat

__all__ = ["chunked_cross_entropy", "log_norm_and_label", "reduce_over_vocabulary"]


def chunked_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int = 2048,
    compiled: bool = False,
    per_token: bool = False,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label], a float32 scalar.

    Under autocast the matmuls run in its dtype; the softmax and the sums are always float32.
    A batch in which every label is ignored (or with no token) gives 0 with zero gradients.

    Args:
        hidden_BTD: final hidden states [B, T, D], any floating dtype.
        weight_VD: the output head [V, D]. A DTensor sharded by vocabulary over one mesh axis makes
            the loss vocabulary-parallel: hidden states and labels must be the same on those ranks,
            the loss is the same too, and each gets the complete gradient of the hidden states.
        labels_BT: int64 [B, T], in 0..V-1 or `ignore_index`. Already shifted: label t belongs to
            hidden state t.
        ignore_index: label of tokens that are left out of the loss.
        chunk_size: tokens whose logits are held at a time.
        compiled: read the logits with kernels from torch.compile: two passes, no float32 copy.
        per_token: return the loss of each token, [B, T] in float32 (float64 for float64 hidden
            states), 0 where the label is ignored. Without gradients.

    Raises:
        ValueError: shapes that do not fit together, a head that is sharded in another way,
            chunk_size below 1, or per_token where gradients are recorded.
    """
    if hidden_BTD.shape[:-1] != labels_BT.shape or hidden_BTD.shape[-1] != weight_VD.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden_BTD.shape)}, weight {tuple(weight_VD.shape)} and labels "
            f"{tuple(labels_BT.shape)} do not fit: pass [B, T, D], [V, D] and [B, T]."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1 token.")
    device = hidden_BTD.device.type
    dtype = hidden_BTD.dtype
    # ("meta" has no autocast.)
    if not hidden_BTD.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with_gradients = torch.is_grad_enabled() and (
        hidden_BTD.requires_grad or weight_VD.requires_grad
    )
    if per_token and with_gradients:
        raise ValueError("per_token losses have no gradients: call under torch.no_grad().")
    group = None
    if isinstance(weight_VD, DTensor):
        weight_VD, group = _local_rows(weight_VD)
    options = _Options(ignore_index, chunk_size, dtype, with_gradients, group, compiled, per_token)
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    loss = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, labels_BT.reshape(-1), options)
    return loss.view(labels_BT.shape) if per_token else loss


def _local_rows(weight: DTensor) -> tuple[Tensor, ProcessGroup]:
    """This rank's rows of the head, and the group that holds all of them."""
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.ndim != 1 or placements != (Shard(0),) or weight.shape[0] % mesh.size():
        raise ValueError(
            f"the head {tuple(weight.shape)} is placed as {placements} on {mesh}: a head that is "
            "sharded must be sharded evenly by vocabulary, (Shard(dim=0),) on a mesh of one axis."
        )
    return weight.to_local(), mesh.get_group()


class _Options(NamedTuple):
    """`dtype` is that of the matmuls; `group` holds the shards of the vocabulary."""

    ignore_index: int
    chunk_size: int
    dtype: torch.dtype
    with_gradients: bool
    group: ProcessGroup | None
    compiled: bool
    per_token: bool


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, options):
        ignore_index, chunk_size, dtype, with_gradients, group, compiled, per_token = options
        first_row = 0 if group is None else group.rank() * weight_VD.shape[0]
        norm_and_label, softmax_minus_one_hot = _passes(compiled)
        with _no_autocast(hidden_ND):
            weight = weight_VD.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            # The sum, or the loss of each token.
            total = hidden_ND.new_zeros(labels_N.shape if per_token else (), dtype=wide)
            grad_hidden = torch.zeros_like(hidden_ND) if with_gradients else None
            grad_weight = torch.zeros_like(weight_VD, dtype=wide) if with_gradients else None
            sums = []
            for start in range(0, hidden_ND.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                hidden_CD = hidden_ND[chunk].to(dtype)
                valid_C1 = (labels_N[chunk] != ignore_index).unsqueeze(1)
                labels_C1 = labels_N[chunk].unsqueeze(1) - first_row
                local_C1 = valid_C1 & (labels_C1 >= 0)
                if group is not None:
                    local_C1 &= labels_C1 < weight.shape[0]
                # -1 matches no row.
                labels_C1 = labels_C1.masked_fill(~local_C1, -1)
                logits_CV = hidden_CD @ weight.T
                log_norm_C1, label_C1 = norm_and_label(logits_CV, labels_C1)
                # A label that no rank holds stays at -inf, so its loss is infinite, not wrong.
                label_C1 = label_C1.masked_fill(~local_C1, -torch.inf)
                if group is not None:
                    log_norm_C1, label_C1 = reduce_over_vocabulary(log_norm_C1, label_C1, group)
                loss_C1 = (log_norm_C1 - label_C1).masked_fill(~valid_C1, 0)
                if per_token:
                    total[chunk] = loss_C1.squeeze(1)
                else:
                    total += loss_C1.sum()
                if not with_gradients:
                    continue
                grad_CV = softmax_minus_one_hot(logits_CV, log_norm_C1, labels_C1, valid_C1)
                grad_hidden[chunk] = grad_CV @ weight
                if group is not None:
                    # Summed over ranks under the next chunk's matmuls.
                    sums.append(dist.all_reduce(grad_hidden[chunk], group=group, async_op=True))
                _add_product(grad_weight, grad_CV.T, hidden_CD)
            for pending in sums:
                pending.wait()
        if with_gradients:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total.to(torch.float32) if wide != torch.float64 else total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total):
        scaled = [
            grad * grad_total.to(grad.dtype) if needed else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        return *scaled, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on a GPU the product is added as it is summed up, in the dtype of `total`."""
    if total.is_cuda and total.dtype == torch.float32 != a.dtype:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    if tensor.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def reduce_over_vocabulary(
    log_norm_C1: Tensor, label_C1: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and the label's logit over the full vocabulary, the same bits on every rank."""
    local_C2 = torch.cat([log_norm_C1, label_C1], 1)
    gathered, work = all_gather_flat(local_C2.flatten(), group)
    work.wait()
    norms_RC1, labels_RC1 = gathered.view(group.size(), *local_C2.shape).split(1, dim=2)
    return torch.logsumexp(norms_RC1, 0), labels_RC1.amax(0)


def log_norm_and_label(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor]:
    """log(sum(exp(logits))) and the label's logit, [C, 1] in float32 at least."""
    wide = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    sums = wide
    if wide.is_cuda:
        # The largest part that a kernel reads into registers at once. It would read a full row
        # twice, for its maximum and for its sum.
        part = next(n for n in range(min(wide.shape[1], 1024), 0, -1) if wide.shape[1] % n == 0)
        if part >= 256:
            sums = torch.logsumexp(wide.unflatten(1, (-1, part)), 2)
    return torch.logsumexp(sums, 1, keepdim=True), wide.gather(1, labels_C1.clamp_min(0))


def _softmax_minus_one_hot(
    logits_CV: Tensor, log_norm_C1: Tensor, labels_C1: Tensor, valid_C1: Tensor
) -> Tensor:
    """The gradient of a chunk's loss with respect to its logits, which it may overwrite; zero where
    a label is ignored, whatever the logits are (inf * 0 would be NaN)."""
    grad_CV = logits_CV.to(log_norm_C1.dtype).sub_(log_norm_C1).exp_()
    # A comparison, because a scatter would split the fused kernel in two.
    rows_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    grad_CV.add_(rows_V == labels_C1, alpha=-1)
    return grad_CV.masked_fill_(~valid_C1, 0).to(logits_CV.dtype)


@functools.cache
def _passes(compiled: bool):
    passes = log_norm_and_label, _softmax_minus_one_hot
    return tuple(map(torch.compile, passes)) if compiled else passes
