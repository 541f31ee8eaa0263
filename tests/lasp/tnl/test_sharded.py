"""The model over ranks is the model on one device: logits, loss, gradients, states."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lasp import SequenceShard
from lasp.tnl import TNL, TNLConfig, TNLState
from lasp.tnl.generation import stream

CONFIG = TNLConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)

HYBRID = dataclasses.replace(CONFIG, layer_types="LSL", num_key_value_heads=2)

BOUNDARIES = [(0, 50, 100), (0, 1, 63), (0, 7, 64, 100), (0, 40, 40, 63), (0, 0, 1, 1)]


def make(config, dtype):
    torch.manual_seed(0)
    return TNL(config).to(dtype)


def batch_of(total):
    generator = torch.Generator().manual_seed(total)
    tokens = torch.randint(50, (2, total + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]  # shifted before sharding


def initial_states(config, dtype):
    generator = torch.Generator().manual_seed(7)
    # States are float32 or, in a float64 model on the CPU, float64.
    shapes = [
        (2, 2, 333, 2, 8) if config.is_softmax(i) else (2, 4, config.key_dim(i), 8)
        for i in range(3)
    ]
    layers = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return TNLState(layers, 333)


def loss_and_grads(model, tokens, labels, total, shard, states):
    logits, final = model(tokens, shard, states=states, return_states=True)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return logits.detach(), loss.detach(), grads, final


def on_one_rank(group, config, boundaries, dtype, exchange, with_state, with_lengths):
    rank, total = dist.get_rank(group), boundaries[-1]
    lengths = tuple(stop - start for start, stop in pairwise(boundaries)) if with_lengths else None
    shard = SequenceShard(
        boundaries[rank], boundaries[rank + 1], total, group, exchange, lengths=lengths
    )
    tokens, labels = (x[:, shard.token_slice] for x in batch_of(total))
    states = initial_states(config, dtype) if with_state else None
    model = make(config, dtype)
    logits, loss, grads, final = loss_and_grads(model, tokens, labels, total, shard, states)
    for tensor in (loss, *grads.values()):
        dist.all_reduce(tensor, group=group)
    last = [x.detach() for x in final.layers]
    return logits, loss, grads, last, final.position


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("boundaries", BOUNDARIES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_state", [False, True])
def test_sharded_model_is_the_full_model(pool, boundaries, dtype, tolerance, with_state):
    check(pool, boundaries, dtype, tolerance, "ring", with_state)


@pytest.mark.parametrize("boundaries", BOUNDARIES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "with_state", "with_lengths"),
    [
        (torch.float64, 1e-7, True, True),
        (torch.float64, 1e-7, True, False),
        (torch.float32, 1e-5, False, True),
    ],
)
def test_sharded_hybrid_is_the_full_model(
    pool, boundaries, dtype, tolerance, with_state, with_lengths
):
    """A shard is given all lengths, or the ranks exchange them."""
    check(pool, boundaries, dtype, tolerance, "ring", with_state, HYBRID, with_lengths)


def zigzag(group, config, total, exchange):
    """This rank's positions, logits, gradients, and (position, states) after its last token."""
    shard = SequenceShard.split(total, group, exchange, layout="zigzag")
    tokens, labels = (shard.take(x) for x in batch_of(total))
    model = make(config, torch.float64)
    logits, _, grads, final = loss_and_grads(model, tokens, labels, total, shard, None)
    for grad in grads.values():
        dist.all_reduce(grad, group=group)
    states = [x.detach() for x in final.layers] if shard.is_last else None
    return shard.positions(), logits, grads, final.position, states


@pytest.mark.parametrize("total", [2, 62, 100])
@pytest.mark.parametrize(("exchange", "size"), [("ring", 3), ("all_gather", 2), ("doubling", 4)])
def test_zigzag_shards_are_the_full_model(pool, exchange, size, total):
    logits, _, grads, final = loss_and_grads(
        make(HYBRID, torch.float64), *batch_of(total), total, None, None
    )
    results = pool.run(zigzag, HYBRID, total, exchange, size=size)
    for here, rank_logits, rank_grads, position, states in results:
        if len(here):
            assert error(rank_logits, logits[:, here]) < 1e-7
            assert position == here.max() + 1
        for name, grad in grads.items():
            if grad.abs().max() > 0:
                assert error(rank_grads[name], grad) < (1e-5 if name.endswith("theta") else 1e-7)
        for mine, wanted in zip(states or (), final.layers, strict=False):
            assert error(mine, wanted) < 1e-7
    assert sum(states is not None for *_, states in results) == 1


