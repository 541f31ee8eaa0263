"""The operator under torch.compile, checkpointing, meta tensors, profilers and dispatch modes."""

import collections
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lasp
from tests.lasp import cases
from tests.lasp.sharded import LAYOUTS

with_state = functools.partial(lasp.lightning_attention, output_final_state=True)


DECAYS = pytest.mark.parametrize("by_token", [False, True], ids=["constant", "by_token"])


def make_inputs(T, by_token, **options):
    """As of `cases`; `by_token`: with a decay per token."""
    inputs = list(cases.make_inputs(T, dtype=torch.float32, **options))
    if by_token:
        generator = torch.Generator().manual_seed(4)
        inputs[3] = -torch.rand(inputs[0].shape[:3], generator=generator)
    return inputs


@DECAYS
def test_compiles_without_a_graph_break_and_checkpoints(by_token):
    q, k, v, log_decay, state = make_inputs(80, by_token)

    def layer(q, k, v, log_decay, state):
        # What computes a decay is traced with the operator.
        log_decay = log_decay * 1.5 if by_token else log_decay
        o, final = with_state(q * 2, k, v, log_decay, initial_state=state)
        return o.sin(), final

    def run(function):
        results = cases.forward_and_gradients(
            lambda *args, initial_state: function(*args, initial_state), q, k, v, log_decay, state
        )
        assert ("dlog_decay" in results) == by_token
        return results

    truth = run(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    cases.assert_close(run(compiled), truth, 1e-6, "compiled")
    for use_reentrant in (True, False):
        again = run(lambda *args, r=use_reentrant: checkpoint(layer, *args, use_reentrant=r))
        cases.assert_close(again, truth, 0, f"checkpointed, reentrant {use_reentrant}")


def compiled_over_ranks(group, layout, documents, by_token):
    """Whether a compiled layer has the outputs and gradients of an eager one."""
    q, k, v, log_decay, _ = make_inputs(20, by_token)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    options = dict(group=group, layout=layout, cu_seqlens=cu_seqlens)

    def layer(q, k, v, log_decay=log_decay):
        return lasp.lightning_attention(q * 2, k, v, log_decay, **options).sin()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        inputs = (q, k, v, log_decay) if by_token else (q, k, v)
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = function(*leaves)
        o.sum().backward()
        results.append([o, *(x.grad for x in leaves)])
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "layout, documents", [("contiguous", None), ("zigzag", None), ("zigzag", (0, 7, 40))]
)
@DECAYS
def test_compiles_over_ranks_without_a_graph_break(pool, layout, documents, by_token):
    assert all(pool.run(compiled_over_ranks, layout, documents, by_token, size=2))


@DECAYS
@pytest.mark.parametrize("final", [False, True])
def test_meta_tensors_get_shapes_and_dtypes(final, by_token):
    inputs = [x.to("meta") for x in cases.make_inputs(70, B=2, dtype=torch.bfloat16)]
    if by_token:
        inputs[3] = torch.empty(2, 70, 3, device="meta")
    leaves = [x.requires_grad_() for x in inputs[: 3 + by_token]]
    o = lasp.lightning_attention(*inputs[:4], initial_state=inputs[4], output_final_state=final)
    o, state = o if final else (o, inputs[4])
    o.sum().backward()
    assert (o.shape, o.dtype) == (inputs[2].shape, torch.bfloat16)
    assert (state.shape, state.dtype) == (inputs[4].shape, torch.float32)
    assert all(x.grad.is_meta and x.grad.shape == x.shape for x in leaves)


