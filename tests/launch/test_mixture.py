"""Data folders mixed by weight: exact shares, the same samples whatever is resumed where."""

import collections
import json
import os
import signal

import numpy as np
import pytest

from launch import train
from launch.config import load_config
from launch.data import IndexedSource, order_of_pass, sample_order, step_samples
from launch.exit_codes import ConfigError, DataError
from launch.mixture import MixedSource, Shares, open_mixture
from tests.launch.runs import at_step, flags, losses, output_of, records, start
from tests.launch.runs import write_tokens as write

WEIGHTS = {
    "two": [0.7, 0.3],
    "three": [0.5, 0.3, 0.2],
    "alike": [1] * 10,
    "one large": [90, *[1] * 10],
    "far apart": [1e-6, 1, 1000],
    "awkward": [0.2712, 0.2052, 0.1948, 0.0035, 0.9888],
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_every_folder_has_its_share_after_any_number_of_samples(weights):
    shares = Shares(weights)
    seen = np.zeros(len(weights))
    exact = np.array(weights) / sum(weights)
    for position in range(3000):
        folder, visit = shares.locate(position)
        # Visits are counted without a gap.
        assert visit == seen[folder]
        seen[folder] += 1
        assert np.abs(seen - (position + 1) * exact).max() < 2


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_shares_hold_wherever_a_run_is(weights):
    shares = Shares(weights)
    exact = np.array(weights) / sum(weights)
    for position in (10**6, 10**12):
        for after in range(50):
            # As many earlier positions belong to this folder.
            folder, visit = shares.locate(position + after)
            # The shares themselves are rounded in this product.
            assert abs(visit - (position + after) * exact[folder]) < 2 + position * 1e-15


@pytest.fixture
def sources(tmp_path):
    """Two sources of 8-token samples: 12 of small numbers, 29 of numbers above 100."""
    found = []
    for number, length in enumerate((100, 235)):
        tokens = 100 * number + np.arange(length) % 100
        write(tmp_path / str(number), [tokens])
        found.append(IndexedSource(tmp_path / str(number) / "train", 8, vocab_size=258))
    return found


def test_samples_are_those_of_the_folders(sources):
    mixed = MixedSource(sources, [1, 1])
    assert mixed.num_samples == 12 + 29
    for index, (number, own) in {0: (0, 0), 11: (0, 11), 12: (1, 0), 40: (1, 28)}.items():
        assert mixed.sample(index, 2, 6).tolist() == sources[number].sample(own, 2, 6).tolist()
    # A document starts with the first sample of each only.
    assert [mixed.document_starts(index, 0, 8).tolist() for index in (0, 1, 12)] == [[0], [], [0]]


def test_each_pass_over_a_folder_reads_every_sample_once(sources):
    mixed = MixedSource(sources, [0.25, 0.75])
    order = mixed.order(0, 480, seed=3)
    small = [index for index in order if index < 12]
    large = [index - 12 for index in order if index >= 12]
    assert (len(small), len(large)) == (120, 360)
    for first in range(0, 120, 12):
        assert sorted(small[first : first + 12]) == list(range(12))
    assert small[:12] != small[12:24]
    assert large[:58] == [*order_of_pass(3, 0, 29, 1), *order_of_pass(3, 1, 29, 1)]
    assert order != mixed.order(0, 480, seed=4)


@pytest.mark.parametrize("consumed", [0, 1, 17, 479, 10**12])
def test_the_order_can_be_resumed_anywhere(sources, consumed):
    weights = [0.7, 0.3]
    fresh = MixedSource(sources, weights).order(consumed + 5, 3, seed=1)
    assert MixedSource(sources, weights).order(consumed, 9, seed=1)[5:8] == fresh


def test_a_permutation_is_made_once_per_pass(sources, monkeypatch):
    made, real = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or real(seed))
    mixed = MixedSource(sources, [1, 1])
    for step in range(12):
        mixed.order(4 * step, 4, seed=7)
    assert sorted(made) == [[7, 0], [7, 0, 1], [7, 1]]


def test_one_folder_with_a_weight_is_that_folder(tmp_path):
    write(tmp_path / "a", [np.arange(100)])
    source = open_mixture([(tmp_path / "a", 0.3)]).source("train", 8, 258)
    assert source.order(5, 20, seed=1) == sample_order(5, 20, 12, seed=1)
    assert source.identity == [12]


@pytest.mark.parametrize(("dp", "local"), [(1, 1), (1, 8), (2, 2), (4, 1), (8, 1)])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(sources, dp, local):
    indices = MixedSource(sources, [2, 1]).order(32, 8, seed=0)
    parts = [
        step_samples(indices, local_batch_size=local, dp_rank=rank, dp=dp) for rank in range(dp)
    ]
    seen = sorted(index for part in parts for micro in part for index in micro)
    assert seen == sorted(indices)


def test_validation_reads_the_same_shares_and_no_more_than_all(sources):
    mixed = MixedSource(sources, [0.75, 0.25])
    first = mixed.first(20)
    assert [index for index in first if index >= 12] == [12, 13, 14, 15, 16]
    # The small folder's 12 samples are repeated.
    assert [index for index in first if index < 12] == [*range(12), 0, 1, 2]
    # All of the 29 others are read once in 116.
    everything = mixed.first(1000)
    assert len(everything) == 116
    assert collections.Counter(everything)[40] == 1
    assert sources[0].first(1000) == list(range(12))


