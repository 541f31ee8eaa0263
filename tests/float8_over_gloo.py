"""FSDP that gathers FP8 weights, over gloo."""

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives


def bytes_over_gloo(patch):
    """Let FSDP gather FP8 as bytes: gloo cannot send FP8, NCCL can."""
    original = _fsdp_collectives.DefaultAllGather.__call__

    def call(self, output_tensor, input_tensor, group, async_op=False):
        output_tensor, input_tensor = (
            each.view(torch.uint8) if each.itemsize == 1 else each
            for each in (output_tensor, input_tensor)
        )
        return original(self, output_tensor, input_tensor, group, async_op)

    patch.setattr(_fsdp_collectives.DefaultAllGather, "__call__", call)
