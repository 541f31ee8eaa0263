"""A run over several ranks has the losses of one process, and its checkpoints fit any mesh."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launch import train
from launch.checkpoint import save_resume
from launch.checkpoint.pending import PendingSave
from launch.checkpoint.save_resume import finish_save, resume_run, start_save
from launch.checkpoint.shards import shard_of
from launch.checkpoint.store import CheckpointStore, verify
from launch.config import load_config
from launch.distributed import DistContext, get_rank_info
from launch.optimizer import optimizer_tensors
from launch.resolve import batching
from launch.trainer import step_indices, train_step
from parallel.mesh import build_mesh
from tests.distributed import Pool
from tests.launch.runs import PATIENCE, flags

FSDP = ["--parallelism.data_parallel_method", "fsdp"]
CP2, CP4 = ["--sp-size", "2"], ["--sp-size", "4"]
TP2 = ["--parallelism.tensor_parallel_degree", "2"]
SELECTIVE = ["--activation_checkpoint.mode", "selective"]
NEVER = ["--parallelism.fsdp_reshard_after_forward", "never"]
TWO_REPLICAS = ["--parallelism.data_parallel_replicate_degree", "2"]
# Of four ranks. (tests/parallel/test_grid.py has every mesh, with the other settings' defaults.)
SETTINGS = {"kept": [*FSDP, *NEVER], "selective": [*FSDP, *CP2, *SELECTIVE]}
STEPS = 5


@pytest.fixture(scope="module")
def pair():
    """Two processes that form a job of their own."""
    pool = Pool((2,))
    yield pool
    pool.stop()


def make_run(folder, *more):
    """A run before its first step, of this process alone or of all processes of its job."""
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
        comm__train_timeout_seconds=60,
    )
    config = load_config([*flags(**settings), *more])
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", 1)):
            patch.setenv(name, str(number))
        info = get_rank_info(config)
    ctx = DistContext(info, build_mesh(info.dims, "cpu") if size > 1 else None)
    return train.set_up(config, ctx, batching(config, info))


def full(tensors):
    """Full copies of tensors, sharded or not, by name."""
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for name, each in tensors.items()
    }


def train_here(folder, *more):
    """Gradients of the first step, losses of five, and the fraction of the weights on this rank."""
    state = make_run(folder, *more)
    series = [train_step(state).loss]
    parameters = dict(state.model.named_parameters())
    gradients = full({name: p.grad for name, p in parameters.items()})
    series += [train_step(state).loss for _ in range(STEPS - 1)]
    held = sum(shard_of(p, is_rank0=True).local.numel() for p in parameters.values())
    return gradients, series, held / state.model.config.num_parameters()


def train_settings(group, folder):
    return [train_here(folder, *more) for more in SETTINGS.values()]


def error(own, reference):
    assert own.keys() == reference.keys()
    return max(
        ((own[name] - each).abs().max() / each.abs().max()).item()
        for name, each in reference.items()
    )


def test_kept_weights_and_selective_checkpointing_train_as_one_process(pool, tmp_path):
    gradients, series, _ = train_here(tmp_path / "alone")
    for outcome in pool.run(train_settings, tmp_path / "ranks", size=4):
        for name, (own, losses, held) in zip(SETTINGS, outcome, strict=True):
            assert error(own, gradients) < 1e-5, name
            assert losses == pytest.approx(series, rel=1e-5), name
            assert held < 1.3 / 4, name


def timeouts_of_sharded_weights(group, folder):
    state = make_run(folder, *FSDP, *TWO_REPLICAS)
    state.ctx.set_timeout(17)
    groups = next(state.model.parameters()).device_mesh.get_all_groups()
    limits = [each._get_backend(state.ctx.device).options._timeout for each in groups]
    state.ctx.set_timeout(60)
    return [limit.total_seconds() for limit in limits]


def test_groups_that_gather_weights_have_the_timeout_of_the_job(pool, tmp_path):
    assert pool.run(timeouts_of_sharded_weights, tmp_path, size=4) == [[17.0, 17.0]] * 4


def full_models(group, folder):
    """On two ranks with half of the weights each: the weights, the model for the sample, the number
    of moments left, and the model if there is no room for it."""
    state = make_run(folder, *FSDP)
    train_step(state)
    expected, asked = full(state.model.state_dict()), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "has_room", lambda state: asked.append(1))
        none = train.full_model(state)
    model = train.full_model(state)
    weights = model and model.state_dict()
    return expected, weights, len(state.optimizer.state), none, asked


def test_rank_0_has_full_weights_for_the_sample(pair, tmp_path):
    first, second = pair.run(full_models, tmp_path, size=2)
    expected, weights, *_ = first
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert second[1] is None
    for *_, moments, none, _ in (first, second):
        assert moments == 0 and none is None
    # Only rank 0's GPU is asked.
    assert first[-1] == [1] and second[-1] == []


@pytest.mark.parametrize("spare", [-1, 0])
def test_no_sample_if_full_weights_do_not_fit(monkeypatch, capsys, tmp_path, spare):
    state = make_run(tmp_path)
    on_a_gpu = SimpleNamespace(
        config=state.config, model=state.model, ctx=SimpleNamespace(device=torch.device("cuda"))
    )
    needed = 4 * sum(p.numel() for p in state.model.parameters()) + (2 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed + spare, 1 << 40))
    assert train.has_room(on_a_gpu) is (spare == 0)
    said = capsys.readouterr().out
    expected = f"see launch/generate.py --checkpoint {tmp_path}/checkpoint"
    assert said == "" if spare == 0 else said.startswith("no sample: ") and expected in said


def save_here(folder, *more, steps=2):
    """The weights and moments that a run saves after some steps."""
    state = make_run(folder, *more)
    for _ in range(steps):
        train_step(state)
    start_save(state, background=False)
    assert finish_save(state)
    return state_of(state)


def state_of(state):
    moments = optimizer_tensors(state.model, state.optimizer)
    return full(state.model.state_dict()) | full(moments)


def go_on_here(folder, *more):
    """The state that a run resumes from, the samples of its next step, and the next losses."""
    state = make_run(folder, *more)
    found, _ = resume_run(state)
    assert found is not None
    tensors, samples = state_of(state), step_indices(state)
    return tensors, samples, [train_step(state).loss for _ in range(3)]


def save(group, *arguments):
    return save_here(*arguments)


def go_on(group, *arguments):
    return go_on_here(*arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses and samples of steps 3 to 5 of a run in one process."""
    state = make_run(tmp_path_factory.mktemp("undisturbed"))
    losses, samples = [], []
    for _ in range(STEPS):
        samples.append(step_indices(state))
        losses.append(train_step(state).loss)
    return samples[2], losses[2:]


