"""A sequence in segments has the loss and the gradients of one pass, alone and over ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lasp import SequenceShard, functional
from lasp.shard import split_lengths
from lasp.tnl import TNL, TNLConfig
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.loss import chunked_cross_entropy
from parallel.streaming import backward_in_segments, loss_in_segments

TOKENS = 300
# Of rows with documents: some shorter than a segment, one longer, one that ends with a segment.
DOCUMENTS = (0, 20, 23, 126, 189, 300)


def make(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)
    return TNL(TNLConfig(**(shape | changes))).to(dtype)


def data_of(tokens, rows=2):
    generator = torch.Generator().manual_seed(tokens)
    both = torch.randint(50, (rows, tokens + 1), generator=generator)
    return both[:, :-1], both[:, 1:]


def loss_of(model, hidden, labels):
    return chunked_cross_entropy(hidden, model.head_weight, labels)


class Segments:
    """A sequence in segments for `parallel.streaming`, and a record of the states that segments
    returned in each pass."""

    def __init__(
        self, model, length, *, total=TOKENS, rows=2, group=None, layout="contiguous", packed=False
    ):
        self.model, self.total, self.packed = model, total, packed
        self.starts = list(range(0, total, length))
        self.tokens, self.labels = data_of(total, rows)
        ends = [*self.starts[1:], total]
        self.parts = list(zip(self.starts, ends, strict=True))
        self.shards = [
            SequenceShard.split(end - start, group, layout=layout) for start, end in self.parts
        ]
        self.zeros = model.initial_states(rows)
        self.seen = {True: {}, False: {}}

    def __call__(self, index, states, *, states_only):
        start, end = self.parts[index]
        shard, options = self.shards[index], {}
        states = self.zeros.layers if states is None else states
        if self.packed:
            inside = [b - start for b in DOCUMENTS if start < b < end]
            options["cu_seqlens"] = torch.tensor([0, *inside, end - start], dtype=torch.int32)
            options["cut_documents"] = True
            if start in DOCUMENTS:
                states = self.zeros.layers
        options["states"] = type(self.zeros)(list(states), start)
        tokens, labels = (shard.take(x[:, start:end]) for x in (self.tokens, self.labels))
        loss = None
        if states_only:
            after = self.model(tokens, shard, states_only=True, **options)
        else:
            hidden, after = self.model(
                tokens, shard, return_hidden=True, return_states=True, **options
            )
            loss = loss_of(self.model, hidden, labels)
        self.seen[states_only][index] = [state.detach().clone() for state in after.layers]
        return loss, after.layers

    def backward(self, **options):
        return backward_in_segments(
            self, len(self.starts), loss_scale=1 / self.total, shard=self.shards[0], **options
        )


def one_pass(model, total=TOKENS, rows=2, packed=False):
    """Loss, gradients and final states of the sequence as a whole."""
    tokens, labels = data_of(total, rows)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32) if packed else None
    hidden, states = model(tokens, return_hidden=True, return_states=True, cu_seqlens=cu_seqlens)
    loss = loss_of(model, hidden, labels)
    (loss / total).backward()
    return loss.detach(), gradients(model), [state.detach()[-rows:] for state in states.layers]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def check(model, loss, expected_loss, found, expected, bound):
    assert loss.item() == pytest.approx(expected_loss.item(), rel=bound)
    for name, each in expected.items():
        error = (found[name] - each).norm() / each.norm()
        # The rates of LRPE are float32 in every model, and so is their gradient in each segment; it
        # is a sum of terms of both signs.
        limit = max(bound, 1e-5) if name.endswith("theta") else bound
        assert error < limit, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("decay", ["fixed", "learned"])
@pytest.mark.parametrize("length", [300, 63, 7])
def test_float64_gradients_are_those_of_one_pass(decay, length):
    model = make(decay=decay)
    expected_loss, expected, final = one_pass(model)
    model.zero_grad()
    segments = Segments(model, length)
    loss, states = segments.backward()
    check(model, loss, expected_loss, gradients(model), expected, 1e-12)
    assert loss.dtype == torch.float64 and not loss.requires_grad
    for state, each in zip(states, final, strict=True):
        assert not state.requires_grad
        torch.testing.assert_close(state, each, rtol=1e-12, atol=1e-12)
    # The last segment's states are not needed by the first pass.
    passes, count = segments.seen, len(segments.starts)
    assert sorted(passes[True]) == list(range(count - 1))
    assert sorted(passes[False]) == list(range(count))
    for index, states in passes[True].items():
        assert all(map(torch.equal, states, passes[False][index])), index


@pytest.mark.parametrize(("total", "length"), [(40, 1), (1000, 63), (1000, 1000), (2500, 1000)])
def test_three_float32_steps_err_no_more_than_those_of_one_pass(total, length):
    models = [make(torch.float32) for _ in range(3)]
    models[2].double()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    segments = Segments(models[0], length, total=total)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = segments.backward()
        for model in models[1:]:
            expected_loss, *_ = one_pass(model, total)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        found, whole, truth = map(gradients, models)
        for name, each in truth.items():
            error, bound = ((x[name] - each).norm() / each.norm() for x in (found, whole))
            # A rate's gradient is a small sum of large terms: both errors are rounding, and their
            # ratio is another on another CPU.
            most = 4 if name.endswith("theta") else 1.5
            assert error < most * bound + 2e-7, f"{name}: {error:.1e}, in one pass {bound:.1e}"
        for optimizer in optimizers:
            optimizer.step()
    parameters = zip(*(model.named_parameters() for model in models), strict=True)
    for (name, p), (_, whole), (_, truth) in parameters:
        error, bound = ((x - truth).norm() / truth.norm() for x in (p, whole))
        assert error < 2 * bound + 1e-6, f"{name}: {error:.1e}, in one pass {bound:.1e}"


@pytest.mark.parametrize("length", [300, 63, 10])
def test_documents_may_cross_segments(length):
    model = make()
    expected_loss, expected, final = one_pass(model, rows=1, packed=True)
    model.zero_grad()
    loss, states = Segments(model, length, rows=1, packed=True).backward()
    check(model, loss, expected_loss, gradients(model), expected, 1e-12)
    for state, each in zip(states, final, strict=True):
        torch.testing.assert_close(state, each, rtol=1e-12, atol=1e-12)


def on_one_rank(group, length, layout, packed, mode):
    model = make()
    checkpoint_blocks(model.blocks, mode)
    rows = 1 if packed else 2
    segments = Segments(model, length, rows=rows, group=group, layout=layout, packed=packed)
    exchanges, original = [], functional._start_exchange
    with pytest.MonkeyPatch.context() as patch:

        def spy(*args, reverse, **kwargs):
            exchanges.append(reverse)
            return original(*args, reverse=reverse, **kwargs)

        patch.setattr(functional, "_start_exchange", spy)
        loss, states = segments.backward()
    for index, after in segments.seen[True].items():
        assert all(map(torch.equal, after, segments.seen[False][index])), index
    dist.all_reduce(loss, group=group)
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
    evaluated, _ = loss_in_segments(segments, len(segments.starts), shard=segments.shards[0])
    dist.all_reduce(evaluated, group=group)
    assert evaluated.item() == pytest.approx(loss.item(), rel=1e-12)
    return loss, gradients(model), states, (exchanges.count(False), exchanges.count(True))


@pytest.mark.parametrize(
    ("size", "length", "layout", "packed", "mode"),
    [
        (2, 63, "contiguous", False, "none"),
        (3, 64, "zigzag", False, "none"),
        # 300 = 149 + 149 + 2 tokens: the last rank has none of the last segment.
        (3, 149, "contiguous", False, "full"),
        (2, 63, "contiguous", True, "selective"),
        # The last rank has no tokens at all.
        (3, 2, "contiguous", False, "none"),
        (3, 2, "contiguous", True, "none"),
        (3, 50, "zigzag", True, "none"),
    ],
)
def test_segments_cut_over_ranks(pool, size, length, layout, packed, mode):
    model = make()
    expected_loss, expected, final = one_pass(model, rows=1 if packed else 2, packed=packed)
    outcomes = pool.run(on_one_rank, length, layout, packed, mode, size=size)
    count, layers = -(-TOKENS // length), model.config.num_layers
    for loss, found, _, exchanges in outcomes:
        check(model, loss, expected_loss, found, expected, 1e-12)
        # One in each pass and one of gradients, also with recomputed blocks.
        assert exchanges == ((2 * count - 1) * layers, count * layers)
    last = split_lengths(TOKENS % length or length, size)
    _, _, states, _ = outcomes[0 if layout == "zigzag" else sum(n > 0 for n in last) - 1]
    for state, each in zip(states, final, strict=True):
        torch.testing.assert_close(state, each, rtol=1e-12, atol=1e-12)


def test_a_truncated_gradient_stops_at_the_start_of_a_segment():
    model = make()
    segments = Segments(model, 63)
    whole_loss, whole, _ = one_pass(model)
    model.zero_grad()
    loss, _ = segments.backward(gradient="truncated")
    found = gradients(model)
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-12)

    model.zero_grad()
    states = None
    for index in range(len(segments.starts)):
        one, after = segments(index, states, states_only=False)
        (one / TOKENS).backward()
        states = [state.detach() for state in after]
    check(model, loss, loss, found, gradients(model), 1e-12)
    differences = [(found[name] - each).norm() / each.norm() for name, each in whole.items()]
    assert max(differences) > 1e-3
    assert not segments.seen[True]


def test_initial_states_are_read():
    """The second half of a sequence, from the states after the first half."""
    model, half = make(), TOKENS // 2
    segments = Segments(model, 50)
    with torch.no_grad():
        whole, _ = loss_in_segments(segments, 6)
        first, states = loss_in_segments(segments, 3)

    def second(index, states, *, states_only):
        return segments(index + 3, states, states_only=states_only)

    for gradient in ("exact", "truncated"):
        loss, _ = backward_in_segments(second, 3, initial_states=states, gradient=gradient)
        assert loss.item() == pytest.approx((whole - first).item(), rel=1e-12)
    assert segments.starts[3] == half


def test_any_model_whose_state_can_be_handed_over():
    """An LSTM: its states are of the user's own making, some get no gradient."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(8, 8, 2, batch_first=True).double(), nn.Linear(8, 8).double()
    x, y = torch.randn(2, 2, 90, 8, dtype=torch.float64)
    parameters = [*lstm.parameters(), *head.parameters()]
    expected = (head(lstm(x)[0]) - y).square().sum()
    expected_grads = torch.autograd.grad(expected, parameters)

    def run(index, states, *, states_only):
        part = slice(40 * index, 40 * index + 40)
        out, states = lstm(x[:, part], states)
        return (head(out) - y[:, part]).square().sum(), states

    loss, _ = backward_in_segments(run, 3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for p, each in zip(parameters, expected_grads, strict=True):
        torch.testing.assert_close(p.grad, each, rtol=1e-10, atol=1e-12)


def test_every_segment_is_reported_and_may_end_the_call():
    model, seen = make(), []
    segments = Segments(model, 63)
    segments.backward(after_segment=lambda *numbers: seen.append(numbers))
    assert seen == [(done, 9) for done in range(1, 10)]

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    segments.seen[False].clear()
    with pytest.raises(KeyboardInterrupt):
        segments.backward(after_segment=stop)
    assert sorted(segments.seen[False]) == [3, 4]


def test_the_last_backward_is_announced():
    entered = []

    def accumulate(last):
        entered.append(last)
        return torch.enable_grad()

    Segments(make(), 63).backward(accumulate=accumulate)
    Segments(make(), 63).backward(accumulate=accumulate, gradient="truncated")
    assert entered == [False, False, False, False, True] * 2


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "num_segments is 0"),
        (1, {"gradient": "none"}, "gradient is 'none'"),
        (1, {"keep_on": "disk"}, "keep_on is 'disk'"),
    ],
)
def test_bad_arguments_are_refused(count, options, message):
    with pytest.raises(ValueError, match=message):
        backward_in_segments(lambda *_, **__: pytest.fail("called"), count, **options)


