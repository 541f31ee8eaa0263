"""Over ranks: gradients of all final states, how many states there are, and infinities."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp.ops import chunked
from tests.lasp import cases, sharded
from tests.lasp.sharded import METHODS, Problem


def final_state_gradients(group):
    """Each rank's own final state in the loss: its gradient reaches all earlier ranks."""
    q, k, v, log_decay, _ = cases.make_inputs(90, state=False)
    rank = dist.get_rank(group)
    here = slice(30 * rank, 30 * (rank + 1))
    leaves = [x[:, here].clone().requires_grad_() for x in (k, v)]
    _, final = lasp.lightning_attention(
        q[:, here], *leaves, log_decay, output_final_state=True, group=group
    )
    ((rank + 1) * final).sum().backward()
    return [x.grad for x in leaves]


def test_gradients_of_every_final_state(pool):
    results = pool.run(final_state_gradients, size=3)
    q, k, v, log_decay, _ = cases.make_inputs(90, state=False)
    k, v = k.requires_grad_(), v.requires_grad_()
    for rank, stop in enumerate((30, 60, 90)):
        _, state = lasp.reference.quadratic(q[:, :stop], k[:, :stop], v[:, :stop], log_decay)
        ((rank + 1) * state).sum().backward()
    for i, whole in enumerate((k, v)):
        joined = torch.cat([grads[i] for grads in results], dim=1)
        assert cases.relative_error(joined, whole.grad) < 1e-12


def rows_of_states(group, problem):
    """How many states each step of the arithmetic is given or gives."""
    rows = []

    def noting(function):
        def call(*args, **kwargs):
            results = function(*args, **kwargs)
            tensors = results if isinstance(results, tuple) else (results,)
            for x in (kwargs.get("initial_state"), *tensors):
                if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[1] == problem.heads[0]:
                    rows.append(len(x))
            return results

        return call

    with contextlib.ExitStack() as stack:
        for name in ("chunk_states", "scan", "scan_dkdv"):
            call = noting(getattr(chunked, name))
            stack.enter_context(mock.patch.object(chunked, name, call))
        sharded.run(group, problem)
    return rows


@pytest.mark.parametrize(("layout", "most"), [("contiguous", 2), ("zigzag", 3)])
def test_states_do_not_grow_with_the_documents(pool, layout, most):
    # One across every border between ranks, and many that are whole on one.
    documents = (0, *range(1, 60, 2), 60)
    problem = Problem(60, layout=layout, documents=documents, initial=False, final=False)
    for rows in pool.run(rows_of_states, problem, size=3):
        # In the forward and in the backward.
        assert len(rows) >= 2 and 0 < max(rows) <= most


def infinite_document(group, method):
    """The output of a document that follows one with an infinite state."""
    rank = dist.get_rank(group)
    q, k, v, log_decay, _ = cases.make_inputs(4, state=False)
    if rank == 0:
        v[:] = torch.inf
    cu_seqlens = torch.tensor([0, 6, 12], dtype=torch.int32)
    o = lasp.lightning_attention(
        q, k, v, log_decay, cu_seqlens=cu_seqlens, group=group, exchange=method
    )
    return bool(o[:, 2:].isfinite().all()), bool(o[:, :2].isfinite().any())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_leaks_from_one_document_into_the_next(pool, method):
    # The border lies inside rank 1's part.
    results = pool.run(infinite_document, method, size=3)
    assert results == [(False, False), (True, False), (True, True)]
