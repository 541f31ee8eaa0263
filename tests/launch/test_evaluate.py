"""launch/evaluate.py --task loss: the trainer's validation loss, each token once, by position."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch import evaluate
from launch.checkpoint.store import CheckpointStore, open_checkpoint
from launch.distributed import DistContext, get_rank_info
from launch.evaluation import report
from launch.evaluation.loss import PositionLosses
from launch.exit_codes import CheckpointError, RemoteRankError, UserError
from launch.generate import load_model
from launch.tokenizer import train_bpe
from parallel.mesh import build_mesh
from tests.distributed import Pool
from tests.launch.runs import (
    MICRO,
    as_one_process,
    output_of,
    records,
    run_here,
    save_tensors,
    start,
    write_tokens,
)

LENGTH = MICRO["training.seq_len"]
# Those that the trainer validates on.
SAMPLES = MICRO["validation.steps"] * MICRO["training.global_batch_size"]
pytestmark = pytest.mark.usefixtures("one_process")
KINDS = {
    "linear": {},
    "varlen": {"training__varlen": None},
    "hybrid": {"model__layer_types": "LS", "training__seq_len": 102},
}


@pytest.fixture(scope="module")
def pair():
    """Two processes that form a job of their own."""
    pool = Pool((2,))
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """{kind: (folder, the trainer's last validation loss)}."""
    found = {}
    with as_one_process():
        for kind, changes in KINDS.items():
            folder = tmp_path_factory.mktemp(kind)
            quiet = ["--sample.no-enable"]
            assert run_here(folder, data, *quiet, **(changes | dict(training__steps=4))) == 0
            found[kind] = folder / "checkpoint", records(folder)[-1]["val_loss"]
    return found


def evaluate_here(checkpoint, data, output, *more):
    """The results of an evaluation in this process."""
    line = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(output), *more]
    assert evaluate.main(line) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("linear", []),
        ("linear", ["--segment-len", "9", "--batch-size", "3"]),
        ("varlen", []),
        ("varlen", ["--segment-len", "50"]),
        ("hybrid", ["--batch-size", "5"]),
    ],
)
def test_the_loss_is_the_trainers_validation_loss(runs, data, tmp_path, kind, more):
    checkpoint, expected = runs[kind]
    output = tmp_path / "new" / "results.json"
    found = evaluate_here(checkpoint, data, output, "--max-samples", str(SAMPLES), *more)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["ppl"] == pytest.approx(math.exp(expected), rel=1e-5)
    # Bytes per token are a little below one: ends of documents have none.
    assert expected / math.log(2) < found["bpb"] < 1.01 * expected / math.log(2)
    assert found["step"] == 4 and found["samples"] == SAMPLES < found["samples_in_data"]
    rows = found["loss_by_position"]
    assert sum(row["tokens"] for row in rows) == found["tokens"]
    total = sum(row["tokens"] * row["loss"] for row in rows)
    assert total / found["tokens"] == pytest.approx(found["loss"], rel=1e-12)
    assert output.with_suffix(".png").stat().st_size > 1000


ON_TWO_RANKS = {
    "cp, segments": ("linear", ["--context-parallel-degree", "-1", "--segment-len", "9"]),
    "cp, varlen": ("varlen", ["--context-parallel-degree", "2", "--segment-len", "50"]),
    "cp, hybrid": (
        "hybrid",
        ["--context-parallel-degree", "2", "--context-parallel-layout", "zigzag"],
    ),
    # Three samples for the first rank, two for the other.
    "dp": ("linear", ["--batch-size", "2", "--max-samples", "5"]),
    "tp": ("linear", ["--tensor-parallel-degree", "2"]),
}


def on_two_ranks(group, checkpoints, data, folder):
    """What each evaluation writes, and a bad one's error on this rank."""
    found = {}
    for number, (name, (kind, more)) in enumerate(ON_TWO_RANKS.items()):
        line = [f"--checkpoint={checkpoints[kind]}", f"--data={data}", *more]
        evaluate_as_rank(group, [*line, f"--output={folder}/{number}.json"])
        if group.rank() == 0:
            found[name] = json.loads((folder / f"{number}.json").read_text())
    with pytest.raises(UserError) as caught:
        evaluate_as_rank(group, [f"--checkpoint={folder}", f"--data={data}"])
    error = caught.value
    return found, (type(error), str(error), error.exit_code)


