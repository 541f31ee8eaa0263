"""One problem cut over ranks, and its results joined again for comparison with the definition."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

import lasp
from lasp import exchange, shard
from tests.lasp import cases

# "auto" is one of these, by where it runs.
METHODS = sorted(set(exchange.METHODS) - {"auto"})


@dataclass(frozen=True)
class Problem:
    """What is computed, and how it is cut.

    lengths: tokens of every rank; None: the even cut. documents: boundaries, or None for a batch.
    rates: decay of all heads in place of those of `cases`. split: the operator in two calls.
    final: whether final states are asked for.
    """

    total: int
    method: str = "ring"
    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = None
    documents: tuple[int, ...] | None = None
    initial: bool = True
    dtype: torch.dtype = torch.float64
    rates: float | None = None
    split: bool = False
    final: bool = True

    def inputs(self):
        """(q, k, v, log_decay, initial_state, cu_seqlens) of the whole sequence."""
        packed = self.documents is not None
        num_documents = len(self.documents) - 1 if packed else None
        B = 1 if packed else 2
        q, k, v, log_decay, state = cases.make_inputs(
            self.total, B=B, H=5, D=4, E=6, dtype=self.dtype, state=self.initial, N=num_documents
        )
        if self.rates is not None:
            log_decay = torch.full_like(log_decay, self.rates)
        cu_seqlens = torch.tensor(self.documents, dtype=torch.int32) if packed else None
        return q, k, v, log_decay, state, cu_seqlens

    def truth(self):
        *inputs, cu_seqlens = self.inputs()
        options = dict(scale=0.3, cu_seqlens=cu_seqlens)
        return cases.expected(*inputs, with_final=self.final, **options)

    def positions(self, size):
        """Global positions of the tokens of each rank, in the order it holds them."""
        lengths = self.lengths or shard.split_lengths(self.total, size, self.layout)
        borders = shard.chunk_boundaries(lengths, self.layout)
        return [
            [t for p in shard.chunks_of_rank(rank, size, self.layout) for t in range(*borders[p : p + 2])]
            for rank in range(size)
        ]

    def owner(self, size, document):
        """The rank that has a document's final state; document 0 of a batch is all of it."""
        start, stop = (0, self.total) if self.documents is None else self.documents[document:][:2]
        last = size - 1 if self.layout == "contiguous" else 0
        token = stop - 1 if start < stop else start
        if self.documents is None:
            return last
        return next((r for r, held in enumerate(self.positions(size)) if token in held), last)


def device_of(group):
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def run(group, problem):
    """This rank's part of what `Problem.truth` gives, by name, with its whole final state."""
    device, rank, size = device_of(group), dist.get_rank(group), dist.get_world_size(group)
    q, k, v, log_decay, state, cu_seqlens = problem.inputs()
    num_states = q.shape[0] if cu_seqlens is None else len(problem.documents) - 1
    do, dfinal = cases.make_output_grads(v, v.new_empty(num_states, 5, 4, 6, dtype=_wide(v.dtype)))
    here = torch.tensor(problem.positions(size)[rank], dtype=torch.long)
    leaves = [x[:, here].to(device).requires_grad_() for x in (q, k, v)]
    initial = None
    if state is not None and (rank == 0 or cu_seqlens is not None):
        initial = state.to(device).requires_grad_()
    options = dict(
        scale=0.3,
        initial_state=initial,
        output_final_state=problem.final,
        cu_seqlens=cu_seqlens,
        group=group,
        exchange=problem.method,
        layout=problem.layout,
        shard_lengths=problem.lengths,
    )
    result = lasp.lightning_attention(*leaves, log_decay.to(device), **options)
    if not problem.final:
        result.backward(do[:, here].to(device))
        return _named(result, None, leaves, initial)
    o, final = result
    # The whole sequence's gradients, cut as the outputs are; only a final state has one.
    mine = [problem.owner(size, n) == rank for n in range(num_states)]
    dfinal = dfinal * torch.tensor(mine)[:, None, None, None]
    torch.autograd.backward((o, final), (do[:, here].to(device), dfinal.to(device)))
    return _named(o, final, leaves, initial)


def _named(o, final, leaves, initial):
    """The results by name, on the CPU; None: not asked for."""
    results = dict(o=o, state=final, **dict(zip(("dq", "dk", "dv"), leaves, strict=True)))
    results["dinitial"] = initial
    return {
        name: (x.grad if name[0] == "d" else x.detach()).cpu()
        for name, x in results.items()
        if x is not None
    }


def run_all(group, problems):
    return [run(group, problem) for problem in problems]


def check(pool, size, *problems, bound=None, timeout=None):
    """Every problem over `size` ranks against the definition on one."""
    results = pool.run(run_all, problems, size=size, timeout=timeout)
    for i, problem in enumerate(problems):
        of_ranks = [of_rank[i] for of_rank in results]
        back = torch.tensor(sum(problem.positions(size), []), dtype=torch.long).argsort()
        joined = {
            name: torch.cat([each[name] for each in of_ranks], dim=1)[:, back]
            for name in ("o", "dq", "dk", "dv")
        }
        if problem.final:
            states = [each["state"] for each in of_ranks]
            joined["state"] = torch.stack(
                [states[problem.owner(size, n)][n] for n in range(len(states[0]))]
            )
        if problem.initial:
            joined["dinitial"] = sum(e["dinitial"] for e in of_ranks if "dinitial" in e)
        limit = bound or (1e-12 if problem.dtype == torch.float64 else 2e-6)
        cases.assert_close(joined, problem.truth(), limit, f"{size} ranks, {problem}")
    return results


def documents_that(meet, lengths, layout):
    """Boundaries of documents: on borders between places, across them, or both with empty ones."""
    borders = shard.chunk_boundaries(lengths, layout)
    total = borders[-1]
    if meet == "on":
        return borders
    if meet == "across":
        return (0, *sorted({(3 * a + b) // 4 + 1 for a, b in pairwise(borders) if a < b}), total)
    inner = sorted([0, *borders[1:-1:2], total // 3, total // 3, total // 3 + 1, total])
    return (0, *inner, total)


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
