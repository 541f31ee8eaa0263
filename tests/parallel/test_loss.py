"""Chunked cross-entropy against torch's on the full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.loss import chunked_cross_entropy
from tests.compiler import needs_compiler

B, T, D, V = 2, 37, 16, 101


def make(dtype=torch.float64, ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < ignored] = -100
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        labels,
    )


def plain(hidden, weight, labels):
    logits = (hidden @ weight.T).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten(), reduction="sum")


def with_gradients(loss, hidden, weight):
    return [loss.detach(), *torch.autograd.grad(loss / 7, [hidden, weight])]


def worst(got, expected):
    """Largest error relative to the largest value, over loss and gradients."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("chunk_size", [1, 5, T, 2 * T, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_loss_and_gradients_are_those_of_full_logits(chunk_size, dtype, bound):
    hidden, weight, labels = make(dtype)
    got = with_gradients(
        chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size), hidden, weight
    )
    assert worst(got, with_gradients(plain(hidden, weight, labels), hidden, weight)) < bound


@pytest.mark.parametrize("chunk_size", [1, 5, 2 * T])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_losses_per_token_are_those_of_full_logits(chunk_size, dtype, bound):
    hidden, weight, labels = make(dtype)
    with torch.no_grad(), Largest() as largest:
        losses = chunked_cross_entropy(
            hidden, weight, labels, chunk_size=chunk_size, per_token=True
        )
    assert losses.shape == (B, T) and losses.dtype == dtype
    assert largest.elements <= max(chunk_size * V, V * D, B * T * D)
    logits = (hidden @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="none").view(B, T)
    assert worst([losses], [expected]) < bound
    assert (losses[labels == -100] == 0).all()


@needs_compiler
@pytest.mark.parametrize("chunk_size", [1000, 5])
def test_compiled_passes_give_the_same(chunk_size):
    hidden, weight, labels = make(torch.float32)
    with torch.no_grad():
        # Its label is ignored, and its logits are infinite.
        hidden[0, 3] = torch.inf
    labels[0, 3] = -100
    got, expected = (
        with_gradients(
            chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, compiled=compiled),
            hidden,
            weight,
        )
        for compiled in (True, False)
    )
    assert worst(got, expected) < 2e-6


def test_under_autocast_no_worse_than_full_logits():
    hidden, weight, labels = make(torch.float32)
    truth = with_gradients(plain(hidden, weight, labels), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=8)
        reference = plain(hidden, weight, labels)
    got = with_gradients(loss, hidden, weight)
    assert loss.dtype == torch.float32 and got[2].dtype == torch.float32
    error = worst(got, truth)
    # bfloat16 was used, and is no less exact than with full logits.
    assert 1e-5 < error <= 2 * worst(with_gradients(reference, hidden, weight), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_meta_device_gives_shapes(dtype):
    hidden = torch.empty(B, T, D, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(V, D, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(B, T, dtype=torch.long, device="meta")
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=8)
    loss.backward()
    assert loss.is_meta and loss.shape == ()
    for leaf in (hidden, weight):
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == dtype


def test_ignored_tokens_have_no_effect_even_if_infinite():
    hidden, weight, labels = make()
    with torch.no_grad():
        hidden[labels == -100] = float("inf")
    loss, grad_hidden, grad_weight = with_gradients(
        chunked_cross_entropy(hidden, weight, labels, chunk_size=8), hidden, weight
    )
    assert torch.isfinite(loss)
    assert (grad_hidden[labels == -100] == 0).all()


@pytest.mark.parametrize("per_token", [False, True])
@torch.no_grad()
def test_a_negative_label_is_no_token(per_token):
    hidden, weight, labels = make()
    labels = labels.clone()
    labels[0, 3] = -1
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=8, per_token=per_token)
    if per_token:
        assert loss[0, 3] == torch.inf and loss.isfinite().sum() == loss.numel() - 1
    else:
        assert loss == torch.inf


@pytest.mark.parametrize("tokens", [0, T])
def test_a_batch_without_labels_gives_zero(tokens):
    hidden, weight, labels = make(torch.float32)
    hidden, labels = hidden[:, :tokens], torch.full_like(labels[:, :tokens], -100)
    loss, grad_hidden, grad_weight = with_gradients(
        chunked_cross_entropy(hidden, weight, labels), hidden, weight
    )
    assert loss == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_logits_are_held_for_one_chunk_only(grad):
    hidden, weight, labels = make(torch.float32)
    chunk_size = 20
    with torch.set_grad_enabled(grad), Largest() as largest:
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
        if grad:
            loss.backward()
    assert largest.elements == chunk_size * V
    assert loss.requires_grad == grad


# Divides by two and by three.
SHARDED_V = 96


def make_sharded(dtype):
    hidden, weight, labels = make(dtype)
    labels = torch.where(labels < SHARDED_V, labels, 0)
    return hidden, weight.detach()[:SHARDED_V].requires_grad_(), labels


def over_ranks(group, dtype, chunk_size):
    """Loss, both gradients, and the most elements of an operation, with a sharded vocabulary."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    hidden, weight, labels = make_sharded(dtype)
    weight = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    with Largest() as largest:
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    loss, grad_hidden, grad_weight = with_gradients(loss, hidden, weight)
    with torch.no_grad():
        no_grad = chunked_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
        wrong = chunked_cross_entropy(hidden, weight, torch.full_like(labels, SHARDED_V))
        per_token = chunked_cross_entropy(hidden, weight, labels, per_token=True)
    assert per_token.sum().item() == pytest.approx(no_grad.item(), rel=1e-5)
    assert grad_weight.placements == (Shard(0),)
    return (loss, grad_hidden, grad_weight.full_tensor()), no_grad, wrong, largest.elements


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_sharded_vocabulary_gives_the_loss_of_the_full_one(pool, size, dtype, bound):
    hidden, weight, labels = make_sharded(dtype)
    truth = with_gradients(plain(hidden, weight, labels), hidden, weight)
    outcomes = pool.run(over_ranks, dtype, 60, size=size)
    for got, no_grad, wrong, elements in outcomes:
        assert worst(got, truth) < bound
        # To the bit the same on all ranks, with a gradient or without.
        assert got[0] == no_grad == outcomes[0][0][0]
        # A label that no rank has is not ignored.
        assert wrong == torch.inf
        # No rank had the logits of the full vocabulary.
        assert elements == 60 * SHARDED_V // size


def test_a_head_sharded_by_columns_is_refused(pool):
    for message in pool.run(sharded_by_columns, size=2):
        assert "must be sharded evenly by vocabulary" in message


def sharded_by_columns(group):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    hidden, weight, labels = make()
    weight = distribute_tensor(weight.detach(), mesh, [Shard(1)])
    with pytest.raises(ValueError) as caught:
        chunked_cross_entropy(hidden, weight, labels)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels_BT=torch.zeros(B, T - 1, dtype=torch.long)), "do not fit"),
        (dict(weight_VD=torch.zeros(V, D + 1)), "do not fit"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(per_token=True), "call under torch.no_grad"),
    ],
)
def test_bad_calls_are_refused(change, message):
    hidden, weight, labels = make()
    call = dict(hidden_BTD=hidden, weight_VD=weight, labels_BT=labels) | change
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**call)
