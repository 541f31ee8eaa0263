"""Which tokens of a sequence a context-parallel rank holds, which layers a pipeline stage, and
which modules a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from lasp.shard import LAYOUTS, token_ranges
from parallel.megatron.validation import check_choice

__all__ = ["layers_of_stage", "modules_of", "segments", "sequence_layout"]


def modules_of(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """All modules of a model or of a list of model chunks."""
    chunks = [model] if isinstance(model, nn.Module) else model
    return [module for chunk in chunks for module in chunk.modules()]


def segments(total: int, layout: str, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the tokens that a rank of `size` holds, in local order.

    Raises:
        ValueError: an unknown layout, or a length that it does not shard evenly, as Megatron needs.
    """
    layout = sequence_layout(None, layout)
    count = size * (2 if layout == "zigzag" else 1)
    if size == 1:
        return ((0, total),)
    if total % count:
        raise ValueError(
            f"a sequence of {total} tokens does not split into {count} equal chunks ({layout} over "
            f"{size} context-parallel ranks): choose a multiple of {count}."
        )
    return token_ranges(total, size, rank, layout)


def sequence_layout(config: TransformerConfig | None, layout: str | None) -> str:
    """`layout`, or if None that of Megatron's config, or zigzag; ValueError for an unknown one."""
    layout = layout or getattr(config, "linear_cp_layout", None) or "zigzag"
    check_choice("layout", layout, LAYOUTS)
    return layout


def layers_of_stage(
    config: TransformerConfig, specs: list[Any], vp_stage: int | None, pp_rank: int | None
) -> list[Any]:
    """Of the specs of all layers of the model, those of this pipeline stage."""
    stages = config.pipeline_model_parallel_layout
    if stages is not None:
        numbers = stages.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
        return [specs[number] for number in numbers]
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return specs[first : first + get_num_layers_to_build(config, vp_stage, pp_rank)]
