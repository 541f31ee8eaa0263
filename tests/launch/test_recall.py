"""Associative recall: its sequences, how it is measured, and that a model learns it."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples import recall as example
from lasp.tnl import TNL, TNLConfig
from launch import evaluate
from launch.data import IGNORE
from launch.evaluation import recall
from launch.evaluation.recall import RecallTask, gaps_up_to, recall_by_gap
from tests.launch.runs import as_one_process, run_here


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=30, dim=32, num_layers=2, num_heads=2, glu_dim=48, init_std=0.1)
    return TNL(TNLConfig(**(shape | changes))).eval()


def test_every_label_is_the_value_that_followed_the_key():
    task = RecallTask.from_tokens(range(30), 5)
    inputs, labels = task.sequences(4, 11, generator(), rounds=3)
    assert inputs.shape == labels.shape == (4, 2 * 5 * 4 + 11)
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == 5
        assert set(row[10:21]) <= set(task.fillers.tolist())
        for begin in (21, 31, 41):
            assert set(row[begin : begin + 10 : 2]) == set(pairs)
        assert wanted[:21] == [IGNORE] * 21
        assert wanted[21::2] == [pairs[key] for key in row[21::2]] == row[22::2]
        assert wanted[22::2] == [IGNORE] * 15


def test_keys_values_and_fillers_share_no_token():
    task = RecallTask.from_tokens(range(100, 131), 4, seed=3)
    sets = [set(each.tolist()) for each in (task.keys, task.values, task.fillers)]
    assert set.union(*sets) == set(range(100, 131)) and sum(map(len, sets)) == 31


@pytest.mark.parametrize(("largest", "gaps"), [(0, [0]), (1, [0, 1]), (9, [0, 1, 2, 4, 8])])
def test_gaps_are_zero_and_powers_of_two(largest, gaps):
    assert gaps_up_to(largest) == gaps


class Dictionary(nn.Module):
    """Knows the value of each key in the last `memory` tokens, and nothing else."""

    head_weight = torch.zeros(1)

    def __init__(self, task, memory):
        super().__init__()
        self.task, self.memory = task, memory

    def forward(self, tokens, states=None, return_states=False, return_hidden=False):
        past = tokens if states is None else torch.cat([states, tokens], 1)
        logits = torch.zeros(len(tokens), 1, 30)
        for row, text in enumerate(past[:, -self.memory - 1 :].tolist()):
            for key, value in zip(text, text[1:], strict=False):
                if key == text[-1]:
                    logits[row, 0, value] = 9.0
        return logits, past


def test_the_gap_is_the_number_of_tokens_between_pairs_and_query():
    task = RecallTask.from_tokens(range(30), 4)
    # The first key of the pairs is 8 tokens before their end, the last one 2.
    counts = recall_by_gap(Dictionary(task, 8 + 16), task, gaps_up_to(64), 3, generator())
    means = [each.means() for each in counts]
    assert [each["queries"] for each in means] == [12] * 8
    assert [each["accuracy"] for each in means] == [1.0] * 6 + [0.0] * 2
    assert [each["accuracy_among_pairs"] for each in means] == [1.0] * 6 + [0.0] * 2
    # Equal logits for all of the vocabulary are no success.
    assert [each["rank"] for each in means] == [1.0] * 6 + [30.0] * 2


@pytest.mark.parametrize("layer_types", ["L", "LS"])
def test_queries_from_states_are_those_of_whole_sequences(layer_types, monkeypatch):
    monkeypatch.setattr(recall, "_CHUNK", 5)
    model, task = make_model(layer_types=layer_types), RecallTask.from_tokens(range(30), 3)
    found = recall_by_gap(model, task, [0, 4, 13], 2, generator())
    # The same sequences, from the same numbers: filler comes in steps of at most 5.
    again = generator()
    keys, values = task.pairs(2, again)
    text = torch.stack([keys, values], 2).flatten(1)
    for counts, steps in zip(found, ([], [4], [5, 4]), strict=True):
        text = torch.cat([text, *(task.filler(2, step, again) for step in steps)], 1)
        loss = 0.0
        for pair in range(3):
            with torch.no_grad():
                logits = model(torch.cat([text, keys[:, pair : pair + 1]], 1))[:, -1]
            loss += F.cross_entropy(logits, values[:, pair]).item() / 3
        assert counts.means()["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_example_learns_to_recall_well_above_chance():
    """Three pairs of four keys and values: chance is a third among them."""
    torch.manual_seed(0)
    task = RecallTask.from_tokens(range(12), 3)
    shape = dict(dim=64, num_layers=2, num_heads=4, glu_dim=128, init_std=0.05)
    model = TNL(TNLConfig(vocab_size=12, **shape))
    example.train(model, task, 100, 1)
    counts = recall_by_gap(model.eval(), task, [0, 2], 64, generator(1))
    assert all(each.means()["accuracy"] > 0.8 for each in counts)


def test_the_example_prints_accuracy_by_gap(monkeypatch, capsys):
    line = ["recall.py", "--steps", "1", "--max_gap", "4"]
    monkeypatch.setattr(sys, "argv", line)
    example.main()
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    with as_one_process():
        assert run_here(folder, data, "--sample.no-enable", training__steps=1) == 0
    return folder / "checkpoint"


@pytest.mark.usefixtures("one_process")
def test_a_checkpoint_is_asked_at_every_gap(checkpoint, tmp_path, capsys):
    output = tmp_path / "recall.json"
    more = ["--recall.max-gap", "16", "--recall.samples", "5", "--batch-size", "2"]
    line = ["--checkpoint", str(checkpoint), "--task", "recall", "--output", str(output), *more]
    assert evaluate.main(line) == 0
    found = json.loads(output.read_text())
    rows = found["recall_by_gap"]
    assert [row["gap"] for row in rows] == [0, 1, 2, 4, 8, 16]
    assert {row["queries"] for row in rows} == {5 * 8}
    # An untrained model knows nothing: the loss is about that of the uniform distribution.
    assert all(5 < row["loss"] < 7 and 1 <= row["rank"] <= 320 for row in rows)
    assert capsys.readouterr().out.count("among pairs") == 2
    assert output.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recall.pairs", "86"], "--recall.pairs: 86 pairs: there must be"),
        (["--recall.pairs", "0"], "--recall.pairs is 0: it must be at least 1"),
        (["--recall.max-gap", "-1"], "--recall.max-gap is -1"),
        (["--context-parallel-degree", "2"], "--task recall shards neither"),
        (["--tensor-parallel-degree", "2"], "--task recall shards neither"),
    ],
)
@pytest.mark.usefixtures("one_process")
def test_bad_options_are_sentences(checkpoint, capsys, more, message):
    line = ["--checkpoint", str(checkpoint), "--task", "recall", *more]
    assert evaluate.main(line) == 73
    assert f"error: {message}" in capsys.readouterr().err


def test_special_tokens_are_neither_keys_nor_values(checkpoint):
    arguments = evaluate.parse(["--checkpoint", str(checkpoint), "--task", "recall"])
    saved = evaluate.SavedRun.read(evaluate.open_checkpoint(checkpoint))
    task = evaluate.recall_task(arguments, saved)
    used = set(torch.cat([task.keys, task.values, task.fillers]).tolist())
    assert used == set(range(256)), "bytes, without the end of a document and padding"
