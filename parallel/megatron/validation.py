"""Checks of options, configs and calls of a core attention; every error is a ValueError."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.enums import AttnMaskType

__all__ = ["check_call", "check_choice", "check_config"]


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{option} is {value!r}: choose one of {', '.join(choices)}.")


def check_config(config, attn_mask_type, attention_type, attention_dropout) -> None:
    """Refuse a config that the core attentions do not support."""
    dropout = config.attention_dropout if attention_dropout is None else attention_dropout
    if attention_type != "self":
        raise ValueError(f"attention_type is {attention_type!r}: only 'self' is supported.")
    _check_mask(attn_mask_type)
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}: it is not supported (linear attention has no scores "
            "to drop). Set it to 0 (--attention-dropout 0.0)."
        )
    if config.multi_latent_attention:
        raise ValueError(
            "config.multi_latent_attention is True: heads whose queries and values differ in size "
            "are not supported. Use a base spec without it."
        )
    if getattr(config, "window_size", None) is not None:
        raise ValueError(
            f"config.window_size is {config.window_size}: windows are not supported (a decay "
            "serves the same purpose). Leave it at None."
        )


def _check_mask(mask_type):
    if mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
        raise ValueError(
            f"attn_mask_type is {mask_type.name}: attention is causal here. Build the layer with "
            "AttnMaskType.causal."
        )


def check_call(
    core, query, key, attn_mask_type, attention_bias, packed_seq_params
) -> torch.Tensor | None:
    """Refuse a call that `core` does not support; cu_seqlens of packed documents, or None."""
    if attention_bias is not None:
        raise ValueError("attention_bias is given, and is not supported. Leave it at None.")
    _check_mask(attn_mask_type)
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"{query.shape[0]} queries and {key.shape[0]} keys are given: Megatron's inference "
            "with a key-value cache is not supported. Generate with the native model "
            "(parallel.megatron.from_megatron)."
        )
    size = core.cp_group.size()
    if core.sequence_layout == "contiguous" and size > 1 and not core.layout_confirmed:
        raise ValueError(
            f"layout='contiguous' over {size} context-parallel ranks, but the batches may be "
            "Megatron's zigzag ones, which would train on scrambled sequences: build "
            "parallel.megatron.BatchSplitter(model) and shard batches with it."
        )
    if packed_seq_params is None:
        return None
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format is {packed_seq_params.qkv_format!r}: only 'thd' is "
            "supported."
        )
    if size > 1 and core.sequence_layout != "contiguous":
        raise ValueError(
            f"packed_seq_params (thd) over {size} context-parallel ranks in zigzag: Megatron "
            "shards each document by itself, which is not supported. Use layout='contiguous' "
            "(the packed sequence is sharded as a whole)."
        )
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded
