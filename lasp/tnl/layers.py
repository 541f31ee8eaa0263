"""The layers of TransNormerLLM: the norm, the two token mixers, the channel mixer, and the block.

Shapes: B batch, T tokens of this shard, d model width, H heads held here (all of them, or 1/tp) and
G key heads held here, D head dim, K key dim (2D in the layers with LRPE), S tokens of the past.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lasp
from lasp.shard import SequenceShard
from lasp.softmax_attention import gather_past
from lasp.tnl.config import TNLConfig
from lasp.tnl.dropout import DropoutKey, dropout
from lasp.tnl.heads import split_heads
from lasp.tnl.learned_decay import DecayProjection, fixed_decay, learned_decay
from lasp.tnl.positions import LRPE, apply_rope
from lasp.tnl.variants import ACTIVATIONS, DECAYS, NORMS, SRMSNorm

__all__ = [
    "SGLU",
    "GatedLinearAttention",
    "SRMSNorm",
    "SoftmaxAttention",
    "TNLBlock",
    "position_ranges",
]


class GatedLinearAttention(nn.Module):
    """The token mixer: y = W_o(u * SRMSNorm(o)), o = lightning attention of silu(q), silu(k), v.

    arXiv 2405.17381 eq. 11 and 13. There is no 1/sqrt(D) and no denominator: the norm, taken over
    all heads together, replaces both.

    The rows of `qkvu_proj` are ordered head by head, and within a head q, k, v, u: a contiguous
    range of rows is a range of whole heads, so tensor parallelism can shard it by rows. Variants
    (`TNLConfig`): without a gate there is no u; with a denominator o_t is divided by the sum of
    its weights, q_t . sum_s decay^(t-s) k_s (arXiv 2006.16236 eq. 9), instead of normed. The
    denominator is one more value per head, 1 for each token, so that states are [H, K, D + 1].

    Args:
        config: the model's.
        layer: index from 0 over the whole model; it decides the decay and the use of LRPE.

    The decay is fixed, or computed from x (`lasp.tnl.learned_decay`).
    """

    def __init__(self, config: TNLConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = slice(0, config.num_heads)
        self.num_parts = 4 if config.output_gate else 3
        self.qkvu_proj = nn.Linear(config.dim, self.num_parts * config.dim, bias=False)
        uses_lrpe = config.uses_lrpe(layer)
        self.lrpe = LRPE(config.num_heads, config.head_dim) if uses_lrpe else None
        self.norm = None
        if not config.denominator:
            self.norm = NORMS[config.norm](config.dim, config.norm_eps)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)
        is_learned = config.decay == "learned"
        self.decay_proj = DecayProjection(config.dim, config.num_heads) if is_learned else None
        for name in ("log_decay", "decay_sharpness"):
            self.register_buffer(name, None, persistent=False)
        self._set_decay(self.qkvu_proj.weight.device)

    def forward(
        self,
        x: torch.Tensor,
        shard: SequenceShard,
        position: int = 0,
        *,
        state: torch.Tensor | None = None,
        return_state: bool = False,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cut_documents: bool = False,
        state_only: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """x [B, T, d] -> (y [B, T, d], state after the last token [N, H, K, D] float32, or None).

        Args:
            shard: where x lies in the sequence, and the group that holds the rest.
            position: of x's first token, counted from the first token that the state has seen.
            state: [N, H, K, D] float32 before the first token of the global sequence, on the first
                rank (of packed documents on all); None: zero.
            padding_mask: bool [B, T], False where a token is padding. Padding adds nothing to the
                state (its v is zeroed); it decays the state like any token, as in the released
                code.
            cu_seqlens: packed documents, as in `lasp.lightning_attention`.
            cut_documents: `state` is that of the first document only, and so is the state returned
                of the last document; both [1, H, K, D].
            state_only: y is not computed, None takes its place.
        """
        q, k, v, *gate = self.project(x)
        if self.lrpe is not None:
            q, k = self.lrpe(q, k, *(start for start, _ in position_ranges(shard, position)))
        if padding_mask is not None:
            v = v.masked_fill(~padding_mask[:, :, None, None], 0)
        log_decay = self.log_decay
        if self.decay_proj is not None:
            log_decay = learned_decay(self.decay_proj(x), log_decay, self.decay_sharpness)
        if cut_documents and state is not None:
            # The other documents begin here.
            others = cu_seqlens.numel() - 2
            state = F.pad(state, (0, 0) * 3 + (0, others))
        o, state = self._attend(q, k, v, log_decay, shard, state, return_state, cu_seqlens)
        if cut_documents and return_state:
            state = state[-1:]
        if state_only:
            return None, state
        return self.output(o, *gate), state

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, T, d] -> q, k [B, T, H, D], activated and without positions; v [B, T, H, E]; with a
        gate u [B, T, H, D]. E is D, with a denominator D + 1."""
        qkvu = self.qkvu_proj(x).unflatten(-1, (-1, self.num_parts, self.head_dim))
        q, k, v, *gate = split_heads(qkvu, self.config.activation)
        if self.config.denominator:
            v = F.pad(v, (0, 1), value=1.0)
        return q, k, v, *gate

    def output(self, o: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        """o [B, T, H, E] of attention, and the u of `project` if there is one -> y [B, T, d]."""
        if self.norm is None:
            o = o[..., :-1] / (o[..., -1:] + self.config.norm_eps)
        else:
            o = self.norm(o.flatten(-2)).unflatten(-1, (-1, self.head_dim))
        for u in gate:
            o = u * o
        return self.out_proj(o.flatten(-2))

    def _attend(self, q, k, v, log_decay, shard, state, return_state, cu_seqlens):
        """One recurrent step where there is one token and a state, else the parallel operator."""
        decoding = q.shape[1] == 1 and state is not None and shard.group is None
        if decoding and cu_seqlens is None and not torch.is_grad_enabled():
            if self.decay_proj is not None:
                log_decay = log_decay[:, 0]
            o, state = lasp.lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], state, log_decay)
            return o.unsqueeze(1), state
        result = lasp.lightning_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            group=shard.group,
            exchange=shard.exchange,
            layout=shard.layout,
            # Only packed documents need them.
            shard_lengths=None if cu_seqlens is None else shard.lengths,
        )
        return result if return_state else (result, None)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K, E] of the heads held here."""
        heads = self.heads.stop - self.heads.start
        return heads, self.config.key_dim(self.layer), self.config.value_dim

    def keep_heads(self, heads: slice) -> None:
        """Drop the decays and LRPE rates of all but the given heads (tensor parallelism).

        The caller shards the projections, and replaces the norm: its mean square is over the heads
        of all ranks.
        """
        if self.lrpe is not None:
            self.lrpe.keep_heads(heads)
        self.heads = slice(*heads.indices(self.config.num_heads))
        self._set_decay(self.log_decay.device)

    def _set_decay(self, device: torch.device) -> None:
        config = self.config
        place = config.num_heads, self.layer, config.num_layers
        self.log_decay = DECAYS[config.decay](*place)[self.heads].to(device)
        if self.decay_proj is not None:
            self.decay_sharpness = fixed_decay(*place, self.heads)[1].to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        # The fixed decay is a constant that must stay float32. Rebuilding it undoes a cast
        # (`model.bfloat16()`) and gives it its value after `to_empty()` from the meta device.
        super()._apply(fn, recurse)
        self._set_decay(self.log_decay.device)
        return self


class SoftmaxAttention(nn.Module):
    """The token mixer of a hybrid's softmax layers: y = W_o softmax_attention(RoPE(q), RoPE(k), v).

    Causal, scores scaled by 1/sqrt(D), without gate or norm, as in LASP-2H (arXiv 2502.07563). Key
    head g serves H / G query heads.

    The rows of `kv_proj` are ordered head by head, and within a head k, v, as in
    `GatedLinearAttention`.
    """

    def __init__(self, config: TNLConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.kv_proj = nn.Linear(config.dim, 2 * config.kv_dim, bias=False)
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        shard: SequenceShard,
        position: int = 0,
        *,
        state: torch.Tensor | None = None,
        return_state: bool = False,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        state_only: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """x [B, T, d] -> (y [B, T, d], keys and values for the next token or None).

        Args:
            shard, position, cu_seqlens, state_only: as in `GatedLinearAttention`.
            state: keys and values [2, B, S, G, D] of the tokens before the global sequence, in the
                dtype of the projections, on the first rank; None: there are none. With a group,
                every rank gets those of all tokens up to its last, and no gradient flows through
                them.
            padding_mask: None (`TNL` refuses padding in softmax layers).
        """
        assert padding_mask is None
        k, v = self.kv_proj(x).unflatten(-1, (-1, 2, self.head_dim)).unbind(dim=-2)
        ranges = position_ranges(shard, position)
        k = apply_rope(k, ranges, self.config.rope_base)
        if state is not None:
            k, v = torch.cat((state[0], k), dim=1), torch.cat((state[1], v), dim=1)
        sharding = dict(group=shard.group, layout=shard.layout)
        if shard.lengths is not None:
            # The first rank also holds the past.
            past = position - shard.start
            sharding["shard_lengths"] = (past + shard.lengths[0], *shard.lengths[1:])
        if not return_state:
            state = None
        elif shard.group is None:
            state = torch.stack((k, v))
        else:
            state = gather_past(k, v, **sharding)
        if state_only:
            return None, state
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        q = apply_rope(q, ranges, self.config.rope_base)
        o = lasp.softmax_attention(q, k, v, cu_seqlens=cu_seqlens, **sharding)
        return self.out_proj(o.flatten(-2)), state

    @property
    def num_key_heads(self) -> int:
        """G, key heads held here."""
        weight = self.kv_proj.weight
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        return local.shape[0] // (2 * self.head_dim)


def position_ranges(shard: SequenceShard, position: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) positions of each chunk of the shard, if its first token is at `position`."""
    past = position - shard.start
    return tuple((past + start, past + stop) for start, stop in shard.ranges)


