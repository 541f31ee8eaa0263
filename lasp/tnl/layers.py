"""The two mixers of TransNormerLLM and the block that joins them.

Shapes: B batch, T tokens of this shard, d model width, H heads *held here* (all of them, or 1/tp),
D head dim, K key dim (2D in the layers with LRPE), G inner width of the channel mixer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import lasp
from lasp.shard import SequenceShard
from lasp.tnl.config import TNLConfig
from lasp.tnl.lrpe import LRPE
from lasp.tnl.norm import SRMSNorm
from lasp.tnl.softmax import SoftmaxAttention

__all__ = ["SGLU", "GatedLinearAttention", "TNLBlock"]


class GatedLinearAttention(nn.Module):
    """The token mixer: y = W_o(u * SRMSNorm(o)), o = lightning attention of silu(q), silu(k), v.

    arXiv 2405.17381 eq. 11 and 13. There is no 1/sqrt(D) and no denominator: the norm, taken over
    all heads together, replaces both.

    The rows of `qkvu_proj` are ordered head by head, and within a head q, k, v, u: a contiguous
    range of rows is a range of whole heads, so that tensor parallelism is a plain chunking.

    Args:
        config: the model's.
        layer: index from 0 over the whole model; it decides the decay and the use of LRPE.
    """

    def __init__(self, config: TNLConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = slice(0, config.num_heads)
        self.qkvu_proj = nn.Linear(config.dim, 4 * config.dim, bias=False)
        uses_lrpe = config.uses_lrpe(layer)
        self.lrpe = LRPE(config.num_heads, config.head_dim) if uses_lrpe else None
        self.norm = SRMSNorm(config.dim, config.norm_eps)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.register_buffer("log_decay", self._log_decay(), persistent=False)

    def forward(
        self,
        x: torch.Tensor,
        shard: SequenceShard,
        position: int = 0,
        state: torch.Tensor | None = None,
        return_state: bool = False,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, d] -> (y [B, T, d], state after the last token [N, H, K, D] float32, or None).

        Args:
            shard: where x lies in the sequence, and the group that holds the rest.
            position: of x's first token, counted from the beginning of everything the state saw.
            state: [N, H, K, D] float32 before the first token of the global sequence, on the first
                rank; None: zero.
            padding_mask: bool [B, T], False where a token is padding. Padding adds nothing to the
                state (its v is zeroed); the decay runs on through it, as in the released code.
            cu_seqlens: packed documents, as in `lasp.lightning_attention`.
        """
        qkvu = self.qkvu_proj(x).unflatten(-1, (-1, 4, self.head_dim))
        q, k, v, u = qkvu.unbind(dim=-2)
        if self.config.activation == "silu":
            q, k = F.silu(q), F.silu(k)
        if self.lrpe is not None:
            q, k = self._with_positions(q, k, shard, position)
        if padding_mask is not None:
            v = v.masked_fill(~padding_mask[:, :, None, None], 0)
        o, state = self._attend(q, k, v, shard, state, return_state, cu_seqlens)
        o = self.norm(o.flatten(-2)).unflatten(-1, (-1, self.head_dim))
        return self.out_proj((u * o).flatten(-2)), state

    def _with_positions(self, q, k, shard, position):
        """LRPE of the shard's tokens, which in zigzag are two ranges of the sequence."""
        if shard.layout == "contiguous":
            return self.lrpe(q, k, position)
        past, half = position - shard.start, q.shape[1] // 2
        parts = [
            self.lrpe(q.narrow(1, row, half), k.narrow(1, row, half), past + start)
            for row, (start, _) in zip((0, half), shard.ranges, strict=True)
        ]
        return tuple(torch.cat(each, dim=1) for each in zip(*parts, strict=True))

    def _attend(self, q, k, v, shard, state, return_state, cu_seqlens):
        """One recurrent step where there is one token and a state, else the parallel operator."""
        decoding = q.shape[1] == 1 and state is not None and shard.group is None
        if decoding and cu_seqlens is None and not torch.is_grad_enabled():
            o, state = lasp.lightning_attention_step(
                q[:, 0], k[:, 0], v[:, 0], state, self.log_decay
            )
            return o.unsqueeze(1), state
        result = lasp.lightning_attention(
            q,
            k,
            v,
            self.log_decay,
            initial_state=state,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            group=shard.group,
            exchange=shard.exchange,
            layout=shard.layout,
            # They matter to packed documents only.
            shard_lengths=None if cu_seqlens is None else shard.lengths,
        )
        return result if return_state else (result, None)

    def keep_heads(self, heads: slice) -> None:
        """Reduce the decay and the LRPE rates to the given heads (tensor parallelism).

        The projections and the norm are the caller's to shard: the norm's mean square is over the
        heads of all ranks.
        """
        if self.lrpe is not None:
            self.lrpe.keep_heads(heads)
        self.heads = slice(*heads.indices(self.config.num_heads))
        self.log_decay = self._log_decay().to(self.log_decay.device)

    def _log_decay(self) -> torch.Tensor:
        config = self.config
        return lasp.decay.tnl(config.num_heads, self.layer, config.num_layers)[self.heads]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        # The decay is a constant that must stay float32. Rebuilding it undoes a cast
        # (`model.bfloat16()`) and gives it its value after `to_empty()` from the meta device.
        super()._apply(fn, recurse)
        self.log_decay = self._log_decay().to(self.log_decay.device)
        return self


class SGLU(nn.Module):
    """The channel mixer: y = W3(W1 x * W2 x), without activation (arXiv 2405.17381 eq. 12).

    x [B, T, d] -> [B, T, d]. W1 and W2 [G, d] are two matrices, not one: each can be cut by rows
    for tensor parallelism.
    """

    def __init__(self, config: TNLConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.glu_dim, bias=False)
        self.w2 = nn.Linear(config.dim, config.glu_dim, bias=False)
        self.w3 = nn.Linear(config.glu_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(self.w1(x) * self.w2(x))


class TNLBlock(nn.Module):
    """x + mixer(norm(x)), then x + SGLU(norm(x)). Arguments and results are the token mixer's:
    linear attention, or softmax attention in a hybrid's softmax layers."""

    def __init__(self, config: TNLConfig, layer: int) -> None:
        super().__init__()
        self.token_norm = SRMSNorm(config.dim, config.norm_eps)
        self.token_mixer = (
            SoftmaxAttention(config)
            if config.is_softmax(layer)
            else GatedLinearAttention(config, layer)
        )
        self.channel_norm = SRMSNorm(config.dim, config.norm_eps)
        self.channel_mixer = SGLU(config)

    def forward(
        self,
        x: torch.Tensor,
        shard: SequenceShard,
        position: int = 0,
        state: torch.Tensor | None = None,
        return_state: bool = False,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, d] -> (y [B, T, d], state or None), as `GatedLinearAttention.forward`."""
        mixed, state = self.token_mixer(
            self.token_norm(x), shard, position, state, return_state, padding_mask, cu_seqlens
        )
        x = x + mixed
        return x + self.channel_mixer(self.channel_norm(x)), state
