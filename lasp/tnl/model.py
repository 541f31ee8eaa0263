"""TransNormerLLM as one plain nn.Module.

Shapes: B batch, T tokens of this shard, d model width, V vocabulary; N sequences (B, or packed
documents), H heads, K key dim, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lasp.shard import SequenceShard
from lasp.tnl.config import TNLConfig
from lasp.tnl.generation import generate
from lasp.tnl.layers import TNLBlock
from lasp.tnl.norm import SRMSNorm

__all__ = ["TNL", "TNLState"]


@dataclass
class TNLState:
    """All a TNL remembers of the tokens it has read: constant in size, whatever their number, but
    for a hybrid's softmax layers.

    Attributes:
        layers: one per layer: [N, H, K, D] float32 of a linear one, keys and values [2, B, tokens,
            heads of keys, D] of a softmax one.
        position: tokens read; where the next one's LRPE angle continues.
    """

    layers: list[torch.Tensor]
    position: int


class TNL(nn.Module):
    """TransNormerLLM (arXiv 2405.17381, the released checkpoints where paper and code differ).

        h = embed(tokens) * sqrt(d);  h = block(h) for each block;  logits = W_embed SRMSNorm(h)

    Weights are drawn from N(0, init_std). Built under `torch.device("meta")`, the model needs
    `to_empty(device=...)` and then `init_weights()` or a `load_state_dict()`.
    """

    def __init__(self, config: TNLConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, config.pad_token_id)
        self.blocks = nn.ModuleList(TNLBlock(config, i) for i in range(config.num_layers))
        self.final_norm = SRMSNorm(config.dim, config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights from N(0, init_std) (torch's global generator); LRPE rates to their
        ladder; the padding token's row, where the config names one, to zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)
        for block in self.blocks:
            if block.token_mixer.lrpe is not None:
                block.token_mixer.lrpe.reset_parameters()
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
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, TNLState]:
        """Logits [B, T, V] for the tokens of this shard.

        Args:
            tokens: integers [B, T], below vocab_size. T may be 0 on a rank without tokens.
            shard: which tokens of the global sequence these are, and the group that holds the rest;
                None: the whole sequence.
            states: what was read before the global sequence. Its `position` must be the same on all
                ranks of the shard's group; its tensors are used on the first rank only.
            return_states: also return the `TNLState` after this shard's last token; the last rank's
                is that of the whole sequence.
            return_hidden: return the normed hidden states [B, T, d] in place of the logits, for a
                loss that never forms all logits: logits = hidden @ model.head_weight.T.
            padding_mask: bool [B, T], False where a token is padding: it adds nothing to the state.
            cu_seqlens: packed documents, as in `lasp.lightning_attention` (B must be 1).

        Raises:
            ValueError: shapes that do not fit each other, the shard or the config.
        """
        shard = self._check(tokens, shard, states, padding_mask)
        if self.config.num_softmax_layers:
            with_states = states is not None or return_states
            _refuse_in_hybrid(padding_mask is not None, cu_seqlens is not None and with_states)
        position = shard.start + (0 if states is None else states.position)
        entering = [None] * len(self.blocks)
        if states is not None and shard.is_first:
            entering = states.layers
        if padding_mask is not None:
            padding_mask = padding_mask.bool()

        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.dim)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream in the dtype of the products, as it is in a model of that dtype:
            # every norm and every saved input of a block moves half the bytes.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        leaving = []
        for block, state in zip(self.blocks, entering, strict=True):
            x, state = block(x, shard, position, state, return_states, padding_mask, cu_seqlens)
            leaving.append(state)
        x = self.final_norm(x)
        out = x if return_hidden else F.linear(x, self.head_weight)
        read = position - shard.start + shard.ranges[-1][1]
        return (out, TNLState(leaving, read)) if return_states else out

    @torch.no_grad()
    def generate(self, prompt_tokens: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        """Continue prompts; see `lasp.tnl.generation.generate` for the options."""
        return generate(self, prompt_tokens, max_new_tokens, **options)

    def _check(self, tokens, shard, states, padding_mask) -> SequenceShard:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"tokens is {tokens.dtype} {tuple(tokens.shape)}: give integers [batch, tokens] "
                "(a single sequence is tokens[None])."
            )
        shard = SequenceShard.whole(tokens.shape[1]) if shard is None else shard
        if shard.length != tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens were given, but the shard owns tokens "
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
        # Over ranks the operator compares lengths, and raises on all of them.
        if states is not None and shard.group is None:
            for layer, state in enumerate(states.layers):
                if self.config.is_softmax(layer) and state.shape[2] != states.position:
                    raise ValueError(
                        f"states.position is {states.position}, but layer {layer} remembers "
                        f"{state.shape[2]} tokens: pass the states that this model returned."
                    )
        return shard


def _refuse_in_hybrid(padding: bool, packed_with_states: bool) -> None:
    if padding:
        raise ValueError(
            "padding_mask is given, but softmax layers know no padding: pass sequences of one "
            "length (generate from prompts of different lengths one by one), or pack them with "
            "cu_seqlens."
        )
    if packed_with_states:
        raise ValueError(
            "cu_seqlens together with states, but softmax layers keep the past of a whole row, not "
            "of each document: pass documents as rows."
        )
