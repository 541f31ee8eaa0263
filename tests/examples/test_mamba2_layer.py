"""examples/mamba2_layer.py: transformers' mixer on one rank; the same at any number of ranks."""

import contextlib
import functools
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lasp
from parallel import activation_checkpoint
from tests.distributed import JOB_TIMEOUT
from tests.lasp.cases import assert_close, relative_error
from tests.lasp.sharded import LAYOUTS, chunks_of, documents_that, even, positions_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "mamba2_layer.py"
DIM = 24


@functools.cache
def example():
    return runpy.run_path(str(EXAMPLE))


def make_mixer(total, *, num_groups=2, dtype=torch.float64, batch=2):
    """(mixer, tokens of the whole sequence), the same in every process."""
    torch.manual_seed(total)
    mixer = example()["Mamba2Mixer"](DIM, head_dim=12, state_size=8, num_groups=num_groups)
    # Some heads forget within a few tokens, so that every weight has a say.
    with torch.no_grad():
        mixer.dt_bias += 2
        mixer.D += torch.randn(mixer.num_heads)
        mixer.norm.weight += torch.randn(2 * DIM) / 4
    return mixer.to(dtype), torch.randn(batch, total, DIM, dtype=torch.float64).to(dtype)


def on_one_device(mixer, hidden, cu_seqlens=None):
    shard = lasp.SequenceShard.whole(hidden.shape[1])
    return example()["results"](lambda x: mixer(x, shard, cu_seqlens), mixer, hidden)


@contextlib.contextmanager
def no_float32():
    """transformers computes in float32 inside, by these names; here in float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def of_transformers(mixer, hidden):
    theirs = example()["from_transformers"](mixer)
    assert theirs is not None, "transformers is not installed: pip install -e '.[test]'"
    theirs.to(hidden.dtype)
    with no_float32() if hidden.dtype == torch.float64 else contextlib.nullcontext():
        return example()["results"](theirs, theirs, hidden)


@pytest.mark.parametrize("total", [1, 3, 100, 300])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_equals_the_mixer_of_transformers(num_groups, total):
    mixer, hidden = make_mixer(total, num_groups=num_groups)
    truth = of_transformers(mixer, hidden)
    assert {x.dtype for x in truth.values()} == {torch.float64}
    assert_close(on_one_device(mixer, hidden), truth, 1e-12, "float64")
    mixer, hidden = mixer.float(), hidden.float()
    theirs = of_transformers(mixer, hidden)
    bound = 3 * max(relative_error(theirs[name], truth[name]) for name in truth)
    assert_close(on_one_device(mixer, hidden), truth, bound, "float32")
    assert bound < 1e-4


def shard_of(group, lengths, layout):
    first = chunks_of(lengths, layout)[dist.get_rank(group)][0]
    total = sum(lengths)
    return lasp.SequenceShard(*first, total, group, "ring", layout, tuple(lengths))


def over_ranks(group, problems):
    """The results of this rank for each problem: (lengths, layout, documents)."""
    outcomes = []
    for lengths, layout, documents in problems:
        mixer, hidden = make_mixer(sum(lengths), batch=2 if documents is None else 1)
        shard = shard_of(group, lengths, layout)
        cu_seqlens = None if documents is None else torch.tensor(documents)
        forward = functools.partial(mixer, shard=shard, cu_seqlens=cu_seqlens)
        outcomes.append(example()["results"](forward, mixer, shard.take(hidden), group))
    return outcomes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_equal_one(pool, layout, size):
    unit = 2 if layout == "zigzag" else 1
    # The last has shards that are empty, or shorter than what the convolution looks back.
    cuts = [even(100, size, layout), (50, 4, 16, 2)[:size], (0, 2, 0, 40)[-size:]]
    if layout == "contiguous":
        cuts += [even(63, size, layout), (1, 1, 2, 30)[-size:]]
    problems = [(cut, layout, None) for cut in cuts]
    problems += [
        (cut, layout, documents_that(meet, cut, layout))
        for cut in cuts
        for meet in ("on", "across", "both")
    ]
    assert all(length % unit == 0 for cut in cuts for length in cut)
    outcomes = pool.run(over_ranks, problems, size=size)
    for number, (lengths, _, documents) in enumerate(problems):
        mixer, hidden = make_mixer(sum(lengths), batch=2 if documents is None else 1)
        truth = documents_alone(mixer, hidden, documents or (0, sum(lengths)))
        back = torch.tensor(sum(positions_of(lengths, layout), [])).argsort()
        of_ranks = [of_rank[number] for of_rank in outcomes]
        for rank, mine in enumerate(of_ranks):
            joined = mine | {
                name: torch.cat([each[name] for each in of_ranks], 1)[:, back]
                for name in ("output", "input")
            }
            what = f"{lengths} {layout} {documents}, rank {rank}"
            assert_close(joined, truth, 1e-12, what)


def documents_alone(mixer, hidden, documents):
    """The results of a mixer that gets one document after the other."""

    def forward(x):
        lengths = [b - a for a, b in zip(documents, documents[1:], strict=False)]
        parts = zip(x.split(lengths, 1), lengths, strict=True)
        return torch.cat([mixer(part, lasp.SequenceShard.whole(n)) for part, n in parts], 1)

    return example()["results"](forward, mixer, hidden)


def compiled_and_checkpointed(group):
    """Whether the mixer gives the same compiled, and recomputed in the backward."""
    shard = lasp.SequenceShard.split(40, group)
    found = []
    for how in ("plain", "compiled", "checkpointed"):
        mixer, hidden = make_mixer(40)
        if how == "compiled":
            mixer.compile(fullgraph=True, backend="aot_eager")
        if how == "checkpointed":
            activation_checkpoint.checkpointed(mixer)
        forward = functools.partial(mixer, shard=shard)
        found.append(example()["results"](forward, mixer, shard.take(hidden), group))
    for other in found[1:]:
        assert_close(other, found[0], 1e-12)


def test_compiles_without_a_graph_break_and_checkpoints(pool):
    pool.run(compiled_and_checkpointed, size=2)


def test_the_script_prints_small_errors():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
        + [str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=JOB_TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    # Two comparisons of each rank, and the one with transformers. Ranks may share a line.
    assert done.stdout.count("against") == 7, done.stdout
    errors = [float(x) for x in re.findall(r"\d\.\de[-+]\d\d", done.stdout)]
    assert len(errors) == 3 * 7 and max(errors) < 5e-6