def test_a_missing_loss_is_refused():
    with pytest.raises(ValueError, match="run returned no loss"):
        backward_in_segments(lambda *_, **__: (None, []), 1)
    with pytest.raises(ValueError, match="run returned no loss"):
        loss_in_segments(lambda *_, **__: (None, []), 1)


def test_a_hybrid_has_no_initial_states():
    with pytest.raises(ValueError, match="1 of 3 layers are softmax attention"):
        make(layer_types="LSL", num_key_value_heads=2).initial_states()


def test_states_only_are_the_states():
    model, (tokens, _) = make(), data_of(100)
    _, expected = model(tokens, return_states=True)
    found = model(tokens, states_only=True)
    assert found.position == expected.position == 100
    assert all(map(torch.equal, found.layers, expected.layers))
    shapes = [tuple(state.shape) for state in model.initial_states(2).layers]
    assert shapes == [tuple(state.shape) for state in found.layers]


def test_memory_does_not_grow_with_the_sequence():
    """Bytes that the largest segment's graph saves, at two lengths."""
    peaks = []
    for total in (300, 1200):
        model = make()
        segments = Segments(model, 100, total=total)
        live, peak = 0, 0

        def pack(tensor):
            nonlocal live, peak
            size = tensor.numel() * tensor.element_size()
            live += size
            peak = max(peak, live)
            return tensor, size

        def after(done, total):
            nonlocal live
            live = 0

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
            segments.backward(after_segment=after)
        peaks.append(peak)
    assert peaks[0] == peaks[1] > 0


def test_segments_of_all_lengths_agree():
    model = make()
    found = []
    for length in (299, 150, 77):
        model.zero_grad()
        Segments(model, length).backward()
        found.append(gradients(model))
    for one, other in itertools.pairwise(found):
        for name, each in one.items():
            bound = 1e-5 if name.endswith("theta") else 1e-12
            assert (each - other[name]).norm() <= bound * each.norm(), name
