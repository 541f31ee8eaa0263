"""The Wikitext-103 recipe on a stand-in of the same format: data, training, evaluation."""

import json
import math
import random

import numpy as np
import pytest
import torch

from launch import evaluate, prepare_wikitext, train
from launch.checkpoint.store import CheckpointStore
from launch.data import DataFolder, dropout_seeds
from launch.prepare_wikitext import count_words, read_articles
from tests.launch.runs import ROOT, records

pytestmark = pytest.mark.usefixtures("one_process")

SMALL = {
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.glu_dim": 48,
    "training.seq_len": 32,
    "training.local_batch_size": 2,
    "training.global_batch_size": 4,
    "lr_scheduler.warmup_steps": 2,
    "validation.steps": 2,
    "sample.max_new_tokens": 8,
    "checkpoint.interval": 2,
}


def write_split(path, articles, seed):
    draw = random.Random(seed)
    words = ["the", "of", "Valkyria", "<unk>", "@-@", "1942", ",", ".", "played", "Bärenreiter"]
    lines = []
    for number in range(articles):
        lines += [" \n", f" = Article {number} of {path.name} = \n", " \n"]
        for section in range(2):
            lines += [f" = = Section {section} = = \n", " \n"]
            lines.append(f" {' '.join(draw.choices(words, k=60))} \n")
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wikitext")
    write_split(folder / "wiki.train.tokens", 40, 0)
    write_split(folder / "wiki.valid.tokens", 4, 1)
    write_split(folder / "wiki.test.raw", 5, 2)
    return folder


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "wikitext103"
    line = ["--input", str(raw), "--output", str(output), "--vocab-size", "300"]
    assert prepare_wikitext.main(line) == 0
    return output


def test_articles_words_and_splits_are_those_of_the_files(raw, prepared):
    folder = DataFolder(prepared)
    for split, name in (("train", "train.tokens"), ("val", "valid.tokens"), ("test", "test.raw")):
        text = (raw / f"wiki.{name}").read_text(encoding="utf-8")
        articles = list(read_articles(raw / f"wiki.{name}"))
        assert "".join(article for _, article in articles) == text
        about = folder.meta[split]
        assert about["documents"] == len(articles) == {"train": 40, "val": 4, "test": 5}[split]
        # 60 words and 3 lines per section, among them a heading of 6; 3 lines per article.
        assert about["words"] == count_words(text) == len(text.split()) + len(text.splitlines())
        assert about["bytes"] == len(text.encode())
        tokens = np.fromfile(prepared / f"{split}.bin", np.uint16)
        ends = (tokens == folder.meta["eod_id"]).nonzero()[0]
        assert len(ends) == len(articles)
        first = tokens[: ends[0]].tolist()
        assert folder.tokenizer.decode(first) == articles[0][1]


def run(prepared, folder, config, *more, **changes):
    values = SMALL | {"job.dump_folder": folder, "data.folder": prepared, "training.steps": 6}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    line = ["--job.config_file", str(ROOT / "launch" / "configs" / config), *more]
    for name, value in values.items():
        line += [f"--{name}", str(value)]
    return train.main(line)


