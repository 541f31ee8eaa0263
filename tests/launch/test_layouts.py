"""A run laid out over ranks: the losses of one process, and checkpoints that fit any layout."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launch import saving, train
from launch.checkpoint import CheckpointStore, verify
from launch.config import load_config
from launch.plan import batching
from launch.saving import PendingSave, find_checkpoint, finish_save, resume, start_save
from launch.step import step_indices, take_step
from launch.world import World, find_place
from parallel.mesh import build_mesh
from tests.distributed import Pool
from tests.launch.runs import flags

FSDP = ["--parallelism.data_parallel_method", "fsdp"]
CP2, CP4 = ["--sp-size", "2"], ["--sp-size", "4"]
TP2 = ["--parallelism.tensor_parallel_degree", "2"]
SELECTIVE = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.offload"]
NEVER = ["--parallelism.fsdp_reshard_after_forward", "never"]
TWO_REPLICAS = ["--parallelism.data_parallel_replicate_degree", "2"]
# Of four ranks: (ranks over which the weights are cut, flags).
LAYOUTS = {
    "ddp": (1, []),
    "fsdp": (4, [*FSDP, *NEVER]),
    "fsdp and sequence": (4, [*FSDP, *CP2, *SELECTIVE]),
    "sequence": (4, [*FSDP, *CP4]),
    "hybrid": (2, [*FSDP, *TWO_REPLICAS]),
}
STEPS = 5


@pytest.fixture(scope="module")
def pair():
    """Two processes that are a world of their own."""
    pool = Pool({2: (0, 1)})
    yield pool
    pool.stop()


def make_run(folder, *more):
    """A run before its first step: of this process alone, or of all processes of its world."""
    here = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
    settings = dict(
        job__dump_folder=folder,
        data__source="random",
        model__vocab_size=50,
        training__global_batch_size=8,
        training__max_norm=0.0,
        comm__backend="gloo",
        # As the pool's: checkpoints change the timeout and change it back.
        comm__train_timeout_seconds=30,
    )
    config = load_config([*flags(**settings), *more])
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", 1)):
            patch.setenv(name, str(number))
        place = find_place(config)
    world = World(place, build_mesh(place.dims, "cpu") if size > 1 else None)
    return train.set_up(config, world, batching(config, place))


def whole(tensors):
    """Plain copies of tensors, cut or not, by name."""
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for name, each in tensors.items()
    }


def train_here(folder, *more):
    """Gradients of the first step, losses of five, and the part of the weights that is here."""
    run = make_run(folder, *more)
    series = [take_step(run, False).loss]
    parameters = dict(run.model.named_parameters())
    gradients = whole({name: p.grad for name, p in parameters.items()})
    series += [take_step(run, False).loss for _ in range(STEPS - 1)]
    held = sum(saving.piece_of(p, is_first=True).local.numel() for p in parameters.values())
    return gradients, series, held / run.model.config.num_parameters()


def train_layouts(group, folder):
    return [train_here(folder, *more) for _, more in LAYOUTS.values()]


def error(mine, reference):
    assert mine.keys() == reference.keys()
    return max(
        ((mine[name] - each).abs().max() / each.abs().max()).item()
        for name, each in reference.items()
    )


def test_every_layout_trains_as_one_process(pool, tmp_path):
    gradients, series, _ = train_here(tmp_path / "alone")
    for outcome in pool.run(train_layouts, tmp_path / "ranks", size=4):
        for (name, (ranks, _)), (mine, losses, held) in zip(LAYOUTS.items(), outcome, strict=True):
            assert error(mine, gradients) < 1e-5, name
            assert losses == pytest.approx(series, rel=1e-5), name
            assert held < 1.3 / ranks, name


def timeouts_of_cut_weights(group, folder):
    run = make_run(folder, *FSDP, *TWO_REPLICAS)
    run.world.set_timeout(17)
    groups = next(run.model.parameters()).device_mesh.get_all_groups()
    limits = [each._get_backend(run.world.device).options._timeout for each in groups]
    run.world.set_timeout(30)
    return [limit.total_seconds() for limit in limits]


def test_groups_that_gather_weights_keep_the_time_of_the_job(pool, tmp_path):
    assert pool.run(timeouts_of_cut_weights, tmp_path, size=4) == [[17.0, 17.0]] * 4


def save_here(folder, *more, steps=2):
    """The weights and moments that a run saves after some steps."""
    run = make_run(folder, *more)
    for _ in range(steps):
        take_step(run, False)
    start_save(run, background=False)
    assert finish_save(run)
    return state_of(run)


def state_of(run):
    moments = saving.optimizer_tensors(run.model, run.optimizer)
    return whole(run.model.state_dict()) | whole(moments)


def go_on_here(folder, *more):
    """What a run finds there, the samples of its next step, and the losses that follow."""
    run = make_run(folder, *more)
    found, _ = find_checkpoint(run)
    resume(run, found)
    state, samples = state_of(run), step_indices(run)
    return state, samples, [take_step(run, False).loss for _ in range(3)]


def save(group, *arguments):
    return save_here(*arguments)


def go_on(group, *arguments):
    return go_on_here(*arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses and samples of steps 3 to 5 of a run in one process."""
    run = make_run(tmp_path_factory.mktemp("undisturbed"))
    losses, samples = [], []
    for _ in range(STEPS):
        samples.append(step_indices(run))
        losses.append(take_step(run, False).loss)
    return samples[2], losses[2:]


