"""The token mixer of a hybrid's softmax layers.

Shapes: B batch, T tokens of this shard, d model width, H heads of the queries *held here* and G of
the keys and values (all of them, or 1/tp), D head dim, S tokens of the past.
"""

from __future__ import annotations

import torch
from torch import nn

import lasp
from lasp.shard import SequenceShard
from lasp.softmax import gather_past
from lasp.tnl.config import TNLConfig
from lasp.tnl.rope import rotate

__all__ = ["SoftmaxAttention"]


class SoftmaxAttention(nn.Module):
    """y = W_o(causal softmax attention of RoPE(W_q x), RoPE(W_k x), W_v x), scores by 1/sqrt(D).

    The standard module, in the place of linear attention as in LASP-2H (arXiv 2502.07563): no gate
    and no norm of its own. Key head g serves H / G query heads.

    The rows of `kv_proj` are ordered head by head, and within a head k, v: a contiguous range of
    rows is a range of whole heads, as in `GatedLinearAttention`.

    Args:
        config: the model's.
    """

    # What `GatedLinearAttention` has in some layers.
    lrpe = None

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
        state: torch.Tensor | None = None,
        return_state: bool = False,
        padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, d] -> (y [B, T, d], the past of the next token or None).

        Args:
            shard: where x lies in the sequence, and the group that holds the rest.
            position: of x's first token, counted from the beginning of everything before it.
            state: keys and values [2, B, S, G, D] of the tokens before the global sequence, in the
                dtype of the projections, on the first rank; None: there are none. With a group,
                what is returned is the same for all tokens up to this shard's last, and no gradient
                flows through it.
            padding_mask, cu_seqlens: as of `GatedLinearAttention`; padding is refused by `TNL`.
        """
        assert padding_mask is None
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k, v = self.kv_proj(x).unflatten(-1, (-1, 2, self.head_dim)).unbind(dim=-2)
        past = position - shard.start
        ranges = tuple((past + start, past + stop) for start, stop in shard.ranges)
        q, k = (rotate(each, ranges, self.config.rope_base) for each in (q, k))
        if state is not None:
            k, v = torch.cat((state[0], k), dim=1), torch.cat((state[1], v), dim=1)
        across = dict(group=shard.group, layout=shard.layout)
        if shard.lengths is not None:
            # The first rank holds the past as well.
            across["shard_lengths"] = (past + shard.lengths[0], *shard.lengths[1:])
        o = lasp.softmax_attention(q, k, v, cu_seqlens=cu_seqlens, **across)
        if not return_state:
            leaving = None
        elif shard.group is None:
            leaving = torch.stack((k, v))
        else:
            leaving = gather_past(k, v, **across)
        return self.out_proj(o.flatten(-2)), leaving