def evaluate_as_rank(group, line):
    arguments = evaluate.parse(line)
    config = evaluate.parallel_config(arguments)
    config.comm.backend = "gloo"
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("RANK", group.rank()), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 1)):
            patch.setenv(name, str(number))
        # Drawn often enough in other tests.
        patch.setattr(report.Report, "_draw", lambda self, path: None)
        info = get_rank_info(config)
        ctx = DistContext(info, build_mesh(info.dims, "cpu"))
        assert evaluate.evaluate(arguments, config, ctx) == 0


def test_two_ranks_find_what_one_finds(runs, data, tmp_path, pair):
    checkpoints = {kind: checkpoint for kind, (checkpoint, _) in runs.items()}
    (found, first), (_, second) = pair.run(on_two_ranks, checkpoints, data, tmp_path, size=2)
    for name, (kind, more) in ON_TWO_RANKS.items():
        alone = more if name == "dp" else []
        expected = evaluate_here(checkpoints[kind], data, tmp_path / "alone.json", *alone)
        assert found[name]["loss"] == pytest.approx(expected["loss"], rel=1e-6), name
        assert found[name]["tokens"] == expected["tokens"], name
        for row, other in zip(
            found[name]["loss_by_position"], expected["loss_by_position"], strict=True
        ):
            assert row.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-5), name
            assert row == other, name
    # One rank prints the error, the other has its exit code.
    assert first[0] is CheckpointError and second[0] is RemoteRankError
    assert first[1:] == second[1:] and "holds no valid checkpoint" in first[1] and first[2] == 70


@pytest.mark.slow
def test_torchrun_prints_one_table(runs, data):
    checkpoint, expected = runs["linear"]
    line = ["--checkpoint", str(checkpoint), "--data", str(data), "--context-parallel-degree", "2"]
    process = start([*line, "--max-samples", str(SAMPLES)], 2, "launch/evaluate.py")
    output = output_of(process)
    assert process.returncode == 0, output
    assert output.count(f"loss (nats per token): {expected:.6f}"[:-1]) == 1, output


def test_only_the_first_rank_reports_bad_options(monkeypatch, capsys):
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        assert evaluate.main(["--checkpoint", "here"]) == 73
        assert capsys.readouterr().err.count("error: --task loss needs --data") == lines


