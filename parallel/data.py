"""Data parallelism: gradients summed over data-parallel and sequence ranks, weights whole or cut.

The loss of a rank is the sum over its tokens divided by the valid tokens of the whole job, so the
gradient of the job is the SUM over ranks. torch's engines would divide by the number of ranks; both
are told not to.

What the table of the LASP paper (arXiv 2404.02882) lists, and the settings that give it. "rs" is
`parallelism.fsdp_reshard_after_forward`, "every" `parallelism.fsdp_reduce_every_micro_batch`:

    paper        here                      cut over dp_shard x cp
    DDP          method ddp                nothing
    Legacy DDP   not served                (DDP, but reduced after the backward and not under it)
    ZeRO-1       fsdp, rs never            moments; gradients stay whole until the last micro-batch
    ZeRO-2       fsdp, rs never, every     moments and gradients
    FSDP         fsdp, rs always           moments and weights; gradients as under ZeRO-1
    ZeRO-3       fsdp, rs always, every    moments, gradients and weights

Without gradient accumulation "every" changes nothing: gradients are cut, block by block, during the
backward. With data_parallel_replicate_degree above 1, each row of fsdp becomes its hybrid (HSDP).
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
    """Cut the weights of `module` over `mesh` (FSDP2); gradients come back summed, and cut alike.

    A rank keeps its part of every weight, of its gradient and of the optimizer's state, in the
    weights' own dtype. A block's weights are gathered when the block is needed; the gather of the
    next one runs under it.

    Args:
        module: on its device, with the same weights on every rank; changed in place. A weight may
            be a DTensor already, cut over a tensor-parallel axis of the same root mesh.
        mesh: see `parallel.mesh.sharding_mesh`; of two dimensions, the first replicates.
        blocks: submodules that are gathered one at a time. What is outside them (embedding and
            head) stays gathered from its first use to the end of the backward, in its own dtype.
        exact: those of the blocks that are gathered in their weights' own dtype. (A submodule that
            is gathered by itself would break the graph of a compiled block.)
        param_dtype: dtype in which a block's weights are gathered; None: their own.
        reduce_dtype: dtype of the gradients on the wire.
        reshard_after_forward: drop a block's gathered weights after its forward and gather them
            again for its backward; False: keep them in between.
    """
    own_dtype = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    # Inputs keep their dtype: the residual stream is the model's business.
    compute = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    kept = {id(block) for block in exact}
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=own_dtype if id(block) in kept else compute,
            reshard_after_forward=reshard_after_forward,
        )
    fully_shard(module, mesh=mesh, mp_policy=own_dtype, reshard_after_forward=False)
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)
    return module


def reshard(module: nn.Module) -> None:
    """Drop what a forward without a backward has gathered. Nothing on a module that is not cut."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


@contextlib.contextmanager
def accumulate(
    module: nn.Module, *, last: bool, every: bool = False, keep_gathered: bool = False
) -> Iterator[None]:
    """Around the forward and backward of one micro-batch: only the last one communicates gradients.

    Args:
        module: what `replicate` or `shard` returned, or a module that is alone.
        last: whether this is the last micro-batch of the step.
        every: under `shard`, reduce at every micro-batch: more on the wire, and the sum of
            gradients is cut over ranks all the time.
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
    # The annotations are real types and not strings: DDP looks at them.
    group, reduce_dtype = state
    gradients = bucket.buffer()
    wire = gradients.to(reduce_dtype)
    future = dist.all_reduce(wire, group=group, async_op=True).get_future()

    def collect(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        summed = done.value()[0]
        return summed if summed is gradients else gradients.copy_(summed)

    return future.then(collect)
