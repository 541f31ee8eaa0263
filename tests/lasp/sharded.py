"""One problem cut over ranks, and the results of all ranks compared with the definition.

Where a rank's tokens are is computed here from the rule (rank r of P holds chunk r of P, or in
zigzag chunks r and 2P-1-r of 2P), and not by the product's own functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist

import lasp
from tests.lasp import cases
from tests.poison import poison

LAYOUTS = ("contiguous", "zigzag")
# "auto" is one of these, by where it runs.
METHODS = ["all_gather", "doubling", "ring"]


@dataclass(frozen=True)
class Problem:
    """What is computed, and how it is cut.

    lengths: tokens of every rank; None: the even cut, which the operator is not told. documents:
    boundaries, or None for a batch. rates: log decay of all heads, or a function of (heads, tokens)
    that gives them, [heads] or [1, tokens, heads], in place of those of `cases`. heads: number, key
    size, value size. final: whether final states are asked for.
    """

    total: int
    method: str = "ring"
    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = None
    documents: tuple[int, ...] | None = None
    initial: bool = True
    dtype: torch.dtype = torch.float64
    rates: float | Callable | None = None
    final: bool = True
    heads: tuple[int, int, int] = (5, 4, 6)
    batch: int = 2

    @property
    def num_states(self) -> int:
        return self.batch if self.documents is None else len(self.documents) - 1

    def inputs(self):
        """(q, k, v, log_decay, initial_state, cu_seqlens) of the whole sequence."""
        H, D, E = self.heads
        B = self.batch if self.documents is None else 1
        q, k, v, log_decay, state = cases.make_inputs(
            self.total,
            B=B,
            H=H,
            D=D,
            E=E,
            dtype=self.dtype,
            state=self.initial,
            N=self.num_states,
        )
        if callable(self.rates):
            log_decay = self.rates(H, self.total)
            if log_decay is not None and log_decay.dim() > 1:
                wide = torch.float64 if self.dtype == torch.float64 else torch.float32
                log_decay = log_decay.expand(B, -1, -1).to(wide, copy=True)
        elif self.rates is not None:
            log_decay = torch.full_like(log_decay, self.rates)
        cu_seqlens = None
        if self.documents is not None:
            cu_seqlens = torch.tensor(self.documents, dtype=torch.int32)
        # Products of keys as long as a GPU has them stay within float16.
        scale = D**0.25 if D > 32 else 1
        return q / scale, k / scale, v, log_decay, state, cu_seqlens

    def truth(self, device="cpu"):
        return self._computed(torch.float64, device)

    def plain(self, device="cpu"):
        """What plain torch computes in the problem's own dtype."""
        return self._computed(self.dtype, device)

    def _computed(self, dtype, device):
        *inputs, cu_seqlens = self.inputs()
        inputs = [None if x is None else x.to(device, dtype) for x in inputs]
        results = cases.forward_and_gradients(
            lasp.reference.quadratic,
            *inputs,
            with_final=self.final,
            scale=0.3,
            cu_seqlens=cu_seqlens,
        )
        return {name: x.cpu() for name, x in results.items()}

    def chunks(self, size):
        """(start, stop) of the chunks of each rank, in the order it holds them."""
        return chunks_of(self.lengths or even(self.total, size, self.layout), self.layout)

    def positions(self, size):
        """Global positions of the tokens of each rank, in the order it holds them."""
        return positions_of(self.lengths or even(self.total, size, self.layout), self.layout)

    def owner(self, size, document):
        """The rank that has a document's final state; document 0 of a batch is all of it."""
        start, stop = (0, self.total) if self.documents is None else self.documents[document:][:2]
        last = size - 1 if self.layout == "contiguous" else 0
        token = stop - 1 if start < stop else start
        if self.documents is None:
            return last
        return next((r for r, held in enumerate(self.positions(size)) if token in held), last)

    def states_of_ranks(self, size, device="cpu"):
        """Every rank's final states but those of empty documents, {(rank, number): state}."""
        q, k, v, log_decay, initial, _ = self.inputs()
        k, v, log_decay, initial = (
            None if x is None else x.to(device, torch.float64) for x in (k, v, log_decay, initial)
        )

        @functools.cache
        def state_after(number, stop):
            b, start = (number, 0) if self.documents is None else (0, self.documents[number])
            cut = slice(start, stop)
            by_token = log_decay is not None and log_decay.dim() > 1
            _, state = lasp.reference.quadratic(
                k[b : b + 1, cut],
                k[b : b + 1, cut],
                v[b : b + 1, cut],
                log_decay[b : b + 1, cut] if by_token else log_decay,
                initial_state=None if initial is None else initial[number : number + 1],
            )
            return state[0].cpu()

        found = {}
        for rank, chunks in enumerate(self.chunks(size)):
            for number in range(self.num_states):
                if self.documents is None:
                    found[rank, number] = state_after(number, chunks[-1][1])
                    continue
                start, stop = self.documents[number : number + 2]
                ends = [min(stop, b) for a, b in chunks if max(start, a) < min(stop, b)]
                if ends:
                    found[rank, number] = state_after(number, max(ends))
                elif start < stop:
                    found[rank, number] = torch.zeros(self.heads, dtype=torch.float64)
        return found