@pytest.mark.parametrize("segment_len", [0, 9])
@pytest.mark.parametrize("varlen", [False, True])
def test_losses_by_position_are_those_of_full_logits(runs, tmp_path, varlen, segment_len):
    """Three documents, the last of which goes on into a second sample."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 200, n) for n in (7, 21, 45)]
    data = write_tokens(tmp_path / "data", documents)
    more = ["--seq-len", "30", "--segment-len", str(segment_len)]
    more += ["--varlen", str(varlen)]
    checkpoint, _ = runs["varlen" if varlen else "linear"]
    found = evaluate_here(checkpoint, data, tmp_path / "results.json", *more)

    stream, starts = np.concatenate(documents), [0, 7, 28]
    model, _, _ = load_model(checkpoint, torch.device("cpu"))
    by_position = {}
    for first in (0, 30):
        # What the state is reset at, and the labels that cannot be predicted.
        resets = [s for s in starts if first < s < first + 30] if varlen else []
        bounds = [first, *resets, first + 30]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            tokens = torch.tensor(stream[begin : end + 1])[None]
            with torch.no_grad():
                logits = model(tokens[:, :-1])[0]
            losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
            for position, loss in enumerate(losses.tolist()):
                if not (varlen and begin + position + 1 in starts):
                    by_position.setdefault(position, []).append(loss)
    rows = found["loss_by_position"]
    assert found["tokens"] == (58 if varlen else 60)
    assert [(row["from"], row["to"]) for row in rows[:4]] == [(0, 1), (1, 2), (2, 4), (4, 8)]
    for row in rows:
        inside = [x for p in range(row["from"], row["to"]) for x in by_position.get(p, [])]
        assert row["tokens"] == len(inside)
        assert row["loss"] == pytest.approx(np.mean(inside), rel=1e-5)
    assert "bpb" not in found, "the data's bytes are not known"


def test_ignored_labels_do_not_count_whatever_their_loss_is():
    losses = PositionLosses(5, torch.device("cpu"))
    values = torch.tensor([[1.0, math.nan, 2.0, 4.0, 8.0]])
    losses.add(values, torch.tensor([[3, -100, 3, 3, 3]]), torch.arange(5))
    rows = [(row["from"], row["to"], row["tokens"], row["loss"]) for row in losses.table()]
    assert rows == [(0, 1, 1, 1.0), (2, 4, 2, 3.0), (4, 5, 1, 8.0)]
    assert losses.mean == 15 / 4


def test_long_evaluations_print_their_progress(runs, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.progress.SECONDS_BETWEEN_LINES", 0.0)
    more = ["--max-samples", "4", "--batch-size", "2", "--segment-len", "100"]
    evaluate_here(runs["linear"][0], data, tmp_path / "results.json", *more)
    lines = [each for each in capsys.readouterr().out.splitlines() if "tok/s" in each]
    assert [line.split(" tokens")[0] for line in lines] == [
        f"evaluating: {done}/404" for done in (200, 202, 402, 404)
    ]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--seq-len", "0"], 73, "--seq-len is 0: it must be at least 1"),
        (["--seq-len", "100000000"], 73, "lower --seq-len"),
        (["--batch-size", "x"], 73, "invalid command line"),
        (["--varlen", "True", "--batch-size", "2"], 73, "--batch-size is 2: it must be 1"),
        (["--context-parallel-degree", "2"], 73, "does not divide the one process"),
        (["--context-parallel-layout", "zigzag"], 73, "--seq-len is 101: it must be even"),
        (["--output", "results.txt"], 73, "give a .json file"),
        (["--output", "/proc/no/results.json"], 73, "cannot be written"),
        (["--data", "/nowhere"], 73, "--data /nowhere is no folder"),
        (["--checkpoint", "/nowhere"], 70, "holds no valid checkpoint"),
        (["--task", "recall"], 73, "leave --data out"),
    ],
)
def test_bad_options_are_sentences(runs, data, capsys, more, code, message):
    line = ["--checkpoint", str(runs["linear"][0]), "--data", str(data), *more]
    assert evaluate.main(line) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error


def test_segments_of_a_hybrid_are_refused(runs, data, capsys):
    line = ["--checkpoint", str(runs["hybrid"][0]), "--data", str(data), "--segment-len", "9"]
    assert evaluate.main(line) == 73
    assert "--segment-len is 9: 1 of 2 layers are softmax" in capsys.readouterr().err


def test_data_of_another_tokenizer_is_refused(runs, tmp_path, capsys):
    data = write_tokens(tmp_path / "data", [range(200)])
    meta = json.loads((data / "meta.json").read_text())
    other = train_bpe(["some text, some more text"], 260)
    (data / "meta.json").write_text(json.dumps(meta | {"tokenizer": other.spec()}))
    line = ["--checkpoint", str(runs["linear"][0]), "--data", str(data)]
    assert evaluate.main(line) == 73
    assert "is not that of the checkpoint" in capsys.readouterr().err
    # Megatron's files say nothing of their tokenizer.
    (data / "meta.json").unlink()
    assert evaluate.main(line) == 0


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda state, tensors: state.update(tokenizer=None), 73, "has no tokenizer"),
        (lambda state, tensors: state.update(model={"width": 3}), 70, "is not of a model that"),
        (lambda state, tensors: state.update(family="gpt"), 70, "model.family is 'gpt'"),
        (lambda state, tensors: tensors.popitem(), 70, "the checkpoint is of another model"),
        (
            lambda state, tensors: tensors["embedding.weight"].fill_(math.nan),
            72,
            "the loss of",
        ),
    ],
)
def test_bad_checkpoints_are_sentences(runs, data, tmp_path, capsys, change, code, message):
    found = open_checkpoint(runs["linear"][0])
    state, tensors = found.state(), found.tensors("model")
    change(state, tensors)
    saved = {"model": tensors, "optimizer": {}}
    path = save_tensors(CheckpointStore(tmp_path), 1, saved, state)
    assert evaluate.main(["--checkpoint", str(path), "--data", str(data)]) == code
    assert message in capsys.readouterr().err