class Recorder(TorchDispatchMode):
    """Calls of this library's operators: (operator, arguments, keyword arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("lasp::"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return [func.name() for func, _, _ in self.calls]


@DECAYS
def test_operators_are_registered_soundly(by_token):
    inputs = make_inputs(70, by_token)
    with Recorder() as recorder:
        cases.forward_and_gradients(with_state, *inputs)
    assert len(recorder.calls) >= 2, "a forward and a backward at least"
    backward, arguments, _ = recorder.calls[-1]
    names = [argument.name for argument in backward._schema.arguments]
    assert arguments[names.index("needs_ddecay")] is by_token
    for func, args, kwargs in recorder.calls:
        args, kwargs = torch.utils._pytree.tree_map(detached, (args, kwargs))
        torch.library.opcheck(func, args, kwargs)


def checkpointed_over_ranks(group, save_exchanges):
    """Results of a layer, and of the same one recomputed in the backward; how often each ran each
    operator."""
    q, k, v, log_decay, _ = make_inputs(20, True, state=False)

    def layer(q, k, v, log_decay):
        return lasp.lightning_attention(q * 2, k, v, log_decay * 1.5, group=group).sin()

    def policy(context, op, *args, **kwargs):
        saved = op.name().startswith("lasp::state_fwd")
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    options = {}
    if save_exchanges:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    again = functools.partial(checkpoint, layer, use_reentrant=False, **options)
    results, counts = [], []
    for function in (layer, again):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, log_decay)]
        with Recorder() as recorder:
            o = function(*leaves)
            o.square().sum().backward()
        results.append([o.detach(), *(x.grad for x in leaves)])
        counts.append(collections.Counter(recorder.names))
    return results, counts


@pytest.mark.parametrize("save_exchanges", [False, True], ids=["plain", "selective"])
def test_checkpoints_of_a_decay_per_token_over_ranks(pool, save_exchanges):
    for results, (once, twice) in pool.run(checkpointed_over_ranks, save_exchanges, size=2):
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        state, scan, backward = once
        assert (state, scan, backward) == ("lasp::state_fwd", "lasp::attn_fwd", "lasp::attn_bwd")
        assert set(once.values()) == {1}
        assert twice == {state: 1 if save_exchanges else 2, scan: 2, backward: 1}


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


@DECAYS
def test_profilers_and_modes_see_the_same_operators_and_change_no_bit(by_token):
    """Without them, the dispatcher is bypassed."""
    inputs = make_inputs(70, by_token)
    alone = cases.forward_and_gradients(with_state, *inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = cases.forward_and_gradients(with_state, *inputs)
    cases.assert_close(profiled, alone, 0, "profiled")
    with Recorder() as recorder:
        recorded = cases.forward_and_gradients(with_state, *inputs)
    cases.assert_close(recorded, alone, 0, "under a mode")
    seen = {event.name for event in profile.events()}
    assert len(recorder.names) >= 2 and set(recorder.names) <= seen


def with_and_without_a_mode(group, layout, packed, states, by_token):
    """Results without and with a dispatch mode, and the operators seen there."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    q, k, v, log_decay, state = make_inputs(12, by_token, N=2 if packed else None)
    options = dict(group=group, layout=layout, output_final_state=states)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 17, 12 * size], dtype=torch.int32)
    found = []
    # Without gradients of k and v, the backward has nothing to exchange.
    for needing in ("qkv", "q"):
        for mode in (None, Recorder()):
            leaves = dict(q=q.clone(), k=k.clone(), v=v.clone())
            if states and (packed or rank == 0):
                options["initial_state"] = state.clone().requires_grad_(needing == "qkv")
            needed = [leaves[name].requires_grad_() for name in needing]
            leaves["log_decay"] = log_decay.clone().requires_grad_(by_token and needing == "qkv")
            if leaves["log_decay"].requires_grad:
                needed.append(leaves["log_decay"])
            if "initial_state" in options and needing == "qkv":
                needed.append(options["initial_state"])
            # Without a mode the dispatcher is bypassed: no operator is there to be called.
            with mode or mock.patch.object(torch.ops, "lasp", None):
                outputs = lasp.lightning_attention(**leaves, **options)
                outputs = outputs if states else (outputs,)
                sum(x.square().sum() for x in outputs).backward()
            results = [*(x.detach() for x in outputs), *(x.grad for x in needed)]
            found.append((results, mode and mode.names))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("states", [False, True], ids=["plain", "states"])
@DECAYS
def test_a_mode_over_ranks_sees_operators_and_changes_no_bit(
    pool, layout, packed, states, by_token
):
    for found in pool.run(with_and_without_a_mode, layout, packed, states, by_token, size=2):
        for (plain, _), (moded, names) in zip(found[::2], found[1::2], strict=True):
            assert len(names) >= 2
            assert len(plain) == len(moded)
            assert all(torch.equal(a, b) for a, b in zip(plain, moded, strict=True))