@pytest.mark.parametrize("name", ["tnl", "transformer", "1elu"])
def test_a_recipe_trains_resumes_to_the_bit_and_reports_perplexities(
    prepared, tmp_path, name, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    config = f"wikitext103_{name}.toml"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(prepared, whole, config) == 0
    # Stopped after two steps, and resumed with recomputation.
    assert run(prepared, parts, config, training__steps=2) == 0
    assert run(prepared, parts, config, activation_checkpoint__mode="full") == 0
    found, expected = records(parts), records(whole)
    assert [each["loss"] for each in found] == [each["loss"] for each in expected]
    weights = [
        CheckpointStore(folder / "checkpoint").find("must")[0].tensors("model")
        for folder in (parts, whole)
    ]
    assert all(torch.equal(weights[0][key][...], weights[1][key][...]) for key in weights[1])
    # The rate of step 3 is the last of the warm-up's times sqrt(2 / 3).
    rates = [each["lr"] for each in expected]
    assert rates == pytest.approx(
        [2.5e-4, 5e-4, *(5e-4 * math.sqrt(2 / step) for step in (3, 4, 5, 6))]
    )
    about = DataFolder(prepared).meta["val"]
    last, ratio = expected[-1], about["tokens"] / about["words"]
    assert last["val_ppl"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["val_word_ppl"] == pytest.approx(math.exp(last["val_loss"] * ratio))

    capsys.readouterr()
    line = ["--checkpoint", str(whole / "checkpoint"), "--data", str(prepared), "--split", "test"]
    assert evaluate.main([*line, "--output", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert f"perplexity per word: {results['word_ppl']:.6f}" in capsys.readouterr().out
    about = DataFolder(prepared).meta["test"]
    ratio = about["tokens"] / about["words"]
    assert results["word_ppl"] == pytest.approx(math.exp(results["loss"] * ratio))


def test_dropout_changes_training_and_not_validation(prepared, tmp_path):
    losses = {}
    for dropout in (0.0, 0.1):
        folder = tmp_path / str(dropout)
        changes = dict(model__dropout=dropout, training__steps=1, optimizer__lr=0)
        assert run(prepared, folder, "wikitext103_tnl.toml", **changes) == 0
        (losses[dropout],) = records(folder)
    assert losses[0.0]["val_loss"] == losses[0.1]["val_loss"]
    assert losses[0.0]["loss"] != losses[0.1]["loss"]


def test_seeds_of_dropout_depend_on_sample_step_and_seed():
    base = dropout_seeds([5, 6], 3, 0)
    assert torch.equal(base, dropout_seeds([5, 6], 3, 0)) and base.dtype == torch.int64
    others = [dropout_seeds([6, 5], 3, 0), dropout_seeds([5, 6], 4, 0), dropout_seeds([5, 6], 3, 1)]
    assert all((base != other).all() for other in others)
    assert others[0][0] == base[1]


def test_missing_files_say_what_to_put_where(tmp_path, raw, capsys):
    line = ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert prepare_wikitext.main(line) == 73
    error = capsys.readouterr().err
    assert f"{tmp_path} has no wiki.train.raw (or .tokens): put the three files" in error
    (tmp_path / "wiki.train.raw").write_bytes(b"\xff\xfe")
    (tmp_path / "wiki.valid.raw").write_text(" \n")
    (tmp_path / "wiki.test.raw").write_text("text\n")
    assert prepare_wikitext.main(line) == 73
    assert "wiki.train.raw is not UTF-8" in capsys.readouterr().err
    (tmp_path / "wiki.train.raw").write_text(" = A = \n words \n")
    assert prepare_wikitext.main([*line, "--tokenizer", "byte"]) == 73
    assert "wiki.valid.raw holds no text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_has_no_split_test(data, prepared, tmp_path, capsys):
    assert run(prepared, tmp_path / "run", "wikitext103_tnl.toml", training__steps=1) == 0
    line = ["--checkpoint", str(tmp_path / "run" / "checkpoint"), "--data", str(data)]
    assert evaluate.main([*line, "--split", "test"]) == 73
    assert "has no split test" in capsys.readouterr().err


def test_dropout_with_a_sequence_sharded_between_mixers_is_refused(prepared, tmp_path, capsys):
    flags = ("--job.dry_run", "--job.dry_run_gpus", "2", "--model.vocab_size", "320")
    flags += ("--parallelism.tensor_parallel_shard_sequence",)
    changes = dict(parallelism__tensor_parallel_degree=2)
    assert run(prepared, tmp_path, "wikitext103_tnl.toml", *flags, **changes) == 73
    assert "model.dropout is 0.1 with parallelism.tensor_par" in capsys.readouterr().err
