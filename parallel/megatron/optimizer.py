"""Float32 parameters in the checkpoints of Megatron's optimizer of bfloat16 models."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

__all__ = ["save_float32_parameters"]


def save_float32_parameters() -> None:
    """Let Megatron save and load the optimizer of a model that keeps a few parameters in float32.

    It trains such a model, but raises "Param id 17 does not match any model sharded param" when it
    saves (megatron-core 0.16 to 0.19): it numbers the parameters of 16 bits alone, where the
    optimizer inside numbers all. While it saves and loads, a float32 parameter is its own float32
    copy here. Other models are not affected.
    """
    for name in ("sharded_state_dict", "load_state_dict"):
        method = getattr(Float16OptimizerWithFloat16Params, name)
        if not hasattr(method, "__wrapped__"):
            setattr(Float16OptimizerWithFloat16Params, name, _with_float32(method))


def _with_float32(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self: Float16OptimizerWithFloat16Params, *args: Any, **kwargs: Any) -> Any:
        with _all_parameters(self):
            return method(self, *args, **kwargs)

    return call


@contextlib.contextmanager
def _all_parameters(optimizer: Float16OptimizerWithFloat16Params) -> Iterator[None]:
    """Inside, its groups of 16-bit parameters and of float32 copies have the others too."""
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
