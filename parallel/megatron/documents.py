"""Packed documents inside a layer that knows the positions of its tokens."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams

__all__ = ["Documents"]


class Documents(PackedSeqParams):
    """`PackedSeqParams` of a packed sequence that is cut over the ranks as a whole.

    Its qkv_format is "sbhd": Megatron's attention then keeps tokens [t, 1, H, D] and applies the
    angles that it is given, one per token.
    """

    @classmethod
    def of(cls, packed: PackedSeqParams) -> Documents:
        """The documents that `packed` ("thd") describes.

        Raises:
            ValueError: another format.
        """
        if packed.qkv_format != "thd":
            raise ValueError(
                f"packed_seq_params.qkv_format is {packed.qkv_format!r}: only 'thd' is supported."
            )
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_q_padded=packed.cu_seqlens_q_padded,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_kv=packed.max_seqlen_kv,
        )

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 [N + 1], boundaries in the full sequence."""
        padded = self.cu_seqlens_q_padded
        return self.cu_seqlens_q if padded is None else padded

    def check_longest(self, num_positions: int) -> None:
        """Refuse a table of angles for fewer positions than a document has.

        Boundaries on a GPU are not checked, since the host would wait for them.
        """
        if self.cu_seqlens.is_cuda:
            return
        longest = int(self.cu_seqlens.diff().max())
        if longest > num_positions:
            raise ValueError(
                f"packed_seq_params has max_seqlen_q={self.max_seqlen_q} and a document of "
                f"{longest} tokens: set it to the longest document's tokens, or more."
            )
