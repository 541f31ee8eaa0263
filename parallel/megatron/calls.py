"""What Megatron's core-attention slot may ask of a causal attention, and what it may not."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

__all__ = ["check_build", "document_borders", "process_groups"]


def process_groups(given: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """The groups that Megatron passed, or its global ones. No group is ever created here."""
    if given is not None:
        return given
    return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])


def check_build(config, attn_mask_type, attention_type, attention_dropout) -> None:
    """Raise ValueError for a config that these attentions do not serve."""
    dropout = config.attention_dropout if attention_dropout is None else attention_dropout
    if attention_type != "self":
        raise ValueError(f"attention_type is {attention_type!r}: only 'self' is served.")
    _check_mask(attn_mask_type)
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}: there is none here (linear attention has no scores "
            "to drop). Set it to 0 (--attention-dropout 0.0)."
        )
    if config.multi_latent_attention:
        raise ValueError(
            "config.multi_latent_attention is True: its heads have other sizes in queries and "
            "values, which is not served. Use a base spec without it."
        )
    if getattr(config, "window_size", None) is not None:
        raise ValueError(
            f"config.window_size is {config.window_size}: there are no windows here (a decay does "
            "that). Leave it at None."
        )


def _check_mask(mask_type):
    if mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
        raise ValueError(
            f"attn_mask_type is {mask_type.name}: attention is causal here. Build the layer with "
            "AttnMaskType.causal."
        )


def document_borders(
    core, query, key, attn_mask_type, attention_bias, packed_seq_params
) -> torch.Tensor | None:
    """Check a call of `core`: the borders of its packed documents, or None.

    Raises:
        ValueError: a call that `core` does not serve.
    """
    if attention_bias is not None:
        raise ValueError("attention_bias is given: there is none here (nor scores to add it to).")
    _check_mask(attn_mask_type)
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"{query.shape[0]} queries meet {key.shape[0]} keys: Megatron's inference with a "
            "key-value cache is not served. Generate with the native model "
            "(parallel.megatron.from_megatron)."
        )
    size = core.cp_group.size()
    if core.sequence_layout == "contiguous" and size > 1 and not core.layout_agreed:
        raise ValueError(
            f"layout='contiguous' over {size} context-parallel ranks, but the batches may be "
            "Megatron's zigzag ones, which would train on scrambled sequences: build "
            "parallel.megatron.BatchSplitter(model) and cut batches with it."
        )
    if packed_seq_params is None:
        return None
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format is {packed_seq_params.qkv_format!r}: only 'thd' is "
            "served."
        )
    if size > 1 and core.sequence_layout != "contiguous":
        raise ValueError(
            f"packed_seq_params (thd) over {size} context-parallel ranks in zigzag: Megatron "
            "cuts each document over the ranks by itself, which is not served. Use "
            "layout='contiguous' (the packed sequence is cut as a whole)."
        )
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded
