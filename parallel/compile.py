"""torch.compile, block by block: the code between matrix products becomes a few fused kernels.

Blocks of one kind share their graphs, so a model of any depth compiles only a handful. The
attention operators and LRPE are opaque to the compiler, so a block has no graph break.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

__all__ = ["compile_blocks", "compiler_options", "eagerly", "fused"]

# The gradients of the keys and values of softmax layers are stacked. One kernel for both would
# branch at every element; for q, k, v and u it took more than twice the time of one kernel each.
_UNFUSE_CAT = ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs")


def compiler_options(*, precision_casts: bool = False) -> dict[str, int | bool]:
    """Options for torch.compile's default backend that suit a block.

    Args:
        precision_casts: round to 16 bits wherever eager code does, also inside a fused kernel.
    """
    from torch._inductor import config

    options: dict[str, int | bool] = dict.fromkeys(_UNFUSE_CAT, 0)
    options |= {"emulate_precision_casts": precision_casts}
    # Names change between versions of torch, and an unknown one is an error.
    return {name: value for name, value in options.items() if hasattr(config, name)}


def compile_blocks(
    blocks: Sequence[nn.Module],
    *,
    fullgraph: bool = False,
    backend: str = "inductor",
    precision_casts: bool = False,
) -> None:
    """Compile every block at its first call; in place, names unchanged.

    Apply it after tensor parallelism and activation checkpointing, and before data parallelism.

    Args:
        blocks: of a model.
        fullgraph: raise at a graph break instead of running part of a block eagerly.
        backend: of torch.compile.
        precision_casts: see `compiler_options`.
    """
    options = compiler_options(precision_casts=precision_casts) if backend == "inductor" else None
    _raise_recompile_limit()
    for block in blocks:
        block.compile(fullgraph=fullgraph, backend=backend, options=options)


@contextlib.contextmanager
def eagerly(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run compiled blocks uncompiled inside: for lengths that occur once, as in generation."""
    # set_stance imports torch.compile's machinery, which is slow.
    if not any(block._compiled_call_impl for block in blocks):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of a few tensors, in layers that cannot be compiled as a whole.

    Compiles it if its first argument is on a GPU. Inside a compiled block it is part of the block.
    Without gradients, one graph serves tensors that require them and tensors that do not.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        _raise_recompile_limit()
        return torch.compile(function, options={**compiler_options()})

    @functools.wraps(function)
    def call(x: torch.Tensor, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not _pays_to_compile(x):
            return function(x, *args)
        if not torch.is_grad_enabled():
            x = x.detach()
            args = tuple(each.detach() if torch.is_tensor(each) else each for each in args)
        return compiled()(x, *args)

    return call


def _raise_recompile_limit() -> None:
    # Blocks share one compiled function. Where sequences run in segments it has a variant for each
    # of: with and without LRPE, with gradients and without, the last block, a shorter last segment,
    # the first position. Beyond the limit (8 in torch), what was compiled runs uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)


def _pays_to_compile(x: torch.Tensor) -> bool:
    return x.is_cuda