def even(total, size, layout):
    """Tokens of each rank in the even cut: the first ones hold more; zigzag counts in pairs."""
    if layout == "zigzag":
        return tuple(2 * pairs for pairs in even(total // 2, size, "contiguous"))
    return tuple(total // size + (rank < total % size) for rank in range(size))


def boundaries(lengths, layout):
    """Where each chunk begins, and at last the total."""
    if layout == "zigzag":
        halves = [length // 2 for length in lengths]
        lengths = (*halves, *halves[::-1])
    return (0, *accumulate(lengths))


def chunks_of(lengths, layout):
    """(start, stop) of the chunks of each rank, in the order it holds them."""
    edges, ranks = boundaries(lengths, layout), range(len(lengths))
    held = [(r,) if layout == "contiguous" else (r, -2 - r) for r in ranks]
    return [[(edges[c], edges[c + 1]) for c in chunks] for chunks in held]


def positions_of(lengths, layout):
    """Global positions of the tokens of each rank, in the order it holds them."""
    return [
        [t for chunk in of_rank for t in range(*chunk)] for of_rank in chunks_of(lengths, layout)
    ]


def documents_that(meet, lengths, layout):
    """Boundaries of documents: on those of chunks, across them, or both with empty ones; "through":
    in the chunk after the middle alone, so that a document goes through all of those before."""
    edges = boundaries(lengths, layout)
    total = edges[-1]
    if meet == "on":
        return edges
    if meet == "across":
        return (0, *sorted({(3 * a + b) // 4 + 1 for a, b in pairwise(edges) if a < b}), total)
    if meet == "through":
        middle = (len(edges) - 1) // 2
        return (0, (edges[middle] + edges[middle + 1] + 1) // 2, total)
    inner = sorted([0, *edges[1:-1:2], total // 3, total // 3, total // 3 + 1, total])
    return (0, *(min(x, total) for x in inner), total)


def device_of(group):
    cuda = group is not None and dist.get_backend(group) == "nccl"
    return torch.device("cuda" if cuda else "cpu")


def run(group, problem, device=None):
    """This rank's part of what `Problem.truth` gives, by name, with its whole final state.

    Without a group, all of it is here.
    """
    device = device or device_of(group)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    q, k, v, log_decay, state, cu_seqlens = problem.inputs()
    H, D, E = problem.heads
    shape = (problem.num_states, H, D, E)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    do, dfinal = cases.make_output_grads(v, v.new_empty(shape, dtype=wide))
    here = torch.tensor(problem.positions(size)[rank], dtype=torch.long)
    leaves = dict(dq=q, dk=k, dv=v)
    if log_decay is not None and log_decay.dim() > 1:
        # A decay per token is cut as the tokens are, and may have a gradient.
        leaves["dlog_decay"] = log_decay
    leaves = {name: x[:, here].to(device).requires_grad_() for name, x in leaves.items()}
    constant = None if log_decay is None else log_decay.to(device)
    arguments = [*leaves.values(), *([] if "dlog_decay" in leaves else [constant])]
    initial = None
    if state is not None and (rank == 0 or cu_seqlens is not None):
        initial = leaves["dinitial"] = state.to(device).requires_grad_()
    over_ranks = dict(
        group=group,
        exchange=problem.method,
        layout=problem.layout,
        shard_lengths=problem.lengths,
    )
    with poison():
        result = lasp.lightning_attention(
            *arguments,
            scale=0.3,
            initial_state=initial,
            output_final_state=problem.final,
            cu_seqlens=cu_seqlens,
            **({} if group is None else over_ranks),
        )
        o, final = result if problem.final else (result, None)
        outputs, grads = [o], [do[:, here].to(device)]
        if problem.final:
            # The whole sequence's gradients, cut as the outputs are; only a final state has one.
            mine = [problem.owner(size, n) == rank for n in range(problem.num_states)]
            outputs.append(final)
            grads.append((dfinal * torch.tensor(mine)[:, None, None, None]).to(device))
        torch.autograd.backward(outputs, grads)
    results = dict(o=o, state=final) if problem.final else dict(o=o)
    results |= {name: leaf.grad for name, leaf in leaves.items()}
    return {name: x.detach().cpu() for name, x in results.items()}


def run_all(group, problems):
    return [run(group, problem) for problem in problems]


def check(pool, size, *problems, bound=None, timeout=None, device="cpu"):
    """Every problem over `size` ranks against the definition on one, computed on `device`."""
    results = pool.run(run_all, problems, size=size, timeout=timeout)
    for i, problem in enumerate(problems):
        limit = bound or (1e-12 if problem.dtype == torch.float64 else 2e-6)
        of_ranks = [of_rank[i] for of_rank in results]
        truth = problem.truth(device)
        compare(of_ranks, problem, truth, limit, f"{size} ranks, {problem}", device)
    return results


def compare(of_ranks, problem, truth, limit, what="", device="cpu"):
    """The results of all ranks, each within `limit` (a number, or one per name) of the truth."""
    size = len(of_ranks)
    back = torch.tensor(sum(problem.positions(size), []), dtype=torch.long).argsort()
    joined = {
        name: torch.cat([each[name] for each in of_ranks], dim=1)[:, back]
        for name in truth
        if name not in ("state", "dinitial")
    }
    if problem.final:
        states = [each["state"] for each in of_ranks]
        joined["state"] = torch.stack(
            [states[problem.owner(size, n)][n] for n in range(problem.num_states)]
        )
        bound = limit["state"] if isinstance(limit, dict) else limit
        for (rank, number), wanted in problem.states_of_ranks(size, device).items():
            error = cases.relative_error(states[rank][number], wanted)
            if not wanted.any():
                error = float(states[rank][number].abs().max())
            assert error <= bound, (
                f"{what} state {number} of rank {rank}: {error:.3g} > {bound:.3g}"
            )
    if problem.initial:
        joined["dinitial"] = sum(e["dinitial"] for e in of_ranks if "dinitial" in e)
    cases.assert_close(joined, truth, limit, what)
