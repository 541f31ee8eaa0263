"""What only a decay per token can do: reset the state, be all that learns, and share q and k."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import lasp
from tests.lasp import cases, sharded
from tests.operator.backends import take_cpu_tensors_for_the_gpus
from tests.poison import poison

# One boundary is that of a segment in the interpreter, and of a shard on two ranks; one document
# has a single token.
DOCUMENTS = (0, 13, 64, 65, 128)
H = 3


@pytest.fixture(params=["cpu", "interpreter"])
def one_device(request, pool):
    """run(function, *args) in another process, with the CPU backend or the Triton kernels."""
    on_cpu = request.param == "cpu"
    ranks = pool if on_cpu else request.getfixturevalue("interpreters")

    def run(function, *args):
        return ranks.run(on_kernels, on_cpu, function, *args, size=1)[0]

    return run


def on_kernels(group, on_cpu, function, *args):
    if on_cpu:
        return function(*args)
    take_cpu_tensors_for_the_gpus()
    from tests.lasp.ops.triton.launch_constants import launch_constants

    with launch_constants(segment_length=64), poison():
        return function(*args)


def make_inputs(T=DOCUMENTS[-1], dtype=torch.float32):
    """(q, k, v, a decay per token, do)"""
    q, k, v, _, _ = cases.make_inputs(T, H=H, dtype=dtype, state=False)
    generator = torch.Generator().manual_seed(2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_decay = -0.05 * torch.rand(1, T, H, generator=generator).to(wide)
    do = torch.randn(v.shape, generator=generator).to(dtype)
    return q, k, v, log_decay, do


def results(q, k, v, log_decay, do, **options):
    """o and all gradients, by name."""
    leaves = dict(dq=q, dk=k, dv=v, dlog_decay=log_decay)
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    o = lasp.lightning_attention(*leaves.values(), scale=0.3, **options)
    o.backward(do)
    return dict(o=o.detach()) | {name: x.grad for name, x in leaves.items()}


def reset_and_packed(group=None):
    """Results of a sequence whose state is reset, and of packed documents that start there."""
    inputs = make_inputs()
    starts = list(DOCUMENTS[1:-1])
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    here = slice(rank * 128 // size, (rank + 1) * 128 // size)
    found = []
    for value in (-torch.inf, -1.0):
        inputs[3][:, starts] = value
        cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32) if value == -1 else None
        mine = [x[:, here] for x in inputs]
        found.append(results(*mine, cu_seqlens=cu_seqlens, group=group))
    return found, [t - here.start for t in starts if here.start <= t < here.stop]


def check_resets(reset, packed, starts):
    for name, x in reset.items():
        assert x.isfinite().all(), name
    largest = packed["dlog_decay"].abs().max()
    for each in (reset, packed):
        # Nothing passes a reset, and nothing enters a document.
        assert (each["dlog_decay"][:, starts].abs() <= 2e-6 * largest).all()
    cases.assert_close(reset, packed, 2e-6, "reset")


def test_an_infinite_decay_is_the_start_of_a_document(one_device):
    (reset, packed), starts = one_device(reset_and_packed)
    assert len(starts) == 3
    check_resets(reset, packed, starts)


def test_an_infinite_decay_is_the_start_of_a_document_over_ranks(pool):
    for (reset, packed), starts in pool.run(reset_and_packed, size=2):
        check_resets(reset, packed, starts)


def decay_alone():
    """Gradients of a decay when q, k, v need one too, and when they need none."""
    *inputs, log_decay, do = make_inputs()
    together = results(*inputs, log_decay, do)["dlog_decay"]
    leaf = log_decay.clone().requires_grad_()
    o, state = lasp.lightning_attention(*inputs, leaf, scale=0.3, output_final_state=True)
    o.backward(do, retain_graph=True)
    (of_state,) = torch.autograd.grad(state.sum(), leaf)
    return leaf.grad, together, of_state


def test_a_decay_may_be_all_that_needs_a_gradient(one_device):
    alone, together, of_state = one_device(decay_alone)
    assert torch.equal(alone, together)
    q, k, v, log_decay, do = (x.double() for x in make_inputs())
    log_decay.requires_grad_()
    o, state = lasp.reference.quadratic(q, k, v, log_decay, scale=0.3)
    (want,) = torch.autograd.grad(o, log_decay, do, retain_graph=True)
    (want_of_state,) = torch.autograd.grad(state.sum(), log_decay)
    assert cases.relative_error(alone, want) <= 2e-6
    assert cases.relative_error(of_state, want_of_state) <= 2e-6


def decay_alone_over_ranks(group, layout, method):
    *inputs, log_decay, do = make_inputs(60, torch.float64)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    here = sharded.positions_of(sharded.even(60, size, layout), layout)[rank]
    *mine, leaf, do = (x[:, here].clone() for x in (*inputs, log_decay, do))
    leaf.requires_grad_()
    o = lasp.lightning_attention(*mine, leaf, group=group, layout=layout, exchange=method)
    o.backward(do)
    return here, leaf.grad


@pytest.mark.parametrize("layout", sharded.LAYOUTS)
@pytest.mark.parametrize("method", sharded.METHODS)
def test_a_decay_may_be_all_that_needs_a_gradient_over_ranks(pool, layout, method):
    q, k, v, log_decay, do = make_inputs(60, torch.float64)
    o, _ = lasp.reference.quadratic(q, k, v, log_decay.requires_grad_())
    (want,) = torch.autograd.grad(o, log_decay, do)
    for here, found in pool.run(decay_alone_over_ranks, layout, method, size=3):
        assert cases.relative_error(found, want[:, here]) <= 1e-12


@contextlib.contextmanager
def operands_of_kernels():
    """Within, a list of the tensors of every launch."""
    from lasp.ops.triton.launcher import CachedLaunch

    seen, ordinary = [], CachedLaunch.__call__

    def noting(launch, programs, *tensors):
        seen.extend(x for x in tensors if x is not None)
        ordinary(launch, programs, *tensors)

    with mock.patch.object(CachedLaunch, "__call__", noting):
        yield seen


def shared_by_heads(with_kernels):
    """Results for q and k that all heads share; how many tensors of their size kernels used."""
    q, k, v, log_decay, do = make_inputs()
    leaves = [x.clone().requires_grad_() for x in (q[:, :, :1], k[:, :, :1], v, log_decay)]
    wide = [x.expand(-1, -1, H, -1) for x in leaves[:2]]
    assert all(x.stride(2) == 0 for x in wide)
    noting = operands_of_kernels() if with_kernels else contextlib.nullcontext([])
    with noting as operands:
        o = lasp.lightning_attention(*wide, *leaves[2:], scale=0.3)
        o.backward(do)
    used = {x.data_ptr() for x in operands if x.shape == q.shape}
    read = {x.data_ptr() for x in wide}
    return [o.detach(), *(x.grad for x in leaves)], read <= used, len(used - read)


@pytest.mark.parametrize("with_kernels", [False, True], ids=["cpu", "interpreter"])
def test_heads_may_share_keys_and_queries(pool, interpreters, with_kernels):
    ranks = interpreters if with_kernels else pool
    arguments = not with_kernels, shared_by_heads, with_kernels
    (found, are_read, others) = ranks.run(on_kernels, *arguments, size=1)[0]
    if with_kernels:
        # The others are dq and dk: no copy was made.
        assert are_read and others == 2
    q, k, v, log_decay, do = (x.double() for x in make_inputs())
    leaves = [x.clone().requires_grad_() for x in (q[:, :, :1], k[:, :, :1], v, log_decay)]
    wide = [x.expand(-1, -1, H, -1) for x in leaves[:2]]
    o, _ = lasp.reference.quadratic(*wide, *leaves[2:], scale=0.3)
    o.backward(do)
    for x, want in zip(found, [o.detach(), *(x.grad for x in leaves)], strict=True):
        assert x.shape == want.shape
        assert cases.relative_error(x, want) <= 2e-6
