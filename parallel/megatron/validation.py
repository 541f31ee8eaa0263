"""Checks of options, configs and calls of a core attention; every error is a ValueError."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType

from parallel.megatron.documents import Documents

__all__ = [
    "MEGATRON_ONLY",
    "check_call",
    "check_choice",
    "check_config",
    "check_linear_config",
    "check_options",
    "check_precision",
    "decay_layer",
]


# Arguments of Megatron's, in some versions and layers, that say nothing to an attention.
MEGATRON_ONLY = frozenset(("name", "pp_layer_offset", "num_splits"))


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{option} is {value!r}: choose one of {', '.join(choices)}.")


def check_options(where: str, unknown: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse options that nothing reads, which a spec would otherwise pass silently."""
    for name, value in unknown.items():
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}."
        raise ValueError(f"{name}={value!r} is no option of {where}: {hint}")


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
    if getattr(config, "window_size", None) is not None:
        raise ValueError(
            f"config.window_size is {config.window_size}: windows are not supported (a decay "
            "serves the same purpose). Leave it at None."
        )
    if config.softmax_type != "vanilla":
        raise ValueError(
            f"config.softmax_type is {config.softmax_type!r}: only 'vanilla' is supported."
        )
    for field in ("qk_clip", "log_max_attention_logit"):
        if getattr(config, field, False):
            raise ValueError(
                f"config.{field} is True: these layers compute no largest attention logit. Set it "
                "to False."
            )


def check_precision(config, linear: torch.nn.Module) -> None:
    """Refuse FP8 and FP4 in a layer with Megatron's local linear layers, which ignore them."""
    for field in ("fp8", "fp4"):
        value = getattr(config, field, None)
        if value and isinstance(linear, RowParallelLinear):
            raise ValueError(
                f"config.{field} is {value!r} with Megatron's local linear layers, which ignore "
                "it. Use Transformer Engine's (backend=TESpecProvider() of a TNL, "
                "use_transformer_engine=True of a hybrid), or leave it at None."
            )


def check_linear_config(softmax_scale, k_channels, v_channels) -> None:
    """Refuse what linear attention has no place for."""
    if k_channels != v_channels:
        raise ValueError(
            f"the keys have {k_channels} features and the values {v_channels}: latent attention "
            "(MLA) computes keys and values for softmax. Use get_lightning_hybrid_block_spec, "
            "whose linear layers have projections of their own beside MLA layers."
        )
    if softmax_scale is not None:
        raise ValueError(
            f"softmax_scale is {softmax_scale}: linear attention has no softmax. Set scale= in the "
            "spec for a factor on the output, and config.softmax_scale to None."
        )


def _check_mask(mask_type):
    if mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
        raise ValueError(
            f"attn_mask_type is {mask_type.name}: attention is causal here. Build the layer with "
            "AttnMaskType.causal."
        )


def decay_layer(
    decay_index: int | Sequence[int | None] | None,
    num_decay_layers: int | None,
    layer_number: int,
    config,
) -> tuple[int, int]:
    """(index from 0, number of layers) that the decay of a layer depends on.

    Raises:
        ValueError: an index that the options do not give, or outside the layers.
    """
    count = config.num_layers if num_decay_layers is None else num_decay_layers
    if count < 1:
        raise ValueError(f"num_decay_layers is {count}: it must be at least 1, or None.")
    if isinstance(decay_index, Sequence):
        entries = len(decay_index)
        index = decay_index[layer_number - 1] if layer_number <= entries else None
        if index is None:
            raise ValueError(
                f"decay_index has {entries} entries and none for layer {layer_number} (from 1): "
                "give one per layer of the model."
            )
    elif decay_index is not None:
        index = decay_index
    elif config.mtp_num_layers:
        raise ValueError(
            f"config.mtp_num_layers is {config.mtp_num_layers} and decay_index is not given: "
            "versions of Megatron number the layers of multi-token prediction differently, so a "
            "decay cannot follow from the layer's number. Use get_lightning_hybrid_block_spec and "
            "get_lightning_hybrid_mtp_spec, or give decay_index in the spec of each layer."
        )
    else:
        index = layer_number - 1
    if not 0 <= index < count:
        raise ValueError(
            f"decay_index is {index}: layers are counted from 0 to {count - 1}, the number of "
            "layers that the decay depends on less one."
        )
    return index, count


def check_call(
    core, query, key, attention_mask, attn_mask_type, attention_bias, packed_seq_params
) -> torch.Tensor | None:
    """Refuse a call that `core` does not support; cu_seqlens of packed documents, or None."""
    if attention_bias is not None:
        raise ValueError("attention_bias is given, and is not supported. Leave it at None.")
    _check_mask(attn_mask_type)
    if attention_mask is not None:
        raise ValueError(
            f"an attention_mask of shape {tuple(attention_mask.shape)} is given: attention is "
            "causal and reads no mask. Pass None (--no-create-attention-mask-in-dataloader); for "
            "documents that must not see each other pass packed_seq_params."
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"{query.shape[0]} queries and {key.shape[0]} keys are given: Megatron's decoding from "
            "a key-value cache is not supported, since linear attention keeps a state instead. "
            "Evaluate full sequences; a TNL (parallel.megatron.from_megatron) also decodes in its "
            "native form."
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
    return _check_documents(core, packed_seq_params)


def _check_documents(core, packed):
    if isinstance(packed, Documents):
        cu_seqlens, by_document = packed.cu_seqlens, True
    elif packed.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format is {packed.qkv_format!r}: only 'thd' is supported."
        )
    else:
        padded = packed.cu_seqlens_q_padded
        cu_seqlens, by_document = packed.cu_seqlens_q if padded is None else padded, False
    size = core.cp_group.size()
    if size > 1 and not core.layout_confirmed:
        raise ValueError(
            f"packed_seq_params (thd) over {size} context-parallel ranks in {core.sequence_layout}:"
            " Megatron cuts each document over the ranks by itself, and here the packed sequence "
            "is cut as a whole. Build parallel.megatron.BatchSplitter(model) and shard batches "
            "with it."
        )
    if size > 1 and not by_document and core.sequence_layout == "zigzag":
        raise ValueError(
            f"packed_seq_params (thd) over {size} context-parallel ranks in zigzag in a layer of "
            "Megatron, which cuts each document by itself. Build the layer with "
            "get_lasp_gpt_layer_spec or get_lightning_hybrid_block_spec."
        )
    return cu_seqlens
