"""Pieces of tensors on disk: cut one way, read another."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from launch.pieces import Piece, TensorFiles, piece_of, write_pieces

WHOLE = {
    "matrix": torch.arange(77.0).view(7, 11),
    "vector": torch.arange(5, dtype=torch.int64),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "half": torch.arange(12.0).view(3, 2, 2).bfloat16(),
}


def cut(tensor, parts, dim=0):
    """A tensor as torch.chunk cuts it, as pieces; some parts may be empty."""
    chunks = list(tensor.chunk(parts, dim))
    starts = [0, *itertools.accumulate(chunk.shape[dim] for chunk in chunks)]
    for start, chunk in zip(starts, chunks, strict=False):
        offset = [0] * tensor.dim()
        offset[dim] = start
        yield Piece(chunk, tuple(tensor.shape), tuple(offset), True)


def write_cut(folder, parts, dim):
    paths = [folder / f"{number}.safetensors" for number in range(parts)]
    files = [{} for _ in paths]
    for name, tensor in WHOLE.items():
        pieces = cut(tensor, parts, min(dim, tensor.dim() - 1)) if tensor.dim() else ()
        for file, piece in zip(files, pieces, strict=False):
            file[name] = piece
    files[0]["scalar"] = piece_of(WHOLE["scalar"], is_first=True)
    for path, pieces in zip(paths, files, strict=True):
        write_pieces(path, pieces)
    return paths


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_any_cut_is_read_by_any_other(tmp_path, parts, dim):
    stored = TensorFiles(write_cut(tmp_path, parts, dim))
    assert sorted(stored) == sorted(WHOLE)
    for name, tensor in WHOLE.items():
        assert (stored[name].shape, stored[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(stored[name][()], tensor)
        for wanted, along in itertools.product((2, 5), range(tensor.dim())):
            for piece in cut(tensor, wanted, along):
                assert torch.equal(stored[name][piece.region], piece.local)


def test_a_piece_that_is_missing_is_named(tmp_path):
    paths = write_cut(tmp_path, 3, 0)
    with pytest.raises(ValueError, match="is not whole: a piece of it is in no file"):
        TensorFiles(paths[:2])


def test_files_of_different_tensors_do_not_mix(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder, shape in (("a", (4, 3)), ("b", (4, 4))):
        first, second = cut(torch.zeros(shape), 2)
        write_pieces(tmp_path / folder / "1.safetensors", {"x": first})
        write_pieces(tmp_path / folder / "2.safetensors", {"x": second})
    with pytest.raises(ValueError, match=r"x is .* \(4, 4\), elsewhere"):
        TensorFiles([tmp_path / "a" / "1.safetensors", tmp_path / "b" / "2.safetensors"])


def pieces_of_layers(group):
    """What FSDP over tensor parallelism holds, against the same region of the whole weight."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    found = []
    # Rows that two tensor ranks divide, and their halves not; columns; a copy on each.
    for placement, shape in ((Shard(0), (10, 3)), (Shard(1), (7, 6)), (Replicate(), (5, 4))):
        torch.manual_seed(0)
        layer = nn.Linear(*shape[::-1], bias=False)
        whole = layer.weight.detach().clone()
        layer.weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [placement]))
        fully_shard(layer, mesh=mesh["dp_shard"])
        piece = piece_of(layer.weight, is_first=False)
        assert torch.equal(piece.local, whole[piece.region]), (placement, piece.offset)
        found.append((str(piece.region), piece.mine, piece.local.numel(), whole.numel()))
    return found


def test_two_cuts_of_one_weight_make_it_whole(pool):
    ranks = pool.run(pieces_of_layers, size=4)
    for each in zip(*ranks, strict=True):
        regions = {region for region, _, _, _ in each}
        written = [size for _, mine, size, _ in each if mine]
        assert sum(written) == each[0][-1], "every element is written once"
        assert len(written) == len(regions)


def replicas(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    tensor = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Replicate(), Shard(0)])
    plain = piece_of(torch.ones(2), is_first=dist.get_rank() == 0)
    piece = piece_of(tensor, is_first=False)
    return piece.mine, piece.offset, plain.mine


def test_of_replicas_one_writes(pool):
    outcomes = pool.run(replicas, size=4)
    assert [mine for mine, _, _ in outcomes] == [True, True, False, False]
    assert [offset for _, offset, _ in outcomes] == [(0, 0), (2, 0)] * 2
    assert [plain for _, _, plain in outcomes] == [True, False, False, False]