def check(outcomes, saved, undisturbed):
    samples, losses = undisturbed
    for found, next_samples, series in outcomes:
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert next_samples == samples
        assert series == pytest.approx(losses, rel=1e-5)


def test_two_ranks_to_one_and_to_four(pair, pool, tmp_path, undisturbed):
    saved = pair.run(save, tmp_path, *FSDP, size=2)[0]
    (path,) = (tmp_path / "checkpoint").iterdir()
    assert sorted(each.name for each in path.iterdir() if "model" in each.name) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    check([go_on_here(tmp_path)], saved, undisturbed)
    for more in ([*FSDP, *CP2], [*FSDP, *TWO_REPLICAS], []):
        check(pool.run(go_on, tmp_path, *more, size=4), saved, undisturbed)


def test_one_rank_to_two(pair, tmp_path, undisturbed):
    saved = save_here(tmp_path)
    (path,) = (tmp_path / "checkpoint").iterdir()
    assert (path / "model.safetensors").is_file()
    check(pair.run(go_on, tmp_path, *FSDP, *CP2, size=2), saved, undisturbed)


def test_a_sequence_over_four_to_a_sequence_over_two(pair, pool, tmp_path, undisturbed):
    saved = pool.run(save, tmp_path, *FSDP, *CP4, size=4)[0]
    check(pair.run(go_on, tmp_path, *CP2, size=2), saved, undisturbed)


def test_tensor_parallel_to_none_and_back(pair, pool, tmp_path, undisturbed):
    saved = pair.run(save, tmp_path / "two", *TP2, size=2)[0]
    check([go_on_here(tmp_path / "two")], saved, undisturbed)
    # Cut twice along the same rows: by tensor parallelism, then by FSDP.
    check(pool.run(go_on, tmp_path / "two", *FSDP, *TP2, size=4), saved, undisturbed)
    saved = pool.run(save, tmp_path / "four", *FSDP, *TP2, size=4)[0]
    check(pair.run(go_on, tmp_path / "four", *FSDP, size=2), saved, undisturbed)
    saved = save_here(tmp_path / "one")
    check(pool.run(go_on, tmp_path / "one", *CP2, *TP2, size=4), saved, undisturbed)


@pytest.mark.parametrize("change", ["missing", "flipped"])
def test_a_damaged_piece_is_refused_by_name(pair, tmp_path, change):
    pair.run(save, tmp_path, *FSDP, size=2)
    (path,) = (tmp_path / "checkpoint").iterdir()
    piece = path / "optimizer-00002-of-00002.safetensors"
    if change == "missing":
        piece.unlink()
    else:
        content = bytearray(piece.read_bytes())
        content[-3] ^= 4
        piece.write_bytes(content)
    with pytest.raises(ValueError, match=piece.name):
        verify(path)


def saved_in_the_background(group, folder):
    """Two steps under a write that one rank is slow with; what was seen."""
    run = make_run(folder, *FSDP)
    take_step(run, False)
    expected, gate, write = state_of(run), threading.Event(), saving.write_pieces
    with pytest.MonkeyPatch.context() as patch:
        if run.world.rank == 1:
            patch.setattr(saving, "write_pieces", lambda *a: gate.wait(30) and write(*a))
        start_save(run, background=True)
        through = [take_step(run, False).save_is_through for _ in range(2)]
        before = run.store.steps()
        gate.set()
        run.pending.wait()
        through.append(take_step(run, False).save_is_through)
        committed = finish_save(run)
    return through, before, committed, run.saved_step, expected


def test_training_goes_on_while_a_checkpoint_is_written(pair, tmp_path):
    outcomes = pair.run(saved_in_the_background, tmp_path, size=2)
    for through, before, committed, step, _ in outcomes:
        # All ranks learn of the slow one.
        assert (through, before, committed, step) == ([False, False, True], [], True, 1)
    found, _ = CheckpointStore(tmp_path / "checkpoint").find("must")
    stored = found.tensors("model") | found.tensors("optimizer")
    expected = outcomes[0][-1]
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def one_disk_is_full(group, folder, background):
    run = make_run(folder, *FSDP)
    take_step(run, False)

    def full(*args):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if run.world.rank == 1:
            patch.setattr(saving, "write_pieces", full)
        start_save(run, background=background)
        if background:
            take_step(run, False)
        saved = finish_save(run)
    left = sorted(path.name for path in run.store.folder.iterdir())
    dist.barrier()
    start_save(run, background=background)
    return saved, run.failed_saves, left, finish_save(run)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_of_one_rank_commits_nothing(pair, tmp_path, background):
    for outcome in pair.run(one_disk_is_full, tmp_path, background, size=2):
        assert outcome == (False, 1, [], True)
    assert len(CheckpointStore(tmp_path / "checkpoint").steps()) == 1


@pytest.mark.parametrize("background", [False, True])
def test_what_is_no_fault_of_the_disk_is_not_hidden(tmp_path, background):
    pending = PendingSave(1, tmp_path, lambda: 1 / 0, background)
    pending.wait()
    assert pending.is_through and "ZeroDivisionError" in pending.problem
    with pytest.raises(ZeroDivisionError):
        pending.raise_unexpected()
