"""Each setting of the config has its effect, observed from inside a step."""

import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import lasp
from launch import build, random_state, train
from launch.build import model_config
from launch.config import load_config
from launch.data import IGNORE
from launch.distributed import DistContext, RankInfo, get_rank_info
from launch.resolve import batching, describe
from launch.tokenizer import ByteTokenizer
from launch.trainer import forward_backward, step_indices, train_step, validate
from parallel.mesh import ParallelDims, build_mesh
from tests.launch.runs import arguments_here, flags, run_here, write_tokens

pytestmark = pytest.mark.usefixtures("one_process")
SEQ_LEN = 101


def make_run(folder, data, *more, **changes):
    """A run before its first step."""
    config = load_config(arguments_here(folder, data, *more, **changes))
    info = get_rank_info(config)
    return train.set_up(config, DistContext(info, None), batching(config, info))


def record_calls(monkeypatch, owner, name):
    """Record the keyword arguments of calls to `owner.name`, which still does its work."""
    calls, original = [], getattr(owner, name)

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


CUTS = [
    "parallelism.data_parallel_method",
    "parallelism.fsdp_reshard_after_forward",
    "parallelism.fsdp_reduce_every_micro_batch",
]
BY_TOKENS = "parallelism.tensor_parallel_shard_sequence"


@pytest.mark.parametrize(
    ("degrees", "idle"),
    [
        (dict(), f"{', '.join(CUTS)} (data parallelism shards no weights); {BY_TOKENS} (tp is 1)"),
        (
            dict(dp_replicate=2),
            f"{', '.join(CUTS)} (data parallelism shards no weights); {BY_TOKENS} (tp is 1)",
        ),
        (dict(cp=2), f"{BY_TOKENS} (tp is 1)"),
        (dict(tp=2), f"{', '.join(CUTS)} (data parallelism shards no weights)"),
        (dict(cp=2, tp=2), None),
    ],
    ids=str,
)
def test_settings_without_effect_on_a_mesh_are_listed(degrees, idle):
    """They are not refused: the same config may be meant for other meshes."""
    values = [[f"--{CUTS[0]}", "fsdp"], [f"--{CUTS[1]}", "never"], [f"--{CUTS[2]}"]]
    random_tokens = flags(data__source="random", training__global_batch_size=2)
    config = load_config([*random_tokens, *sum(values, []), f"--{BY_TOKENS}"])
    dims = ParallelDims(**degrees, world_size=math.prod(degrees.values()))
    info = RankInfo(0, 0, "gloo", torch.device("cpu"), dims)
    plan = describe(config, info, model_config(config, None), batching(config, info))
    lines = [line for line in plan.splitlines() if line.startswith("no effect:")]
    assert lines == ([] if idle is None else [f"no effect:   {idle}"])
    plain = load_config(random_tokens)
    plan = describe(plain, info, model_config(plain, None), batching(plain, info))
    assert "no effect" not in plan


@pytest.mark.parametrize("max_norm", [1e-4, 1e-2])
def test_max_norm_bounds_the_change_of_weights(tmp_path, data, max_norm):
    # With a large eps, Adam's step is proportional to the gradient.
    adam = dict(optimizer__eps=1.0, optimizer__lr=1.0, optimizer__weight_decay=0.0)
    rate = dict(lr_scheduler__warmup_steps=0, **adam)
    run = make_run(tmp_path, data, training__max_norm=max_norm, **rate)
    before = [p.detach().clone() for p in run.model.parameters()]
    outcome = train_step(run)
    pairs = zip(run.model.parameters(), before, strict=True)
    change = math.sqrt(sum((p - b).square().sum().item() for p, b in pairs))
    # The norm that is reported is that before clipping.
    assert outcome.grad_norm > 10 * max_norm
    assert 0.9 * max_norm < change < 1.001 * max_norm


@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_mixed_precision_is_what_the_model_sees(tmp_path, data, wanted):
    run = make_run(tmp_path, data, training__mixed_precision_param=wanted)
    seen = []
    linear = run.model.blocks[0].channel_mixer.w1
    linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    train_step(run)
    assert seen == [getattr(torch, wanted)] * run.batching.accumulation
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("enable", "wanted"), [(None, False), (False, False), (True, True)])
def test_compile_enable_compiles_blocks_and_loss(tmp_path, data, enable, wanted):
    flag = {} if enable is None else {"compile__enable": enable}
    run = make_run(tmp_path, data, **flag)
    assert all((block._compiled_call_impl is not None) == wanted for block in run.model.blocks)
    assert run.loss_model.compiled == wanted


def test_a_norm_below_the_limit_changes_no_bit(tmp_path, data):
    runs = {
        limit: make_run(tmp_path / str(limit), data, training__max_norm=limit)
        for limit in (0, 1e6, 1e-3)
    }
    norms = {limit: train_step(run).grad_norm for limit, run in runs.items()}
    assert norms[0] == norms[1e6] == norms[1e-3] > 1e-2
    free, below, clipped = ([p.grad for p in run.model.parameters()] for run in runs.values())
    assert all(map(torch.equal, free, below))
    assert torch.nn.utils.get_total_norm(clipped).item() == pytest.approx(1e-3, rel=1e-2)


def test_the_loss_gets_its_chunk_size_and_what_to_ignore(tmp_path, data, monkeypatch):
    calls = record_calls(monkeypatch, build, "chunked_cross_entropy")
    train_step(make_run(tmp_path, data, training__loss_chunk_size=17))
    options = {"ignore_index": IGNORE, "chunk_size": 17, "compiled": False, "per_token": False}
    assert calls == [options] * 4


