"""torch.compile, block by block: what stands between matrix products becomes few fused kernels.

Blocks of one kind share their graphs, so that a model of any depth compiles a handful. The operator
and LRPE are opaque to the compiler, so that a block has no graph break.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

__all__ = ["compile_blocks", "compiler_options", "eagerly"]

# The gradients of q, k, v, u meet in one tensor. One kernel for all four would ask at every element
# which of them it is, at more than twice the time of a kernel for each.
_ONE_KERNEL_PER_PART = ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs")


def compiler_options() -> dict[str, int]:
    """Options of torch.compile's default backend for a block."""
    from torch._inductor import config

    # Names change between versions of torch, and an unknown one is an error.
    return {name: 0 for name in _ONE_KERNEL_PER_PART if hasattr(config, name)}


def compile_blocks(
    blocks: Sequence[nn.Module], *, fullgraph: bool = False, backend: str = "inductor"
) -> None:
    """Compile every block at its first call; the same modules, same names.

    Apply it after tensor parallelism and recomputation, and before data parallelism.

    Args:
        blocks: of a model.
        fullgraph: raise at a graph break instead of running part of a block eagerly.
        backend: torch.compile's, which turns graphs into kernels.
    """
    for block in blocks:
        options = compiler_options() if backend == "inductor" else None
        block.compile(fullgraph=fullgraph, backend=backend, options=options)


@contextlib.contextmanager
def eagerly(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run compiled blocks as they were, in there: for lengths that come once, as in generation."""
    # Only torch.compile itself needs its machinery, which is slow to import.
    if not any(block._compiled_call_impl for block in blocks):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
