"""Sharded tensors on disk are read back under any other sharding."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from launch.checkpoint.shards import TensorFiles, TensorShard, shard_of, write_shards

FULL = {
    "matrix": torch.arange(77.0).view(7, 11),
    "vector": torch.arange(5, dtype=torch.int64),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "half": torch.arange(12.0).view(3, 2, 2).bfloat16(),
}


def shards_of(tensor, parts, dim=0):
    """The shards that torch.chunk makes of a tensor; some may be empty."""
    chunks = list(tensor.chunk(parts, dim))
    starts = [0, *itertools.accumulate(chunk.shape[dim] for chunk in chunks)]
    for start, chunk in zip(starts, chunks, strict=False):
        offset = [0] * tensor.dim()
        offset[dim] = start
        yield TensorShard(chunk, tuple(tensor.shape), tuple(offset), True)


def write_sharded(folder, parts, dim):
    paths = [folder / f"{number}.safetensors" for number in range(parts)]
    files = [{} for _ in paths]
    for name, tensor in FULL.items():
        shards = shards_of(tensor, parts, min(dim, tensor.dim() - 1)) if tensor.dim() else ()
        for file, shard in zip(files, shards, strict=False):
            file[name] = shard
    files[0]["scalar"] = shard_of(FULL["scalar"], is_rank0=True)
    write_shards(dict(zip(paths, files, strict=True)))
    return paths


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_any_sharding_is_read_under_any_other(tmp_path, parts, dim):
    stored = TensorFiles(write_sharded(tmp_path, parts, dim))
    assert sorted(stored) == sorted(FULL)
    for name, tensor in FULL.items():
        assert (stored[name].shape, stored[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(stored[name][()], tensor)
        for wanted, along in itertools.product((2, 5), range(tensor.dim())):
            for shard in shards_of(tensor, wanted, along):
                assert torch.equal(stored[name][shard.region], shard.local)


def test_a_missing_shard_is_named(tmp_path):
    paths = write_sharded(tmp_path, 3, 0)
    with pytest.raises(ValueError, match="is incomplete: a shard of it is in no file"):
        TensorFiles(paths[:2])


def test_files_of_different_tensors_do_not_mix(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder, shape in (("a", (4, 3)), ("b", (4, 4))):
        first, second = shards_of(torch.zeros(shape), 2)
        path = tmp_path / folder
        write_shards({path / "1.safetensors": {"x": first}, path / "2.safetensors": {"x": second}})
    with pytest.raises(ValueError, match=r"x is .* \(4, 4\), elsewhere"):
        TensorFiles([tmp_path / "a" / "1.safetensors", tmp_path / "b" / "2.safetensors"])


def shards_of_layers(group):
    """Compare shards of FSDP over tensor parallelism with their regions of the full weight."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    found = []
    # Rows of which FSDP gets an odd number; columns; replicas.
    for placement, shape in ((Shard(0), (10, 3)), (Shard(1), (7, 6)), (Replicate(), (5, 4))):
        torch.manual_seed(0)
        layer = nn.Linear(*shape[::-1], bias=False)
        full = layer.weight.detach().clone()
        layer.weight = nn.Parameter(distribute_tensor(full, mesh["tp"], [placement]))
        fully_shard(layer, mesh=mesh["dp_shard"])
        shard = shard_of(layer.weight, is_rank0=False)
        assert torch.equal(shard.local, full[shard.region]), (placement, shard.offset)
        found.append((str(shard.region), shard.is_writer, shard.local.numel(), full.numel()))
    return found


def test_fsdp_over_tensor_parallelism_covers_a_weight_once(pool):
    ranks = pool.run(shards_of_layers, size=4)
    for each in zip(*ranks, strict=True):
        regions = {region for region, _, _, _ in each}
        written = [size for _, is_writer, size, _ in each if is_writer]
        assert sum(written) == each[0][-1], "every element is written once"
        assert len(written) == len(regions)


def replicated(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    tensor = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Replicate(), Shard(0)])
    plain = shard_of(torch.ones(2), is_rank0=dist.get_rank() == 0)
    shard = shard_of(tensor, is_rank0=False)
    return shard.is_writer, shard.offset, plain.is_writer


def test_one_of_several_replicas_writes(pool):
    outcomes = pool.run(replicated, size=4)
    assert [is_writer for is_writer, _, _ in outcomes] == [True, True, False, False]
    assert [offset for _, offset, _ in outcomes] == [(0, 0), (2, 0)] * 2
    assert [plain for _, _, plain in outcomes] == [True, False, False, False]
