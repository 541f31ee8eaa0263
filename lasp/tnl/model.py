"""TransNormerLLM as one plain nn.Module.

Shapes: B batch, T tokens of this shard, d model width, V vocabulary; N sequences (B, or packed
documents), H heads, G key heads, K key dim, D head dim, S tokens of the past.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from lasp.shard import SequenceShard
from lasp.tnl.config import TNLConfig
from lasp.tnl.dropout import DropoutKey, dropout
from lasp.tnl.layers import GatedLinearAttention, TNLBlock, position_ranges
from lasp.tnl.learned_decay import DecayProjection
from lasp.tnl.positions import LRPE
from lasp.tnl.variants import NORMS, LayerNorm, RMSNorm

__all__ = ["TNL", "TNLState"]


@dataclass
class TNLState:
    """What a TNL keeps of the tokens it has read; of constant size, except in softmax layers.

    Attributes:
        layers: one entry per layer: [N, H, K, E] float32 for a linear one (E is D, and D + 1 with
            a denominator), keys and values [2, B, S, G, D] for a softmax one.
        position: tokens read so far, which is the position of the next token.
    """

    layers: list[torch.Tensor]
    position: int


class TNL(nn.Module):
    """TransNormerLLM (arXiv 2405.17381, the released checkpoints where paper and code differ).

        h = embed(tokens) * sqrt(d);  h = block(h) for each block;  logits = W_embed SRMSNorm(h)

    (With position embeddings, embed(tokens) + embed(positions) in place of embed(tokens).)
    Weights are drawn from N(0, init_std); a learned decay starts at the fixed one. Built under
    `torch.device("meta")`, the model needs `to_empty(device=...)` and then `init_weights()` or a
    `load_state_dict()`.
    """

    # `lasp.tnl.generate` as a method; `lasp.tnl.generation` sets it.
    generate: ClassVar[Callable[..., torch.Tensor]]

    def __init__(self, config: TNLConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, config.pad_token_id)
        rows = config.position_embeddings
        self.position_embedding = nn.Embedding(rows, config.dim) if rows else None
        self.blocks = nn.ModuleList(TNLBlock(config, i) for i in range(config.num_layers))
        self.final_norm = NORMS[config.norm](config.dim, config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights from N(0, init_std) with torch's global generator, reset LRPE rates and
        norms, and zero the projections to learned decays and the padding token's embedding, if
        there are."""
        for module in self.modules():
            if isinstance(module, LRPE | DecayProjection | RMSNorm | LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
        if self.config.pad_token_id is not None:
            self.embedding.weight[self.config.pad_token_id].zero_()

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, d]: logits = hidden @ head_weight.T. The same tensor as the embedding."""
        return self.embedding.weight

    def forward(
        self,
        tokens: torch.Tensor,
        shard: SequenceShard | None = None,
        *,
        states: TNLState | None = None,
        return_states: bool = False,
        return_hidden: bool = False,
        states_only: bool = False,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cut_documents: bool = False,
        dropout_seeds: torch.Tensor | None = None,
    ) -> torch.Tensor | TNLState | tuple[torch.Tensor, TNLState]:
        """Logits [B, T, V] for the tokens of this shard.

        Args:
            tokens: integers [B, T], below vocab_size. T may be 0 on a rank without tokens.
            shard: which tokens of the global sequence these are, and the group that holds the rest;
                None: the full sequence.
            states: the state before the global sequence. Its `position` must be the same on all
                ranks of the shard's group. Its tensors are used on the first rank; with cu_seqlens
                they have one entry per document and are used on every rank on which a document
                begins. (Positions count along the row: with LRPE only the first document can
                continue an earlier one.)
            return_states: also return the `TNLState` after this shard's last token. The last rank's
                is that of the full sequence; with cu_seqlens, that of every document that ends
                there.
            return_hidden: return the normed hidden states [B, T, d] instead of the logits, for a
                loss that never forms all logits: logits = hidden @ model.head_weight.T.
            states_only: return only the `TNLState`. What no state needs is not computed: the head,
                and most of the last block.
            padding_mask: bool [B, T], False where a token is padding: it adds nothing to the state.
            cu_seqlens: packed documents, as in `lasp.lightning_attention` (B must be 1).
            cut_documents: with cu_seqlens, the global sequence is a segment of a longer one, which
                may begin and end within a document. `states`, used on the first rank only, have one
                entry, that of the first document; so have the states returned, of the last one, on
                the last rank with tokens.
            dropout_seeds: int64 [B], which decide the dropout of each sequence together with the
                positions of its tokens: the same on all ranks that share a sequence, and on those
                of tensor parallelism. None: drawn by torch's global generator in training while
                gradients are recorded, else there is no dropout.

        Raises:
            ValueError: shapes that do not fit each other, the shard or the config.
        """
        shard = self._check(tokens, shard, states, padding_mask)
        position = shard.start + (0 if states is None else states.position)
        self._check_positions(shard, position, padding_mask, cu_seqlens)
        if self.config.num_softmax_layers and padding_mask is not None:
            raise ValueError(
                "padding_mask is given, but softmax layers do not support padding: pass sequences "
                "of equal length (generate from prompts of different lengths one by one), or pack "
                "them with cu_seqlens."
            )
        return_states = return_states or states_only
        with_states = states is not None or return_states
        if self.config.num_softmax_layers and cu_seqlens is not None and with_states:
            raise ValueError(
                "cu_seqlens is given together with states, but softmax layers keep the past of a "
                "row, not of each document: pass documents as rows."
            )
        states_in = [None] * len(self.blocks)
        # Documents may begin on any rank; the operator uses the states of those that begin here.
        if states is not None and (
            shard.is_first or (cu_seqlens is not None and not cut_documents)
        ):
            states_in = states.layers
        if padding_mask is not None:
            padding_mask = padding_mask.bool()
        options: dict[str, Any] = dict(
            return_state=return_states, padding_mask=padding_mask, cu_seqlens=cu_seqlens
        )
        if cut_documents:
            options["cut_documents"] = True

        positions = None
        if self.position_embedding is not None or self.config.dropout:
            ranges = position_ranges(shard, position)
            positions = torch.cat([torch.arange(*each, device=tokens.device) for each in ranges])
        key = self._dropout_key(dropout_seeds, positions, len(tokens))
        x, states_out = dropout(self._embed(tokens, positions), key), []
        for number, (block, state) in enumerate(zip(self.blocks, states_in, strict=True), 1):
            if states_only and number == len(self.blocks):
                options["state_only"] = True
            if key is not None:
                options["dropout_key"] = key.of_layer(number)
            x, state = block(x, shard, position, state=state, **options)
            states_out.append(state)
        end = position - shard.start + shard.ranges[-1][1]
        if states_only:
            return TNLState(states_out, end)
        x = self.final_norm(x)
        out = x if return_hidden else F.linear(x, self.head_weight)
        return (out, TNLState(states_out, end)) if return_states else out

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The first block's input [B, T, d]; positions, [T] or [B, T], for position embeddings."""
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.dim)
        # ("meta" has no autocast.)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # The residual stream in the dtype of the matmuls, as in a model of that dtype: every
            # norm and every saved block input moves half the bytes.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _dropout_key(self, seeds, positions, batch_size: int) -> DropoutKey | None:
        if not self.config.dropout:
            return None
        if seeds is None and self.training and torch.is_grad_enabled():
            seeds = torch.randint(1 << 62, (batch_size,), device=positions.device)
        return None if seeds is None else DropoutKey.of(seeds, positions, self.config.dropout)

    def initial_states(self, batch_size: int = 1) -> TNLState:
        """The state before any token: zeros on the model's device, of the heads held here.

        Raises:
            ValueError: there are softmax layers, whose past has no constant size.
        """
        problem = self.config.streaming_problem()
        if problem is not None:
            raise ValueError(problem)
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        device = self.embedding.weight.device
        mixers = [cast(GatedLinearAttention, block.token_mixer) for block in self.blocks]
        layers = [
            torch.zeros(batch_size, *mixer.state_shape, dtype=dtype, device=device)
            for mixer in mixers
        ]
        return TNLState(layers, 0)

    def _check_positions(self, shard, position, padding_mask, cu_seqlens) -> None:
        end = position - shard.start + shard.total
        problem = self.config.sequence_problem(end, packed=cu_seqlens is not None)
        if self.config.position_embeddings and padding_mask is not None:
            problem = (
                "padding_mask is given, and position_embeddings would count padding: pass "
                "sequences of equal length (generate from prompts of different lengths by "
                "`lasp.tnl.generation.stream`)."
            )
        if problem is not None:
            raise ValueError(problem)

    def _check(self, tokens, shard, states, padding_mask) -> SequenceShard:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"tokens is {tokens.dtype} {tuple(tokens.shape)}: give integers [batch, tokens] "
                "(a single sequence is tokens[None])."
            )
        shard = SequenceShard.whole(tokens.shape[1]) if shard is None else shard
        if shard.length != tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens were given, but the shard holds tokens "
                f"{shard.ranges} of {shard.total}: pass shard.take(tokens)."
            )
        if padding_mask is not None and padding_mask.shape != tokens.shape:
            raise ValueError(
                f"padding_mask is {tuple(padding_mask.shape)}: it must have the shape of the "
                f"tokens, {tuple(tokens.shape)}."
            )
        if states is not None and len(states.layers) != len(self.blocks):
            raise ValueError(
                f"states has {len(states.layers)} layers and this model {len(self.blocks)}: "
                "pass the states that this model returned."
            )
        # With a group the operator compares the lengths and raises on every rank.
        if states is not None and shard.group is None:
            for layer, state in enumerate(states.layers):
                if self.config.is_softmax(layer) and state.shape[2] != states.position:
                    raise ValueError(
                        f"states.position is {states.position}, but layer {layer} holds keys of "
                        f"{state.shape[2]} tokens: pass the states that this model returned."
                    )
        return shard
