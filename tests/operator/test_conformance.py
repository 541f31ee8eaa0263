"""Conformance of the operator: every variant on every backend, over ranks, against the definition.

Each test compares the output, the final states and every gradient, on every rank, with
`lasp.reference` in float64, fresh memory being poisoned. Its name is

    variant-backend-ranks-exchange-length        ranks: "alone" without a process group

`make check` runs this folder. A new variant is a row of variants.py; a new backend is one of
backends.py.
"""

import dataclasses
import functools
import random

import pytest
import torch

from tests.distributed import Pool
from tests.lasp import sharded
from tests.operator.backends import BACKENDS, bounds, marks, run, run_alone
from tests.operator.variants import VARIANTS

EXCHANGES = ("ring", "all_gather", "doubling", "auto")
# Which ranks, exchanges and lengths each backend runs with every variant; 0 ranks: without a group.
GRID = [
    ("cpu_float64", (0,), ("ring",), (1, 63, 100, 1000)),
    ("cpu_float64", (1,), ("ring",), (100,)),
    # Of one token, three of four ranks have none.
    ("cpu_float64", (2, 3, 4), ("ring",), (1, 63)),
    ("cpu_float64", (2, 3, 4), EXCHANGES, (100,)),
    ("cpu_float64", (3,), ("ring",), (1000,)),
    ("cpu_float32", (0,), ("ring",), (63, 300)),
    ("cpu_float32", (1, 2, 3, 4), ("ring",), (100,)),
    ("cpu_float16", (0,), ("ring",), (63, 300)),
    ("cpu_bfloat16", (0,), ("ring",), (63, 300)),
    ("cpu_bfloat16", (3,), ("ring",), (300,)),
    ("triton_float32", (0,), ("ring",), (1, 63)),
    ("triton_float32", (2,), ("ring",), (100,)),
    ("triton_float16", (0,), ("ring",), (63,)),
    ("gpu_float32", (0,), ("ring",), (1, 63, 1000, 4097)),
    ("gpu_float16", (0,), ("ring",), (63, 1000)),
    ("gpu_bfloat16", (0,), ("ring",), (1, 63, 1000, 4097)),
    ("gpu_bfloat16_64", (0,), ("ring",), (1500,)),
    ("gpu_bfloat16_96_80", (0,), ("ring",), (1500,)),
    ("gpus_float32", (2,), EXCHANGES, (2, 5000)),
]
# Kinds of decay per token that the interpreter runs in `make test`, beside the first one.
INTERPRETED_TOO = ("by_token_packed", "by_token_resets", "by_token_strong", "by_token_odd_sizes")


def grid():
    for backend, sizes, exchanges, lengths in GRID:
        for name, variant in VARIANTS.items():
            for ranks in sizes:
                # Without ranks there are no shards to be uneven, and no order of chunks.
                if ranks < 2 and (variant.shards, variant.layout) != ("even", "contiguous"):
                    continue
                interpreted = BACKENDS[backend].device == "interpreter"
                if interpreted and "wide" in name:
                    # It takes seconds, and tests/lasp/ops runs kernels of these sizes.
                    continue
                # Ranks, shards and layouts are those of constant decays.
                slow = interpreted and name.startswith("by_token_") and name not in INTERPRETED_TOO
                more = [pytest.mark.slow] if slow else []
                for exchange in exchanges:
                    for length in lengths:
                        where = f"{ranks}-{exchange}" if ranks else "alone"
                        yield pytest.param(
                            name, backend, ranks, exchange, length,
                            id=f"{name}-{backend}-{where}-{length}", marks=[*marks(backend), *more],
                        )  # fmt: skip


@pytest.fixture(scope="module")
def gpus():
    """One process per GPU, two at most."""
    pool = Pool(tuple(range(1, min(torch.cuda.device_count(), 2) + 1)), backend="nccl")
    yield pool
    pool.stop()


@functools.lru_cache(maxsize=8)
def truth_of(problem, device):
    return problem.truth(device)


@pytest.mark.parametrize(("name", "backend", "ranks", "exchange", "length"), list(grid()))
def test_equals_the_definition(request, name, backend, ranks, exchange, length):
    backend = BACKENDS[backend]
    if backend.device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA GPUs of one host")
    pool = request.getfixturevalue(backend.pool)
    variant, size = VARIANTS[name], max(ranks, 1)
    problem = variant.problem(length, size, exchange, backend.dtype, backend.sizes, backend.batch)
    # Exchanges differ in how they compute it.
    device = "cuda" if backend.device == "cuda" else "cpu"
    truth = truth_of(dataclasses.replace(problem, method="ring"), device)
    results = pool.run(run if ranks else run_alone, problem, backend.device, size=size)
    sharded.compare(results, problem, truth, bounds(problem, truth, backend, ranks), device=device)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", sharded.LAYOUTS)
def test_random_documents_on_random_shards_equal_the_definition(pool, layout, size):
    chance = random.Random(size)
    problems = []
    for _ in range(15):
        lengths = tuple(2 * chance.choice([0, 0, 1, 3]) for _ in range(size - 1))
        lengths = (*lengths, 2) if chance.random() < 0.5 else (2, *lengths)
        total = sum(lengths)
        inner = sorted(chance.randint(0, total) for _ in range(chance.randrange(7)))
        documents = (0, *inner, total)
        exchange = chance.choice(EXCHANGES)
        states = dict(initial=chance.random() < 0.5, final=chance.random() < 0.5)
        problems.append(sharded.Problem(total, exchange, layout, lengths, documents, **states))
    sharded.check(pool, size, *problems)


def test_eight_ranks_equal_the_definition(pool8):
    problems = [
        sharded.Problem(60, exchange, layout, lengths, documents)
        for exchange in sharded.METHODS
        for layout in sharded.LAYOUTS
        for lengths in (None, (0, 10, 2, 18, 0, 0, 24, 6))
        for documents in (None, (0, 7, 7, 31, 60))
    ]
    sharded.check(pool8, 8, *problems)