class SGLU(nn.Module):
    """The channel mixer: y = W3(W1 x * W2 x), without activation (arXiv 2405.17381 eq. 12).

    x [B, T, d] -> [B, T, d]. W1 and W2 are two matrices, not one: each can be sharded by rows. The
    variant with an activation has it on W1 x.
    """

    def __init__(self, config: TNLConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.glu_activation]
        self.w1 = nn.Linear(config.dim, config.glu_dim, bias=False)
        self.w2 = nn.Linear(config.dim, config.glu_dim, bias=False)
        self.w3 = nn.Linear(config.glu_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(self.activation(self.w1(x)) * self.w2(x))


class TNLBlock(nn.Module):
    """x + mixer(norm(x)), then x + SGLU(norm(x)), where the mixer is the layer's token mixer."""

    def __init__(self, config: TNLConfig, layer: int) -> None:
        super().__init__()
        self.token_norm = NORMS[config.norm](config.dim, config.norm_eps)
        if config.is_softmax(layer):
            self.token_mixer = SoftmaxAttention(config)
        else:
            self.token_mixer = GatedLinearAttention(config, layer)
        self.channel_norm = NORMS[config.norm](config.dim, config.norm_eps)
        self.channel_mixer = SGLU(config)

    def forward(
        self,
        x: torch.Tensor,
        shard: SequenceShard,
        position: int = 0,
        *,
        dropout_key: DropoutKey | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """x [B, T, d] -> (y [B, T, d], state or None); options are those of the token mixer."""
        mixed, state = self.token_mixer(self.token_norm(x), shard, position, **options)
        if mixed is None:
            return None, state
        x = x + dropout(mixed, dropout_key, 0)
        return x + dropout(self.channel_mixer(self.channel_norm(x)), dropout_key, 1), state
