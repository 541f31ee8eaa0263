"""FP8 matrix products in a model's blocks, by torchao: weights stay float32, products run in FP8.

    input, weight  -> e4m3     output      = input @ weight.T
    gradient       -> e5m2     grad_input  = grad_output @ weight       (rowwise: e4m3)
                               grad_weight = grad_output.T @ input

Each operand is scaled into FP8's range by its own largest value, found anew in each step: one scale
per tensor ("tensorwise"), or one per row or column of the product ("rowwise": slower, finer).
Embedding, norms, attention, the head with its loss, and linear layers of a class that sets
`allows_float8 = False` (projections to decays) are left as they are. Parameters keep their names,
shapes and dtype, so a checkpoint does not tell whether products ran in FP8.

The casts are separate passes over memory unless torch.compile fuses them with what comes before.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "MULTIPLE",
    "RECIPES",
    "check_available",
    "check_sizes",
    "convert_blocks",
    "high_precision",
    "scales_in_one_reduction",
]

RECIPES = ("tensorwise", "rowwise")
# FP8 products read 16 bytes at a time.
MULTIPLE = 16
_OLDEST = (0, 18)
# The first chip with FP8 products, Ada.
_CAPABILITY = (8, 9)


def check_available(device: torch.device, *, emulate: bool = False) -> None:
    """Raise ValueError where FP8 products cannot run: no torchao, or an older one, or a device
    without them.

    Args:
        device: of the model.
        emulate: products run in float32 on rounded operands, on any device.
    """
    try:
        version = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "FP8 needs the package torchao, which is not installed: pip install -e '.[fp8]'."
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ValueError(
            f"torchao is {version}, FP8 needs {'.'.join(map(str, _OLDEST))} or newer: "
            "pip install -U -e '.[fp8]'."
        )
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"torchao {version} does not work with torch {torch.__version__} ({error}): "
            "pip install -U -e '.[fp8]'."
        ) from None
    if emulate:
        return
    if device.type != "cuda":
        raise ValueError(f"FP8 products need a GPU, the device is {device}: switch FP8 off.")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"{name} is sm_{capability[0]}{capability[1]}: FP8 products need sm_89 or newer (Ada, "
            "Hopper, Blackwell); switch FP8 off."
        )


def convert_blocks(
    blocks: nn.ModuleList,
    recipe: str,
    *,
    skip: Sequence[str] = (),
    fsdp_all_gather: bool = False,
    emulate: bool = False,
) -> None:
    """Let the linear layers of `blocks` compute in FP8; in place, parameter names unchanged.

    Apply it first: before tensor parallelism, whose hooks are on the layers that this replaces,
    activation checkpointing, compilation and data parallelism.

    Args:
        blocks: of a model, with float32 weights.
        recipe: "tensorwise" or "rowwise".
        skip: a layer whose name ("blocks.0.token_mixer.out_proj") contains one of these stays.
        fsdp_all_gather: under FSDP, weights are cast before they are gathered: a quarter of
            float32's bytes, half of bfloat16's. tensorwise only. Such weights must be sharded by
            FSDP before the first forward.
        emulate: compute in float32 on operands rounded to FP8, on any device: for tests.

    Raises:
        ValueError: an unknown recipe, fsdp_all_gather with rowwise, or no layer left to convert.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}: it must be one of {', '.join(RECIPES)}.")
    if fsdp_all_gather and recipe != "tensorwise":
        raise ValueError(
            f"recipe is {recipe!r}: weights are gathered in FP8 only with tensorwise scales; "
            "switch the FP8 all-gather off, or use tensorwise."
        )
    # Imported here: it is optional, and slow to import.
    from torchao.float8 import Float8GemmConfig, Float8LinearConfig, convert_to_float8_training

    found = dict(_wanted(blocks, skip))
    if not found:
        raise ValueError(f"no linear layer is left for FP8: each matches one of {tuple(skip)}.")
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe),
        # As in the forward: both sum over features, a few thousand of them. (grad_weight sums over
        # tokens, and many more.) TNL-1b, 32,768 tokens: a step of 310 ms takes 306.
        gemm_config_grad_input=Float8GemmConfig(use_fast_accum=True),
        emulate=emulate,
        enable_fsdp_float8_all_gather=fsdp_all_gather,
    )
    convert_to_float8_training(
        blocks, module_filter_fn=lambda module, name: f"blocks.{name}" in found, config=config
    )


def check_sizes(blocks: nn.ModuleList, skip: Sequence[str] = ()) -> None:
    """Raise ValueError if a rank's part of a layer that is for FP8 has sizes that FP8 cannot take.

    Apply it after tensor parallelism.

    Args:
        blocks, skip: as in `convert_blocks`.
    """
    for name, module in _wanted(blocks, skip):
        weight = module.weight
        rows, columns = (weight.to_local() if isinstance(weight, DTensor) else weight).shape
        if rows % MULTIPLE or columns % MULTIPLE:
            whole = tuple(weight.shape)
            part = f" (of {whole[0]} x {whole[1]})" if whole != (rows, columns) else ""
            raise ValueError(
                f"the weight of {name} has {rows} x {columns} values on a rank{part}: FP8 needs "
                f"multiples of {MULTIPLE}; change the model's sizes or the number of "
                "tensor-parallel ranks, or leave the layer out."
            )


def scales_in_one_reduction(model: nn.Module) -> None:
    """Compute the scales of all weights that are gathered in FP8, with one reduction over ranks.

    Call it whenever weights have changed: after each step of the optimizer, and after loading them.
    FSDP gathers with these scales. (Without them every weight asks the ranks for its scale each
    time it is gathered.)
    """
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def high_precision(tensor: Tensor) -> Tensor:
    """The float32 tensor inside torchao's wrapper of a weight that is gathered in FP8, sharing its
    memory; any other tensor unchanged."""
    # The wrapper's class is private to torchao, and is only there where torchao is.
    is_wrapped = hasattr(tensor, "fsdp_pre_all_gather")
    return tensor._tensor if is_wrapped else tensor  # type: ignore[attr-defined]


def _wanted(blocks: nn.ModuleList, skip: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers for FP8, by name."""
    for name, module in blocks.named_modules(prefix="blocks"):
        wanted = isinstance(module, nn.Linear) and getattr(module, "allows_float8", True)
        if wanted and not any(each in name for each in skip):
            yield name, module
