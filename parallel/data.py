"""Data parallelism: replicas whose gradients are summed over data-parallel and sequence ranks.

The loss of a rank is the sum over its tokens divided by the valid tokens of the whole job, so the
gradient of the job is the SUM over ranks. `DistributedDataParallel` divides by the number of ranks
unless a communication hook says otherwise; the hook below does.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

__all__ = ["accumulate", "replicate"]


def replicate(
    module: nn.Module, group: ProcessGroup, *, reduce_dtype: torch.dtype = torch.float32
) -> DistributedDataParallel:
    """Wrap `module` so that its gradients are summed over `group` at the end of the backward.

    Args:
        module: on its device; the weights of the group's first rank are copied to the others.
        group: dp_replicate x dp_shard x cp, see `parallel.mesh.gradient_group`.
        reduce_dtype: dtype of the gradients on the wire.
    """
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; 2.11 knows no other name.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            process_group=group,
            # Buffers are decay rates, the same on every rank by construction.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    wrapped.register_comm_hook((group, reduce_dtype), _sum_gradients)
    return wrapped


@contextlib.contextmanager
def accumulate(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Around the forward and backward of one micro-batch: only the last one communicates."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def _sum_gradients(
    state: tuple[ProcessGroup, torch.dtype], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    # The annotations are real types and not strings: DDP looks at them.
    group, reduce_dtype = state
    gradients = bucket.buffer()
    wire = gradients.to(reduce_dtype)
    future = dist.all_reduce(wire, group=group, async_op=True).get_future()

    def collect(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        summed = done.value()[0]
        return summed if summed is gradients else gradients.copy_(summed)

    return future.then(collect)
