"""A tensor-parallel model computes what the model computes on one device."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.generation import stream
from lasp.tnl.layers import SRMSNorm
from lasp.tnl.learned_decay import DecayProjection
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.loss import chunked_cross_entropy
from parallel.mesh import full_tensor
from parallel.tensor import ShardedSRMSNorm
from parallel.tnl import float32_blocks, tensor_parallel

# Six heads: for two or three ranks, and not a power of two, for which decays differ.
CONFIG = dict(vocab_size=54, dim=48, num_layers=3, num_heads=6, glu_dim=66, init_std=0.2)


def make(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = TNL(TNLConfig(**CONFIG | changes))
    for module in model.modules():
        # They start at zero.
        if isinstance(module, DecayProjection):
            torch.nn.init.normal_(module.weight, std=0.2)
            torch.nn.init.normal_(module.bias)
    return model.to(dtype)


def batch_of(total):
    generator = torch.Generator().manual_seed(total)
    tokens = torch.randint(54, (2, total + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :4] = -100
    return tokens[:, :-1], labels


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def results_of(model, total, **options):
    """Logits, loss, states and full gradients."""
    tokens, labels = batch_of(total)
    with torch.no_grad():
        logits, states = model(tokens, return_states=True, **options)
    hidden = model(tokens, return_hidden=True, **options)
    loss = chunked_cross_entropy(hidden, model.head_weight, labels, chunk_size=25)
    (loss / total).backward()
    gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
    return logits, loss.detach(), states.layers, gradients


def sharded(group, model, **options):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    return tensor_parallel(model, mesh, **options)


def on_one_rank(group, total, dtype, shard_sequence, mode, options, changes):
    model = sharded(group, make(dtype, **changes), shard_sequence=shard_sequence)
    plain = make(dtype, **changes).state_dict()
    weights_equal = all(
        torch.equal(full_tensor(x), plain[n]) for n, x in model.state_dict().items()
    )
    even = all(p.to_local().numel() * group.size() == p.numel() for p in model.parameters())
    lengths = set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: lengths.add(args[0].shape[1]))
    checkpoint_blocks(model.blocks, mode)
    results = results_of(model, total, **options)
    decays = model.blocks[0].token_mixer.log_decay.tolist()
    return weights_equal and even, lengths, decays, results


def check(
    pool, size, *, dtype=torch.float64, bound=1e-12, shard_sequence=False, mode="none", **more
):
    total = 66 if shard_sequence else 63
    options, changes = more.get("options", {}), more.get("changes", {})
    model = make(dtype, **changes)
    logits, loss, states, gradients = results_of(model, total, **options)
    arguments = (total, dtype, shard_sequence, mode, options, changes)
    outcomes = pool.run(on_one_rank, *arguments, size=size)
    decays = [decay for _, _, of_rank, _ in outcomes for decay in of_rank]
    assert decays == model.blocks[0].token_mixer.log_decay.tolist()
    for weights_as_expected, lengths, _, actual in outcomes:
        assert weights_as_expected
        assert lengths == {total // size if shard_sequence else total}
        assert error(actual[0], logits) < bound
        assert error(actual[1], loss) < bound
        for name, expected in gradients.items():
            # The gradient of LRPE rates is stored in float32, in float64 too.
            allowed = max(bound, 1e-5 * name.endswith("theta"))
            assert error(actual[3][name], expected) < allowed, name
    # A rank's states are those of its heads. (Of a softmax layer: keys and values [2, B, S, G, D].)
    for layer, state in enumerate(states):
        of_ranks = [actual[2][layer] for *_, actual in outcomes]
        assert error(torch.cat(of_ranks, 1 if state.ndim == 4 else 3), state) < bound


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        dict(output_gate=False, decay="per_head", glu_activation="silu"),
        dict(activation="1+elu", denominator=True, decay="none"),
    ],
    ids=["no_gate", "denominator"],
)
def test_variants(pool, size, changes):
    check(pool, size, changes=changes)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_sharded_model_is_the_full_model(pool, size, dtype, bound):
    check(pool, size, dtype=dtype, bound=bound)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_with_a_sharded_residual_stream(pool, mode):
    check(pool, 3, shard_sequence=True, mode=mode)


@pytest.mark.parametrize("shard_sequence", [False, True])
def test_hybrid_with_grouped_heads(pool, shard_sequence):
    changes = dict(layer_types="LSS", num_key_value_heads=3)
    check(pool, 3, shard_sequence=shard_sequence, changes=changes)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("shard_sequence", "mode"), [(False, "none"), (True, "full")])
def test_learned_decay(pool, size, shard_sequence, mode):
    check(pool, size, shard_sequence=shard_sequence, mode=mode, changes=dict(decay="learned"))


def test_with_padding(pool):
    mask = torch.ones(2, 63, dtype=torch.bool)
    mask[0, :9] = False
    check(pool, 2, options=dict(padding_mask=mask))


def embedding_gradients(group, shard_sequence):
    plain, model = make(pad_token_id=30), make(pad_token_id=30)
    sharded(group, model, shard_sequence=shard_sequence)
    tokens, _ = batch_of(64)
    # The padding token, and the token with its index on the first rank.
    tokens[0, :20:2], tokens[0, 1:20:2] = 30, 3
    for each in (plain, model):
        each(tokens, return_hidden=True).pow(3).sum().backward()
    return [full_tensor(each.embedding.weight.grad) for each in (plain, model)]


@pytest.mark.parametrize("shard_sequence", [False, True])
def test_padding_token_learns_nothing_from_look_ups(pool, shard_sequence):
    for expected, actual in pool.run(embedding_gradients, shard_sequence, size=2):
        assert (actual[30] == 0).all() and (actual[3] != 0).any()
        assert error(actual, expected) < 1e-12


def test_blocks_with_lrpe_need_float32():
    model = make(lrpe_layers=(0, 2), layer_types="LLS")
    assert float32_blocks(model) == [model.blocks[0]]


def norm_errors(group, dtype):
    """Errors of output and gradient: sharded, in plain torch, and with a norm per rank."""
    rank, size, dim = dist.get_rank(group), dist.get_world_size(group), 90
    generator = torch.Generator().manual_seed(0)
    # Heads of different magnitude, as from different decays.
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
    local = low_x[..., part], low_grad[..., part]
    over_ranks = run(ShardedSRMSNorm(dim, 1e-6, group), *local)
    per_rank = run(SRMSNorm(dim // size), *local)
    return [
        [error(a, b) for a, b in zip(actual, truth, strict=True)]
        for actual in (over_ranks, plain, per_rank)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_is_over_the_heads_of_all_ranks(pool, dtype):
    for over_ranks, plain, per_rank in pool.run(norm_errors, dtype, size=3):
        for actual, allowed, wrong in zip(over_ranks, plain, per_rank, strict=True):
            assert actual <= 2 * allowed + 1e-15
            assert wrong > 0.1


def refusals(group):
    messages = []
    for changes in (
        dict(num_heads=4),
        dict(glu_dim=65),
        dict(vocab_size=55),
        dict(num_key_value_heads=2, layer_types="S"),
    ):
        with pytest.raises(ValueError) as refused:
            sharded(group, make(**changes))
        messages.append(str(refused.value))
    model = sharded(group, make(), shard_sequence=True)
    with pytest.raises(ValueError) as refused:
        model(batch_of(64)[0])
    return *messages, str(refused.value)


def test_sizes_that_do_not_divide_are_refused_with_their_numbers(pool):
    for heads, glu, vocabulary, kv_heads, tokens in pool.run(refusals, size=3):
        assert "num_heads 4 does not divide by 3 tensor-parallel ranks (4 = 1 x 3 + 1)" in heads
        assert "use 1 or 2 of them" in heads
        assert "glu_dim 65 does not divide" in glu and "vocab_size 55 does not" in vocabulary
        assert "num_key_value_heads 2 does not divide by 3" in kv_heads
        assert "64 tokens of this rank do not divide by 3" in tokens


def generate_on_one_rank(group, changes):
    model = sharded(group, make(**changes))
    prompts = [batch_of(length)[0][0] for length in (9, 1, 30)]
    return torch.stack(list(stream(model, prompts, 12, prefill_chunk=16)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("changes", [{}, {"layer_types": "LSL"}, {"decay": "learned"}])
def test_every_rank_generates_what_one_device_does(pool, size, changes):
    model = make(**changes)
    prompts = [batch_of(length)[0][0] for length in (9, 1, 30)]
    expected = torch.stack(list(stream(model, prompts, 12)))
    for found in pool.run(generate_on_one_rank, changes, size=size):
        assert torch.equal(found, expected)
