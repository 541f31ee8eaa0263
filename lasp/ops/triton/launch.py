"""Launches that cost the host little.

`kernel[grid](...)` looks at each of some forty arguments on every call, to find the compiled
variant they need: about 55 us. All but the addresses follow from shapes and strides, which repeat
from call to call, so the variant is looked up once per shape and then run directly.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
import triton

__all__ = ["Bound"]

_runtime = triton.knobs.runtime


class Bound:
    """A kernel with all its arguments fixed but the first ones: `leading` ones, then tensors.

    A variant is compiled for `numbers`, `constants`, the tensors' dtypes and which of them are
    None: all that one `Bound` is made for. It is also compiled for whether each address is a
    multiple of 16 bytes, which is looked at on every call. A `Bound` launches what the plain
    `kernel[grid](...)` would, and does just that wherever this Triton, this device or a hook leaves
    it no other way.
    """

    def __init__(self, kernel: Any, numbers: Iterable[int | float], constants: dict, **options):
        self._kernel = kernel
        self._numbers = tuple(numbers)
        self._named = constants | options
        # A compiled kernel is handed its constants too, and reads none of them.
        self._tail = (*self._numbers, *constants.values())
        # No interpreter, and no AMD GPU: there a variant depends on the tensors' sizes too.
        jit = isinstance(kernel, triton.runtime.jit.JITFunction)
        self._direct = jit and torch.version.hip is None
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, programs: int, *tensors: torch.Tensor | None, leading=()) -> None:
        """Run `programs` programs on the current device, the first tensor's, and current stream.

        `leading` are descriptors or numbers; all that a variant knows of them must be fixed.
        """
        if not self._direct or _is_watched(self._kernel):
            self._launch(programs, leading, tensors)
            return
        device = tensors[0].get_device()
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        odd = functools.reduce(operator.or_, addresses) % 16
        # Nearly always all are aligned.
        key = (device, *[address % 16 == 0 for address in addresses]) if odd else device
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._launch(programs, leading, tensors)
            if all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
                self._compiled[key] = compiled
            return
        compiled.run(
            *(programs, 1, 1),
            triton.runtime.driver.active.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            *(None, None, None),  # What hooks would get, and the two hooks.
            *leading,
            *addresses,
            *self._tail,
        )

    def _launch(self, programs: int, leading: tuple, tensors: tuple) -> Any:
        return self._kernel[(programs,)](*leading, *tensors, *self._numbers, **self._named)


def _is_watched(kernel: Any) -> bool:
    """Whether a profiler or a hook wants to see the launch."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    # A chain of hooks, or a single one put in its place.
    return bool(
        kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    )
