"""A model whose layers are cut over ranks is the model on one device."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.norm import SRMSNorm
from parallel.loss import chunked_cross_entropy
from parallel.mesh import whole
from parallel.recompute import checkpointed
from parallel.tensor import NormOverRanks, tensor_parallel

# Six heads: two ranks or three, and the decays of a number of heads that is no power of two.
CONFIG = dict(vocab_size=54, dim=48, num_layers=3, num_heads=6, glu_dim=66, init_std=0.2)


def make(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return TNL(TNLConfig(**CONFIG | changes)).to(dtype)


def batch_of(total):
    generator = torch.Generator().manual_seed(total)
    tokens = torch.randint(54, (2, total + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :4] = -100
    return tokens[:, :-1], labels


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def results_of(model, total, **options):
    """Logits, loss, states and gradients, each whole."""
    tokens, labels = batch_of(total)
    with torch.no_grad():
        logits, states = model(tokens, return_states=True, **options)
    hidden = model(tokens, return_hidden=True, **options)
    loss = chunked_cross_entropy(hidden, model.head_weight, labels, chunk_size=25)
    (loss / total).backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return logits, loss.detach(), states.layers, gradients


def cut(group, model, **options):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    return tensor_parallel(model, mesh, **options)


def on_one_rank(group, total, dtype, shard_sequence, recompute, options, changes):
    model = cut(group, make(dtype, **changes), shard_sequence=shard_sequence)
    plain = make(dtype, **changes).state_dict()
    weights_equal = all(
        torch.equal(whole(value), plain[name]) for name, value in model.state_dict().items()
    )
    cut_evenly = all(p.to_local().numel() * group.size() == p.numel() for p in model.parameters())
    lengths = set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: lengths.add(args[0].shape[1]))
        if recompute:
            checkpointed(block)
    results = results_of(model, total, **options)
    mixer = model.blocks[0].token_mixer
    return weights_equal, cut_evenly, lengths, mixer.log_decay.tolist(), results


def check(
    pool,
    size,
    total,
    dtype,
    bound,
    shard_sequence=False,
    recompute=False,
    options=None,
    changes=None,
):
    options, changes = options or {}, changes or {}
    model = make(dtype, **changes)
    decays = model.blocks[0].token_mixer.log_decay.tolist()
    logits, loss, states, gradients = results_of(model, total, **options)
    outcomes = pool.run(
        on_one_rank, total, dtype, shard_sequence, recompute, options, changes, size=size
    )
    assert sum((decay for _, _, _, decay, _ in outcomes), []) == decays
    for weights_equal, cut_evenly, lengths, _, got in outcomes:
        assert weights_equal and cut_evenly
        assert lengths == {total // size if shard_sequence else total}
        assert error(got[0], logits) < bound
        assert error(got[1], loss) < bound
        for name, expected in gradients.items():
            # In float64 too, the rates' own gradient is stored in float32.
            assert error(got[3][name], expected) < max(bound, 1e-5 * name.endswith("theta")), name
    # A rank's states are those of its heads.
    for layer, state in enumerate(states):
        # (Of a softmax layer: keys and values [2, B, S, G, D].)
        heads = torch.cat([got[2][layer] for *_, got in outcomes], 1 if state.ndim == 4 else 3)
        assert error(heads, state) < bound


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cut_model_is_the_whole_model(pool, size, dtype, bound):
    check(pool, size, 63, dtype, bound)


@pytest.mark.parametrize("recompute", [False, True])
def test_with_sequence_sharded_norms(pool, recompute):
    check(pool, 3, 66, torch.float64, 1e-12, shard_sequence=True, recompute=recompute)


@pytest.mark.parametrize("shard_sequence", [False, True])
def test_hybrid_with_grouped_heads(pool, shard_sequence):
    changes = dict(layer_types="LSS", num_key_value_heads=3)
    total = 66 if shard_sequence else 63
    check(pool, 3, total, torch.float64, 1e-12, shard_sequence=shard_sequence, changes=changes)


def test_with_padding(pool):
    mask = torch.ones(2, 63, dtype=torch.bool)
    mask[0, :9] = False
    check(pool, 2, 63, torch.float64, 1e-12, options=dict(padding_mask=mask))


def padded_embedding(group, shard_sequence):
    whole_model, model = make(pad_token_id=30), make(pad_token_id=30)
    cut(group, model, shard_sequence=shard_sequence)
    tokens, _ = batch_of(64)
    # The padding token, and the one in its place on the first rank.
    tokens[0, :20:2], tokens[0, 1:20:2] = 30, 3
    gradients = []
    for each in (whole_model, model):
        each(tokens, return_hidden=True).pow(3).sum().backward()
        gradients.append(whole(each.embedding.weight.grad))
    return gradients


@pytest.mark.parametrize("shard_sequence", [False, True])
def test_padding_token_learns_nothing_from_look_ups(pool, shard_sequence):
    for expected, got in pool.run(padded_embedding, shard_sequence, size=2):
        assert (got[30] == 0).all() and (got[3] != 0).any()
        assert error(got, expected) < 1e-12


def norm_errors(group, dtype):
    """Errors of output and gradient: over ranks, of plain torch, and of a norm per rank."""
    rank, size, dim = dist.get_rank(group), dist.get_world_size(group), 90
    generator = torch.Generator().manual_seed(0)
    # Heads of different size, as decays make them.
    x, grad = torch.randn(2, 2, 7, dim, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.01, 3, dim, dtype=torch.float64)
    part = slice(rank * dim // size, (rank + 1) * dim // size)

    def run(norm, x, grad):
        x = x.detach().clone().requires_grad_()
        y = norm(x)
        return y.detach().double(), torch.autograd.grad(y, x, grad)[0].double()

    truth = [each[..., part] for each in run(SRMSNorm(dim), x, grad)]
    low_x, low_grad = x.to(dtype), grad.to(dtype)
    plain = [each[..., part] for each in run(SRMSNorm(dim), low_x, low_grad)]
    own = low_x[..., part], low_grad[..., part]
    over_ranks = run(NormOverRanks(dim, 1e-6, group), *own)
    per_rank = run(SRMSNorm(dim // size), *own)
    return [
        [error(a, b) for a, b in zip(got, truth, strict=True)]
        for got in (over_ranks, plain, per_rank)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_over_all_heads_is_no_norm_per_rank(pool, dtype):
    for over_ranks, plain, per_rank in pool.run(norm_errors, dtype, size=3):
        for mine, theirs, wrong in zip(over_ranks, plain, per_rank, strict=True):
            assert mine <= 2 * theirs + 1e-15
            assert wrong > 0.1


def refusals(group):
    sentences = []
    for changes in (
        dict(num_heads=4),
        dict(glu_dim=65),
        dict(vocab_size=55),
        dict(num_key_value_heads=2, layer_types="S"),
    ):
        try:
            cut(group, make(**changes))
        except ValueError as problem:
            sentences.append(str(problem))
    model = cut(group, make(), shard_sequence=True)
    try:
        model(batch_of(64)[0])
    except ValueError as problem:
        sentences.append(str(problem))
    return sentences


def test_what_does_not_divide_is_refused_with_its_numbers(pool):
    for heads, glu, vocabulary, kv_heads, tokens in pool.run(refusals, size=3):
        assert "num_heads 4 does not divide by 3 tensor-parallel ranks (4 = 1 x 3 + 1)" in heads
        assert "use 1 or 2 of them" in heads
        assert "glu_dim 65 does not divide" in glu and "vocab_size 55 does not" in vocabulary
        assert "num_key_value_heads 2 does not divide by 3" in kv_heads
        assert "64 tokens of this rank do not divide by 3" in tokens
