"""Cross-entropy whose logits never exist for more than a chunk of tokens.

A million tokens times 64,000 words of float32 logits are 250 GiB. Here a chunk's logits are
computed, turned into the loss and, where gradients are wanted, at once into the gradients of the
hidden states and of the head; then they are dropped. The backward only scales what is there, so
the head's matmul is not repeated.

Under tensor parallelism each rank has the logits of its own words, and they are never joined: two
numbers per token and rank (log-sum-exp, the label's logit) give every rank the loss.

Shapes: B batch, T tokens of this rank, D width, V vocabulary (this rank's part of it inside the
autograd function), C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

__all__ = ["chunked_cross_entropy"]


def chunked_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int = 2048,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label], a float32 scalar.

    Under autocast the matmuls run in its dtype; the softmax and the sums are float32 always.
    A batch in which every label is ignored (or with no token) gives 0 with zero gradients.

    Args:
        hidden_BTD: final hidden states [B, T, D], any floating dtype.
        weight_VD: the output head [V, D]. A DTensor that is cut by words over one mesh axis makes
            the loss vocabulary-parallel: hidden states and labels must be the same on those ranks,
            the result is too, and the gradient of the hidden states is complete on each.
        labels_BT: int64 [B, T], in 0..V-1 or `ignore_index`. Already shifted: label t belongs to
            hidden state t.
        ignore_index: labels that count for nothing.
        chunk_size: tokens whose logits exist at the same time.

    Raises:
        ValueError: shapes that do not fit together, a head that is cut in another way, or
            chunk_size below 1.
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
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with_gradients = torch.is_grad_enabled() and (
        hidden_BTD.requires_grad or weight_VD.requires_grad
    )
    group = None
    if isinstance(weight_VD, DTensor):
        weight_VD, group = _own_words(weight_VD)
    return _ChunkedCrossEntropy.apply(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        weight_VD,
        labels_BT.reshape(-1),
        ignore_index,
        chunk_size,
        dtype,
        with_gradients,
        group,
    )


def _own_words(weight: DTensor) -> tuple[Tensor, ProcessGroup]:
    """This rank's rows of the head, and the ranks that have the others."""
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.ndim != 1 or placements != (Shard(0),) or weight.shape[0] % mesh.size():
        raise ValueError(
            f"the head {tuple(weight.shape)} is placed as {placements} on {mesh}: a head that is "
            "cut must be cut evenly by words, (Shard(dim=0),) on a mesh of one axis."
        )
    return weight.to_local(), mesh.get_group()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, labels_N, ignore_index, chunk_size, dtype, with_gradients, group
    ):
        first_word = 0 if group is None else group.rank() * weight_VD.shape[0]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            total = hidden_ND.new_zeros((), dtype=wide)
            grad_hidden = torch.zeros_like(hidden_ND) if with_gradients else None
            grad_weight = torch.zeros_like(weight_VD, dtype=wide) if with_gradients else None
            sums = []
            for start in range(0, hidden_ND.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                hidden_CD = hidden_ND[chunk].to(dtype)
                valid_C1 = (labels_N[chunk] != ignore_index).unsqueeze(1)
                labels_C1 = labels_N[chunk].unsqueeze(1) - first_word
                here_C1 = valid_C1
                if group is not None:
                    here_C1 = valid_C1 & (labels_C1 >= 0) & (labels_C1 < weight.shape[0])
                labels_C1 = labels_C1.masked_fill(~here_C1, 0)
                logits_CV = (hidden_CD @ weight.T).to(wide)
                log_norm_C1 = torch.logsumexp(logits_CV, 1, keepdim=True)
                label_C1 = logits_CV.gather(1, labels_C1)
                if group is not None:
                    # A label that is no rank's stays at -inf: its loss is infinite, not wrong.
                    label_C1 = label_C1.masked_fill(~here_C1, -torch.inf)
                    log_norm_C1, label_C1 = _over_ranks(log_norm_C1, label_C1, group)
                loss_C1 = log_norm_C1 - label_C1
                total += loss_C1.masked_fill(~valid_C1, 0).sum()
                if not with_gradients:
                    continue
                # In place: the logits become softmax - one_hot, zero where the label is ignored.
                # (masked_fill, not a product: an ignored token may hold inf, and inf * 0 is NaN.)
                grad_CV = logits_CV.sub_(log_norm_C1).exp_()
                grad_CV.scatter_add_(1, labels_C1, -here_C1.to(wide))
                grad_CV = grad_CV.masked_fill_(~valid_C1, 0).to(dtype)
                grad_hidden[chunk] = grad_CV @ weight
                if group is not None:
                    # Summed over the words of all ranks, under the next chunk's matmuls.
                    sums.append(dist.all_reduce(grad_hidden[chunk], group=group, async_op=True))
                grad_weight += grad_CV.T @ hidden_CD
            for pending in sums:
                pending.wait()
        if with_gradients:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total.to(torch.float32) if wide != torch.float64 else total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        wanted_hidden, wanted_weight = ctx.needs_input_grad[:2]
        scaled_hidden = grad_hidden * grad_total.to(grad_hidden.dtype) if wanted_hidden else None
        scaled_weight = grad_weight * grad_total.to(grad_weight.dtype) if wanted_weight else None
        return scaled_hidden, scaled_weight, None, None, None, None, None, None


def _over_ranks(
    log_norm_C1: Tensor, label_C1: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and the label's logit over the words of all ranks, the same bits on each."""
    mine_C2 = torch.cat([log_norm_C1, label_C1], 1)
    everyone = [torch.empty_like(mine_C2) for _ in range(group.size())]
    dist.all_gather(everyone, mine_C2, group=group)
    norms_RC1, labels_RC1 = torch.stack(everyone).split(1, dim=2)
    return torch.logsumexp(norms_RC1, 0), labels_RC1.amax(0)
