"""Each attention of benchmarks/attention_baselines.py against its definition in float64: output and
gradients, at odd lengths."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lasp

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTHS = (1, 63, 100)


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import attention_baselines

    return attention_baselines


def errors(function, definition, length, *, dtype=torch.float64, sizes=(5, 7), steepness=0.5):
    """Errors of o, dq, dk and dv over their norm, or over 1 where that is less: of one token, the
    weights are 1 and have no gradient. `steepness` is that of the strongest decay."""
    torch.manual_seed(length)
    (D, E), H = sizes, 3
    q, k = torch.randn(2, 2, length, H, D, dtype=dtype)
    v, do = torch.randn(2, 2, length, H, E, dtype=dtype)
    log_decay = -steepness * torch.linspace(0.01, 1, H)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o, truth = function(*leaves, log_decay), definition(*exact, log_decay.double())
    assert o.dtype == dtype and o.shape == v.shape
    found = [o, *torch.autograd.grad(o, leaves, do)]
    wanted = [truth, *torch.autograd.grad(truth, exact, do.double())]
    return [
        float((a.double() - b).detach().norm() / b.detach().norm().clamp_min(1.0))
        for a, b in zip(found, wanted, strict=True)
    ]


def with_decay(q, k, v, log_decay):
    return lasp.reference.quadratic(q, k, v, log_decay)[0]


def normalized(weights, v):
    """Scores [B, H, T, T], of which the causal ones count, over their sum."""
    weights = weights.tril()
    return torch.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdim=True), v)


def one_plus_elu(q, k, v, log_decay):
    return normalized(torch.einsum("bthd,bshd->bhts", 1 + F.elu(q), 1 + F.elu(k)), v)


def cosine(length):
    def definition(q, k, v, log_decay):
        token = torch.arange(q.shape[1], dtype=torch.float64)
        nearness = torch.cos(math.pi / 2 * (token[:, None] - token) / length)
        return normalized(torch.einsum("bthd,bshd->bhts", F.relu(q), F.relu(k)) * nearness, v)

    return definition


@pytest.mark.parametrize("length", LENGTHS)
def test_the_token_loop_is_the_recurrence(baselines, length):
    assert max(errors(baselines.token_loop, with_decay, length)) < 1e-13


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("steepness", [0.0, 0.5, 3.0, 60.0])
def test_prefix_sums_give_the_recurrence_where_powers_of_the_decay_overflow(
    baselines, length, steepness
):
    found = errors(baselines.cumulative_sum, with_decay, length, steepness=steepness)
    assert max(found) < 1e-12
    single = dict(dtype=torch.float32, steepness=steepness)
    assert max(errors(baselines.cumulative_sum, with_decay, length, **single)) < 1e-6


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_prefix_sums_of_some_heads_at_a_time_are_the_same(baselines, heads):
    def some(*arguments):
        return baselines.cumulative_sum(*arguments, heads_at_a_time=heads)

    assert max(errors(some, with_decay, 63)) < 1e-13


@pytest.mark.parametrize("length", LENGTHS)
def test_one_plus_elu_is_a_weighted_mean(baselines, length):
    function = baselines.BASELINES["1 + elu"]
    assert max(errors(function, one_plus_elu, length)) < 1e-12


@pytest.mark.parametrize("length", LENGTHS)
def test_cosine_weights_fall_with_the_distance(baselines, length):
    # Enough features that no token has only weights of zero, where the clamp acts.
    sizes = (64, 7)
    found = errors(baselines.BASELINES["cosine"], cosine(length), length, sizes=sizes)
    assert max(found) < 1e-12

    def longer(q, k, v, log_decay):
        return baselines.cosine(q, k, v, max_length=200)

    assert max(errors(longer, cosine(200), length, sizes=sizes)) < 1e-12


@pytest.mark.parametrize("length", LENGTHS)
def test_softmax_is_the_definition(baselines, length):
    def definition(q, k, v, log_decay):
        return lasp.reference.softmax(q, k, v)

    function = baselines.BASELINES["softmax (SDPA)"]
    assert max(errors(function, definition, length, sizes=(6, 6))) < 1e-12


def test_no_baseline_attends_to_later_tokens(baselines):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 2, 8, dtype=torch.float64)
    log_decay = torch.tensor([-0.01, -0.4])
    for name, function in baselines.BASELINES.items():
        if name == "Lightning Attention-1":
            # Needs a GPU; see test_lightning_attention_1.py.
            continue
        before = function(q, k, v, log_decay)[:, :25]
        later = [torch.cat([x[:, :25], torch.randn_like(x[:, 25:])], dim=1) for x in (q, k, v)]
        torch.testing.assert_close(function(*later, log_decay)[:, :25], before, msg=name)


def test_states_stay_float32_under_autocast(baselines):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 100, 2, 8)
    log_decay = torch.tensor([-0.01, -0.4])
    for name in ("cumulative sum", "token loop"):
        wanted = baselines.BASELINES[name](q, k, v, log_decay)
        with torch.autocast("cpu", torch.bfloat16):
            found = baselines.BASELINES[name](q, k, v, log_decay)
        assert torch.equal(found, wanted), name


def test_wrong_arguments_are_refused(baselines):
    q, k, v = torch.randn(3, 1, 10, 2, 8)
    with pytest.raises(ValueError, match="heads_at_a_time is 0: it must be at least 1"):
        baselines.cumulative_sum(q, k, v, torch.zeros(2), heads_at_a_time=0)
    with pytest.raises(ValueError, match="max_length is 9: it must be at least the 10 tokens"):
        baselines.cosine(q, k, v, max_length=9)