def test_activation_checkpointing_has_the_configured_mode(tmp_path, data, monkeypatch):
    calls = []
    monkeypatch.setattr(build, "checkpoint_blocks", lambda *args: calls.append(args))
    run = make_run(tmp_path, data, activation_checkpoint__mode="selective")
    assert calls == [(run.model.blocks, "selective")]


def test_a_step_takes_its_gradients_from_forward_backward(tmp_path, data):
    """Another implementation can replace the trainer's."""
    run, other = make_run(tmp_path, data), make_run(tmp_path, data)
    calls = []

    def in_reverse(state, *, batches, num_labels):
        calls.append((len(batches), num_labels))
        return forward_backward(state, batches=batches[::-1], num_labels=num_labels)

    result = train_step(run, forward_backward=in_reverse)
    assert calls == [(4, 4 * SEQ_LEN)]
    assert result.loss == pytest.approx(train_step(other).loss, rel=1e-6)
    skipped = train_step(run, forward_backward=lambda state, **_: torch.tensor(torch.nan).double())
    assert skipped.loss is None and run.step == 1


def documents_by_hand(run, documents, samples):
    """Loss per token of documents that are run one by one."""
    stream = np.concatenate(documents)
    owner = np.repeat(np.arange(len(documents)), [len(each) for each in documents])
    total, count = 0.0, 0
    for sample in samples:
        span = slice(sample * SEQ_LEN, (sample + 1) * SEQ_LEN + 1)
        for document in np.unique(owner[span]):
            tokens = torch.from_numpy(stream[span][owner[span] == document])
            inputs, labels = tokens[:-1], tokens[1:].clone()
            labels[labels == ByteTokenizer.pad_id] = IGNORE
            # A single token at the sample's end is a label but no input.
            if len(inputs):
                logits = run.model(inputs[None])[0]
                total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
                count += int((labels != IGNORE).sum())
    return total.item() / count


def test_varlen_keeps_documents_apart(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    # The fourth document starts where the first sample ends, and holds padding.
    lengths = [30, 1, 70, 200, 60, 60, 200]
    documents = [generator.integers(0, 256, length) for length in lengths]
    documents[3][5:9] = ByteTokenizer.pad_id
    data = write_tokens(tmp_path / "data", documents)
    run = make_run(tmp_path / "out", data, "--training.varlen", training__global_batch_size=6)
    samples = step_indices(run)
    assert sorted(samples) == list(range(6))
    with torch.no_grad():
        expected = documents_by_hand(run, documents, samples)
    calls = record_calls(monkeypatch, lasp, "lightning_attention")
    assert train_step(run).loss == pytest.approx(expected, rel=1e-5)
    starts = np.cumsum([0, *lengths])
    for sample, call in zip(np.repeat(samples, 2), calls, strict=True):
        inside = starts - sample * SEQ_LEN
        inside = inside[(inside > 0) & (inside < SEQ_LEN)].tolist()
        assert call["cu_seqlens"].tolist() == [0, *inside, SEQ_LEN]


def test_random_states_are_restored():
    device = torch.device("cpu")
    random.seed(1)
    torch.manual_seed(1)
    states = [random_state.capture(device)]
    drawn = random.random(), torch.rand(3).tolist()
    assert (random.random(), torch.rand(3).tolist()) != drawn
    for rank, ranks in ((0, 1), (3, 4)):
        random_state.restore(states, rank, ranks, device)
        assert (random.random(), torch.rand(3).tolist()) == drawn


def test_the_long_timeout_ends_with_the_first_step(tmp_path, data, monkeypatch):
    seen = []
    monkeypatch.setattr(DistContext, "set_timeout", lambda self, seconds: seen.append(seconds))
    times = dict(comm__train_timeout_seconds=7, comm__init_timeout_seconds=9, training__steps=2)
    quiet = ["--checkpoint.no-enable", "--validation.no-enable", "--sample.no-enable"]
    assert run_here(tmp_path, data, *quiet, **times) == 0
    assert seen == [7]


CP2 = dict(parallelism__context_parallel_degree=2, parallelism__context_parallel_method="doubling")


def on_four_ranks(group, folder):
    """Dtypes in which gradients are reduced, exchanges, and the validation loss."""
    rank, dims = dist.get_rank(), ParallelDims.resolve(4, cp=2)
    info = RankInfo(rank, rank, "gloo", torch.device("cpu"), dims)
    changes = dict(data__source="random", model__vocab_size=50, job__dump_folder=folder)
    more = dict(training__mixed_precision_reduce="bfloat16", validation__steps=3)
    config = load_config(flags(**changes, **more, **CP2))
    ctx = DistContext(info, build_mesh(dims, "cpu"))
    run = train.set_up(config, ctx, batching(config, info))
    held_out = validate(run)

    dtypes, reduce = set(), dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        if kwargs.get("async_op"):
            dtypes.add(tensor.dtype)
        return reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        calls = record_calls(patch, lasp, "lightning_attention")
        train_step(run)
    return dtypes, {call["exchange"] for call in calls}, held_out


def test_gradient_dtype_exchange_and_validation_over_ranks(pool, tmp_path):
    random_tokens = dict(data__source="random", model__vocab_size=50, validation__steps=3)
    expected = validate(make_run(tmp_path / "alone", tmp_path, **random_tokens))
    for dtypes, exchanges, held_out in pool.run(on_four_ranks, str(tmp_path / "ranks"), size=4):
        assert dtypes == {torch.bfloat16}
        assert exchanges == {"doubling"}
        assert held_out == pytest.approx(expected, rel=1e-6)
