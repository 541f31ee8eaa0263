"""Data parallelism: gradients summed over data-parallel and cp ranks; weights full or sharded.

The loss of a rank is the sum over its tokens divided by the valid tokens of the whole job, so the
gradient of the job is the SUM over ranks. DDP and FSDP would divide by the number of ranks; that
averaging is disabled in both.

The rows of the LASP paper's table (arXiv 2404.02882) and the settings for them. "rs" is
`parallelism.fsdp_reshard_after_forward`, "every" `parallelism.fsdp_reduce_every_micro_batch`:

    paper        here                      sharded over dp_shard x cp
    DDP          method ddp                nothing
    Legacy DDP   not supported             (DDP that reduces after the backward, not under it)
    ZeRO-1       fsdp, rs never            moments; gradients are full until the last micro-batch
    ZeRO-2       fsdp, rs never, every     moments and gradients
    FSDP         fsdp, rs always           moments and weights; gradients as under ZeRO-1
    ZeRO-3       fsdp, rs always, every    moments, gradients and weights

Without gradient accumulation "every" changes nothing: gradients are sharded block by block during
the backward. With data_parallel_replicate_degree above 1, each fsdp row is its hybrid (HSDP).
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

__all__ = ["accumulate", "replicate", "reshard", "shard"]


def replicate(
    module: nn.Module, group: ProcessGroup, *, reduce_dtype: torch.dtype = torch.float32
) -> DistributedDataParallel:
    """Wrap `module` so that its gradients are summed over `group` at the end of the backward.

    Args:
        module: on its device; the weights of the group's first rank are copied to the others.
        group: dp_replicate x dp_shard x cp, see `parallel.mesh.gradient_group`.
        reduce_dtype: dtype in which gradients are sent.
    """
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; 2.11 has only this name.
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


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: Iterable[nn.Module],
    exact: Iterable[nn.Module] = (),
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> FSDPModule:
    """Shard the weights of `module` over `mesh` (FSDP2); gradients are summed, and sharded alike.

    A rank keeps its shard of every weight, gradient and optimizer state in the weight's own dtype.
    A block's weights are gathered when the block runs, under the computation of the block before.

    Args:
        module: on its device, with the same weights on every rank; changed in place. A weight may
            already be a DTensor, sharded over a tensor-parallel axis of the same root mesh.
        mesh: see `parallel.mesh.sharding_mesh`; of two dimensions, the first replicates.
        blocks: submodules that are gathered one at a time. The rest (embedding and head) stays
            gathered from its first use to the end of the backward, in its own dtype.
        exact: the blocks that are gathered in their weights' own dtype. (Wrapping a submodule of a
            block instead would break the graph of a compiled block.)
        param_dtype: dtype in which the other blocks are gathered; None: their own.
        reduce_dtype: dtype in which gradients are sent.
        reshard_after_forward: drop a block's gathered weights after its forward and gather them
            again for its backward; False: keep them in between.
    """
    own_dtype = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    # The model decides the dtype of the residual stream, so inputs are not cast.
    compute = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    exact = set(exact)
    for block in blocks:
        policy = own_dtype if block in exact else compute
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(module, mesh=mesh, mp_policy=own_dtype, reshard_after_forward=False)
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)
    return module


def reshard(module: nn.Module) -> None:
    """Drop weights left gathered by a forward without a backward. No-op on an unsharded module."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


@contextlib.contextmanager
def accumulate(
    module: nn.Module, *, last: bool, every: bool = False, keep_gathered: bool = False
) -> Iterator[None]:
    """Around the forward and backward of one micro-batch: only the last one communicates gradients.

    Args:
        module: what `replicate` or `shard` returned, or a module on a single device.
        last: True for the last micro-batch of the step.
        every: under `shard`, reduce in every micro-batch: more communication, but the accumulated
            gradients are always sharded.
        keep_gathered: under `shard`, keep weights gathered from one micro-batch to the next.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or every)
        module.set_is_last_backward(last)
        module.set_reshard_after_backward(last or not keep_gathered)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def _sum_gradients(
    state: tuple[ProcessGroup, torch.dtype], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    # The annotations are types, not strings: DDP checks them.
    group, reduce_dtype = state
    gradients = bucket.buffer()
    message = gradients.to(reduce_dtype)
    future = dist.all_reduce(message, group=group, async_op=True).get_future()

    def copy_back(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        summed = done.value()[0]
        return summed if summed is gradients else gradients.copy_(summed)

    return future.then(copy_back)