@pytest.mark.parametrize("exchange", ["all_gather", "doubling"])
def test_other_exchanges(pool, exchange):
    check(pool, (0, 7, 64, 100), torch.float32, 1e-5, exchange, False)


DOCUMENTS = (0, 30, 30, 47, 63)


def packed(tokens, shard):
    state = initial_states(CONFIG, torch.float64)
    # Four documents, each with its own state.
    state.layers = [torch.cat([x, 2 * x]) for x in state.layers]
    options = dict(states=state, cu_seqlens=torch.tensor(DOCUMENTS, dtype=torch.int32))
    return make(CONFIG, torch.float64)(tokens, shard, return_states=True, **options)


def packed_on_one_rank(group):
    shard = SequenceShard.split(63, group)
    return packed(shard.take(batch_of(63)[0][:1]), shard)


@torch.no_grad()
def test_documents_that_begin_on_any_rank_continue_from_their_states(pool):
    tokens = batch_of(63)[0][:1]
    logits, final = packed(tokens, None)
    results = pool.run(packed_on_one_rank, size=3)
    assert error(torch.cat([of_rank[0] for of_rank in results], 1), logits) < 1e-7
    # With 21 tokens per rank: the rank on which each document ends, the empty one included.
    for document, owner in enumerate((1, 1, 2, 2)):
        for mine, wanted in zip(results[owner][1].layers, final.layers, strict=True):
            assert error(mine[document], wanted[document]) < 1e-7


def check(
    pool, boundaries, dtype, tolerance, exchange, with_state, config=CONFIG, with_lengths=False
):
    total, size = boundaries[-1], len(boundaries) - 1
    options = (config, boundaries, dtype, exchange, with_state, with_lengths)
    results = pool.run(on_one_rank, *options, size=size)
    states = initial_states(config, dtype) if with_state else None
    logits, loss, grads, final = loss_and_grads(
        make(config, dtype), *batch_of(total), total, None, states
    )
    assert error(torch.cat([result[0] for result in results], 1), logits) < tolerance
    for name, state in enumerate(final.layers):
        assert error(results[-1][3][name], state) < tolerance
    assert results[-1][4] == final.position == total + (333 if with_state else 0)
    for _, rank_loss, rank_grads, _, _ in results:
        assert error(rank_loss, loss) < tolerance
        # The gradient of LRPE rates is stored in float32, in float64 too.
        for name, grad in grads.items():
            if grad.abs().max() > 0:
                assert error(rank_grads[name], grad) < max(tolerance, 1e-5 * name.endswith("theta"))


def generate_on_one_rank(group, length, chunk, decay):
    model = make(dataclasses.replace(CONFIG, decay=decay), torch.float64)
    prompt = batch_of(length)[0][0]
    return torch.cat(list(stream(model, [prompt], 12, prefill_chunk=chunk, group=group)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (2, 16), (63, 16), (100, 1000)])
@pytest.mark.parametrize("decay", ["fixed", "learned"])
def test_ranks_that_read_a_prompt_together_generate_what_one_does(pool, size, length, chunk, decay):
    model = make(dataclasses.replace(CONFIG, decay=decay), torch.float64)
    expected = model.generate(batch_of(length)[0][:1], 12)[0, length:]
    for found in pool.run(generate_on_one_rank, length, chunk, decay, size=size):
        assert torch.equal(found, expected)


def refusals_on_one_rank(group):
    found = []
    for config, count in ((HYBRID, 1), (CONFIG, 2)):
        try:
            stream(make(config, torch.float32), [torch.zeros(3).long()] * count, 5, group=group)
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_ranks_cannot_read_together_is_refused(pool):
    for hybrid, several in pool.run(refusals_on_one_rank, size=2):
        assert "1 of 3 layers are softmax attention" in hybrid
        assert "there are 2 prompts" in several