def check(outcomes, saved, undisturbed):
    samples, losses = undisturbed
    for found, next_samples, series in outcomes:
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        assert next_samples == samples
        assert series == pytest.approx(losses, rel=1e-5)


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_on_four(pair, pool, tmp_path, undisturbed):
    saved = pair.run(save, tmp_path, *FSDP, size=2)[0]
    (path,) = (tmp_path / "checkpoint").iterdir()
    assert sorted(each.name for each in path.iterdir() if "model" in each.name) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    check([go_on_here(tmp_path)], saved, undisturbed)
    for more in ([*FSDP, *CP2], [*FSDP, *TWO_REPLICAS], []):
        check(pool.run(go_on, tmp_path, *more, size=4), saved, undisturbed)


def test_a_checkpoint_of_one_rank_resumes_on_two(pair, tmp_path, undisturbed):
    saved = save_here(tmp_path)
    (path,) = (tmp_path / "checkpoint").iterdir()
    assert (path / "model.safetensors").is_file()
    check(pair.run(go_on, tmp_path, *FSDP, *CP2, size=2), saved, undisturbed)


@pytest.mark.slow
def test_a_checkpoint_of_cp_4_resumes_with_cp_2(pair, pool, tmp_path, undisturbed):
    saved = pool.run(save, tmp_path, *FSDP, *CP4, size=4)[0]
    check(pair.run(go_on, tmp_path, *CP2, size=2), saved, undisturbed)


def test_checkpoints_resume_with_and_without_tensor_parallelism(pair, pool, tmp_path, undisturbed):
    saved = pair.run(save, tmp_path / "two", *TP2, size=2)[0]
    check([go_on_here(tmp_path / "two")], saved, undisturbed)
    # Sharded twice along the same rows: by tensor parallelism, then by FSDP.
    check(pool.run(go_on, tmp_path / "two", *FSDP, *TP2, size=4), saved, undisturbed)
    saved = pool.run(save, tmp_path / "four", *FSDP, *TP2, size=4)[0]
    check(pair.run(go_on, tmp_path / "four", *FSDP, size=2), saved, undisturbed)
    saved = save_here(tmp_path / "one")
    check(pool.run(go_on, tmp_path / "one", *CP2, *TP2, size=4), saved, undisturbed)


@pytest.mark.parametrize("change", ["missing", "flipped"])
def test_a_damaged_shard_is_refused_by_name(pair, tmp_path, change):
    pair.run(save, tmp_path, *FSDP, size=2)
    (path,) = (tmp_path / "checkpoint").iterdir()
    shard_path = path / "optimizer-00002-of-00002.safetensors"
    if change == "missing":
        shard_path.unlink()
    else:
        content = bytearray(shard_path.read_bytes())
        content[-3] ^= 4
        shard_path.write_bytes(content)
    with pytest.raises(ValueError, match=shard_path.name):
        verify(path)


def saved_in_the_background(group, folder):
    """Take two steps while one rank is still writing a checkpoint."""
    state = make_run(folder, *FSDP)
    train_step(state)
    expected, gate, write = state_of(state), threading.Event(), save_resume.write_shards
    with pytest.MonkeyPatch.context() as patch:
        if state.ctx.rank == 1:
            patch.setattr(save_resume, "write_shards", lambda *a: gate.wait(PATIENCE) and write(*a))
        start_save(state, background=True)
        through = [train_step(state).save_written for _ in range(2)]
        before = state.store.steps()
        gate.set()
        state.pending.wait()
        through.append(train_step(state).save_written)
        committed = finish_save(state)
    return through, before, committed, state.saved_step, expected


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


def save_on_a_full_disk(group, folder, background):
    state = make_run(folder, *FSDP)
    train_step(state)

    def full(*args):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if state.ctx.rank == 1:
            patch.setattr(save_resume, "write_shards", full)
        start_save(state, background=background)
        if background:
            train_step(state)
        saved = finish_save(state)
    left = sorted(path.name for path in state.store.folder.iterdir())
    dist.barrier()
    start_save(state, background=background)
    return saved, state.failed_saves, left, finish_save(state)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_of_one_rank_commits_nothing(pair, tmp_path, background):
    for outcome in pair.run(save_on_a_full_disk, tmp_path, background, size=2):
        assert outcome == (False, 1, [], True)
    assert len(CheckpointStore(tmp_path / "checkpoint").steps()) == 1


@pytest.mark.parametrize("background", [False, True])
def test_an_error_that_is_not_the_disks_is_raised(tmp_path, background):
    pending = PendingSave(1, tmp_path, lambda: 1 / 0, background)
    pending.wait()
    assert pending.is_done and "ZeroDivisionError" in pending.problem
    with pytest.raises(ZeroDivisionError):
        pending.raise_unexpected()
