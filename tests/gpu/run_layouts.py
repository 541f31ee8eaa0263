"""Under torchrun: the same short run in many layouts, one after the other; prints one JSON line.

Started by test_layouts.py, with the folder for checkpoints as its argument. One process per GPU
serves all layouts, for starting it takes longer than all of them.
"""

import functools
import json
import os
import sys
from unittest import mock

import torch
import torch.distributed as dist

from launch.checkpoint.save_resume import finish_save, resume_run, start_save
from launch.config import load_config
from launch.distributed import DistContext, get_rank_info
from launch.resolve import batching
from launch.train import set_up
from launch.trainer import train_step
from parallel.mesh import build_mesh

STEPS = 4
FSDP = ["--parallelism.data_parallel_method", "fsdp"]
SEQUENCE = ["--sp-size", "2"]
FULL = ["--activation_checkpoint.mode", "full"]
TENSOR = ["--parallelism.tensor_parallel_degree", "2"]
LAYOUTS = {
    "ddp": [],
    "ring": SEQUENCE,
    "fsdp": FSDP,
    "fsdp, kept": [*FSDP, "--parallelism.fsdp_reshard_after_forward", "never"],
    "fsdp, ring": [*FSDP, *SEQUENCE, *FULL],
    "fsdp, ring, compiled": [*FSDP, *SEQUENCE, *FULL, "--compile.enable", "True"],
    "tensor": TENSOR,
}


@functools.cache
def mesh_of(dims):
    """One for all runs of a layout: communicators take their time to set up."""
    return build_mesh(dims, "cuda")


def make_run(folder, *more, alone=False):
    if alone:
        # A folder has one owner.
        folder = f"{folder}/alone-{dist.get_rank()}"
    flags = ["--data.source", "random", "--training.seq_len", "4001", "--model.dim", "256"]
    flags += ["--training.global_batch_size", "2", "--job.dump_folder", folder]
    flags += ["--checkpoint.interval", "1000", "--compile.enable", "False", *more]
    config = load_config(flags)
    here = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1"} if alone else {}
    with mock.patch.dict(os.environ, here):
        info = get_rank_info(config)
    mesh = None if alone else mesh_of(info.dims)
    return set_up(config, DistContext(info, mesh), batching(config, info))


def losses(run, steps=STEPS):
    return [train_step(run).loss for _ in range(steps)]


def saved_and_resumed(folder):
    """Losses of steps 3 and 4 after a save in the background, by FSDP ranks and by tensor ranks."""
    run = make_run(folder, *FSDP)
    losses(run, 2)
    start_save(run, background=True)
    went_on = losses(run, 2)
    assert finish_save(run)
    other = make_run(folder, *TENSOR)
    found, _ = resume_run(other)
    assert found is not None
    return went_on, losses(other, 2)


def main(folder):
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    wide = ["--training.mixed_precision_param", "float32"]
    report = {
        "alone": losses(make_run(folder, alone=True)),
        "float32": [
            losses(make_run(folder, *wide, alone=True)),
            losses(make_run(folder, *wide, *FSDP, *SEQUENCE)),
        ],
        "layouts": {name: losses(make_run(folder, *more)) for name, more in LAYOUTS.items()},
        "saved": saved_and_resumed(folder),
    }
    if dist.get_rank() == 0:
        print("report: " + json.dumps(report), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