def test_bits_per_byte_follow_the_shares(sources):
    sources[0].bytes_per_token, sources[1].bytes_per_token = 4.0, 2.0
    assert MixedSource(sources, [3, 1]).bytes_per_token == 3.5
    sources[0].bytes_per_token = None
    assert MixedSource(sources, [3, 1]).bytes_per_token is None


def test_tokenizers_must_be_the_same(tmp_path):
    folders = [write(tmp_path / name, [np.arange(100)]) for name in "abc"]
    bpe = {"kind": "byte", "vocab_size": 258, "train": {"tokens": 1, "bytes": 1}}
    (folders[1] / "meta.json").write_text(json.dumps({"tokenizer": bpe}))
    assert open_mixture([(folder, 1) for folder in folders]).tokenizer.vocab_size == 258
    (folders[2] / "meta.json").unlink()
    with pytest.raises(DataError, match=r"/a and .*/c have different tokenizers \(byte with 258"):
        open_mixture([(folder, 1) for folder in folders])
    with pytest.raises(DataError, match="none is missing"):
        open_mixture([(folders[0], 1), (tmp_path / "none", 1)])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["a", "0"], "gives a the weight 0.0: it must be a number above 0"),
        (["a", "-1"], "gives a the weight -1.0"),
        (["a", "nan"], "gives a the weight nan"),
        (["a", "inf"], "gives a the weight inf"),
        (["a", "1", "./a", "2"], "names ./a twice"),
        (["a", "1", "--data.folder", "b"], "data.folders is given and data.folder is given"),
        (
            ["a", "1", "--data.source", "stdlib"],
            "data.source is stdlib: it needs data.source folder",
        ),
        (
            [
                "a",
                "1",
                "--training.carry_state",
                "--training.segment_len",
                "8",
                "--training.segment_gradient",
                "truncated",
            ],
            "training.carry_state reads one folder",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(["--data.source", "folder", "--data.folders", *more])


def test_folders_from_a_file_and_from_flags(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[data]\nsource = 'folder'\nfolders = [['a', 7], ['b b', 0.3]]\n")
    config = load_config(["--job.config_file", str(path)])
    assert config.data.folders == (("a", 7.0), ("b b", 0.3))
    more = ["--data.folders", "c", "1", "d", "2e-1"]
    config = load_config(["--job.config_file", str(path), *more])
    assert config.data.folders == (("c", 1.0), ("d", 0.2))
    for wrong in ("['a', 1]", "[['a']]", "[['a', '1']]", "[['a', true]]", "'a'"):
        path.write_text(f"[data]\nsource = 'folder'\nfolders = {wrong}\n")
        with pytest.raises(ConfigError, match="must be a list of pairs of a string and a number"):
            load_config(["--job.config_file", str(path)])


def test_a_run_on_a_mixture_resumes_on_other_ranks(tmp_path, one_process, monkeypatch):
    """Documents kept apart, in segments; stopped on one rank, resumed on two in zigzag."""
    for name, seed in (("a", 1), ("b", 2)):
        random = np.random.default_rng(seed)
        write(tmp_path / name, [random.integers(0, 256, 90) for _ in range(60)])
    options = dict(
        data__source="folder",
        training__steps=4,
        training__seq_len=100,
        training__segment_len=50,
        training__varlen=None,
        sample__no_enable=None,
        comm__train_timeout_seconds=120,
    )
    mix = ["--data.folders", str(tmp_path / "a"), "0.7", str(tmp_path / "b"), "0.3"]

    def command(folder, **more):
        return [*flags(job__dump_folder=tmp_path / folder, **options, **more), *mix]

    assert train.main(command("whole")) == 0
    at_step(monkeypatch, 2, lambda state: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(command("stopped")) == 75
    zigzag = dict(
        parallelism__context_parallel_degree=2, parallelism__context_parallel_layout="zigzag"
    )
    process = start(command("stopped", **zigzag), 2)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "warning" not in output
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    first, second = (records(tmp_path / name)[-1]["val_loss"] for name in ("whole", "stopped"))
    assert first == pytest.approx(second, rel=1e-5)


def test_other_weights_at_resume_are_refused_unless_allowed(tmp_path, one_process, capsys):
    for name in "ab":
        write(tmp_path / name, [np.arange(256) % 250] * 8)
    allowed = "--checkpoint.allow_changes"
    for steps, weight, code, more in (
        (1, 1, 0, ""),
        (2, 1, 0, ""),
        (3, 2, 70, ""),
        (3, 2, 0, allowed),
    ):
        mix = ["--data.folders", str(tmp_path / "a"), "1", str(tmp_path / "b"), str(weight)]
        line = flags(
            job__dump_folder=tmp_path / "run", data__source="folder", training__steps=steps
        )
        capsys.readouterr()
        assert train.main([*line, "--sample.no-enable", *mix, *more.split()]) == code
        captured = capsys.readouterr()
        assert ("data.folders (samples, weights) was" in captured.err) == (code == 70)
        assert ("samples come in another order" in captured.out) == bool(more)
