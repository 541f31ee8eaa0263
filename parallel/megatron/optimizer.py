"""Float32 parameters in the checkpoints of Megatron's optimizer of bfloat16 models."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

__all__ = ["save_float32_parameters"]


def save_float32_parameters() -> None:
    """Let Megatron's optimizer write float32 parameters of a 16-bit model to sharded checkpoints.

    Without this, megatron-core 0.16 to 0.19 raises "Param id 17 does not match any model sharded
    param": it counts the 16-bit parameters alone, where the optimizer inside counts all. Patches
    the optimizer's class, so that during sharded_state_dict, and load_state_dict of its result, a
    float32 parameter is its own float32 copy. Models without such parameters, and the plain
    state_dict, are not affected.
    """
    kind = Float16OptimizerWithFloat16Params
    if getattr(kind, "lasp_saves_float32_parameters", False):
        return
    kind.lasp_saves_float32_parameters = True
    sharded_state_dict, load_state_dict = kind.sharded_state_dict, kind.load_state_dict

    @functools.wraps(sharded_state_dict)
    def save(self: Float16OptimizerWithFloat16Params, *args: Any, **kwargs: Any) -> Any:
        with _all_parameters(self):
            return sharded_state_dict(self, *args, **kwargs)

    @functools.wraps(load_state_dict)
    def load(self: Float16OptimizerWithFloat16Params, state_dict: dict[str, Any]) -> Any:
        # A plain state_dict has no copies of float32 parameters.
        saved = [len(group) for group in state_dict.get("fp32_from_fp16_params", ())]
        has_all = saved == [len(group["params"]) for group in self.optimizer.param_groups]
        with _all_parameters(self) if has_all else contextlib.nullcontext():
            return load_state_dict(self, state_dict)

    kind.sharded_state_dict, kind.load_state_dict = save, load


@contextlib.contextmanager
def _all_parameters(optimizer: Float16OptimizerWithFloat16Params) -> Iterator[None]:
    """Inside, the optimizer's groups of 16-bit parameters and of their float32 copies also hold
    the float32 parameters, in the order of the optimizer inside."""
    if optimizer.is_stub_optimizer or not any(optimizer.fp32_from_fp32_groups):
        yield
        return
    before = optimizer.float16_groups, optimizer.fp32_from_float16_groups
    of_copy = {
        id(copy): parameter
        for parameters, copies in zip(*before, strict=True)
        for parameter, copy in zip(parameters, copies, strict=True)
    }
    copies = [group["params"] for group in optimizer.optimizer.param_groups]
    parameters = [[of_copy.get(id(copy), copy) for copy in group] for group in copies]
    optimizer.float16_groups, optimizer.fp32_from_float16_groups = parameters, copies
    try:
        yield
    finally:
        optimizer.float16_groups, optimizer.fp32_from_float16_groups = before
