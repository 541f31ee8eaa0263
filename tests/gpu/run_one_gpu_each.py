"""Under torchrun: the ring by processes that see one GPU each; every rank prints one JSON line.

Started by test_sequence_parallel.py. With hosts as its argument, one number per rank such as 0011,
ranks of different numbers take each other to be on another host.
"""

import json
import os
import sys
from unittest import mock

rank = int(os.environ["LOCAL_RANK"])
visible = os.environ.get("CUDA_VISIBLE_DEVICES")
# Before torch, which reads it once.
os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from lasp.exchange import hosts, symmetric_memory  # noqa: E402
from tests.lasp import sharded  # noqa: E402
from tests.lasp.sharded import LAYOUTS, Problem  # noqa: E402

PROBLEMS = [
    Problem(2000, "ring", layout, documents=documents, dtype=torch.float32)
    for layout in LAYOUTS
    for documents in (None, (0, 700, 700, 2000))
]


def main(places):
    assert torch.cuda.device_count() == 1
    dist.init_process_group("nccl")
    group = dist.group.WORLD
    place = hosts._host_number() + int(places[rank])
    with mock.patch.object(hosts, "_host_number", return_value=place):
        found = sharded.run_all(group, PROBLEMS)
    buffers = [each for each in symmetric_memory._buffers[group].values() if each is not None]
    with mock.patch("lasp.exchange.ring.find_buffer", return_value=None):
        by_message = sharded.run_all(group, PROBLEMS)
    error = max(
        float((now[name] - before[name]).abs().max() / before[name].abs().max().clamp_min(1e-30))
        for now, before in zip(found, by_message, strict=True)
        for name in before
        if before[name].numel()
    )
    ranks = [list(buffer.ranks) for buffer in buffers]
    print("report: " + json.dumps(dict(rank=rank, ranks=ranks, error=error)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
