"""FP8 layers multiply rounded operands, in any layout, and refuse what cannot run."""

import importlib.metadata

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.learned_decay import DecayProjection
from parallel import float8
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.compile import compile_blocks
from parallel.data import shard
from parallel.mesh import full_tensor
from parallel.tnl import float32_blocks, tensor_parallel
from tests.float8_over_gloo import bytes_over_gloo

pytest.importorskip("torchao", reason="FP8 needs torchao: pip install -e '.[fp8]'")

CONFIG = dict(vocab_size=64, dim=32, num_layers=3, num_heads=2, glu_dim=64, init_std=0.2)
T = 48
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def make(recipe="tensorwise", mode="none", **changes):
    torch.manual_seed(0)
    model = TNL(TNLConfig(**CONFIG | changes))
    if recipe is not None:
        float8.convert_blocks(model.blocks, recipe, emulate=True)
    checkpoint_blocks(model.blocks, mode)
    return model


def gradients(model):
    """Hidden states and full gradients, by name."""
    generator = torch.Generator().manual_seed(T)
    tokens = torch.randint(64, (1, T), generator=generator)
    weight = torch.randn(1, T, 32, generator=generator)
    hidden = model(tokens, return_hidden=True)
    (hidden * weight).sum().backward()
    named = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
    return {"hidden": hidden.detach()} | named


def worst(actual, expected):
    assert actual.keys() == expected.keys()
    return max(((actual[n] - e).norm() / e.norm()).item() for n, e in expected.items())


def rounded(x, dtype, dim, power_of_two):
    """x as FP8 stores it: scaled so that the largest value (along `dim`) is FP8's largest."""
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / most.double()).float()
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(
        dtype
    ).double() / scale


@pytest.mark.parametrize("recipe", float8.RECIPES)
def test_products_are_those_of_rounded_operands(recipe):
    by_row = recipe == "rowwise"
    dtype = E4M3 if by_row else E5M2

    def quantized(x, dim, dtype=E4M3):
        return rounded(x, dtype, dim if by_row else None, by_row)

    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(32, 64, bias=False)])
    weight = layers[0].weight.detach().clone()
    float8.convert_blocks(layers, recipe, emulate=True)
    x, dy = torch.randn(T, 32, requires_grad=True), torch.randn(T, 64)
    y = layers[0](x)
    y.backward(dy)
    data = x.detach()
    # Each operand of a product is rounded along the dimension that is summed over.
    expected = {
        "y": quantized(data, 1) @ quantized(weight, 1).T,
        "dx": quantized(dy, 1, dtype) @ quantized(weight, 0),
        "dw": quantized(dy, 0, dtype).T @ quantized(data, 0),
    }
    for name, actual in (("y", y), ("dx", x.grad), ("dw", layers[0].weight.grad)):
        torch.testing.assert_close(actual.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    exact = data @ weight.T
    assert 0.005 < (y - exact).norm() / exact.norm() < 0.06


def test_parameters_keep_names_shapes_and_values():
    plain, model = make(None).state_dict(), make().state_dict()
    assert list(plain) == list(model)
    for name, value in plain.items():
        assert torch.equal(value, model[name]) and value.dtype == model[name].dtype, name


def converted(model):
    return {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}


def test_the_linear_layers_of_all_blocks_are_converted_but_those_to_skip():
    model = make(None, layer_types="LLS")
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    float8.convert_blocks(model.blocks, "tensorwise", skip=("out_proj", "blocks.1."), emulate=True)
    skipped = {name for name in linear if "out_proj" in name or name.startswith("blocks.1.")}
    assert converted(model) == linear - skipped
    assert len(skipped) == 7 and "blocks.2.token_mixer.kv_proj" in converted(model)
    with pytest.raises(ValueError, match=r"no linear layer is left .*\('blocks',\)"):
        float8.convert_blocks(make(None).blocks, "tensorwise", skip=("blocks",), emulate=True)


def test_projections_to_learned_decays_are_left_alone():
    model = make(None, decay="learned")
    float8.convert_blocks(model.blocks, "tensorwise", emulate=True)
    # Its four outputs are no multiple of 16.
    float8.check_sizes(model.blocks)
    left = {name for name, m in model.named_modules() if type(m) is DecayProjection}
    assert left == {f"blocks.{i}.token_mixer.decay_proj" for i in range(len(model.blocks))}
    assert len(converted(model)) == 5 * len(model.blocks)


@pytest.mark.parametrize(
    "recipe, options, sentence",
    [
        ("rows", {}, "recipe is 'rows': it must be one of tensorwise, rowwise"),
        ("rowwise", {"fsdp_all_gather": True}, "gathered in FP8 only with tensorwise"),
    ],
)
def test_wrong_recipes_are_refused(recipe, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        float8.convert_blocks(make(None).blocks, recipe, **options)


def test_sizes_that_fp8_cannot_multiply_are_named():
    float8.check_sizes(make(None).blocks)
    model = make(None, glu_dim=72)
    with pytest.raises(
        ValueError, match=r"blocks.0.channel_mixer.w1 has 72 x 32 .*multiples of 16"
    ):
        float8.check_sizes(model.blocks)
    float8.check_sizes(model.blocks, skip=("channel_mixer",))


def refused(device="cpu", **options):
    with pytest.raises(ValueError) as caught:
        float8.check_available(torch.device(device), **options)
    return str(caught.value)


def test_what_is_missing_for_fp8_is_named(monkeypatch):
    float8.check_available(torch.device("cpu"), emulate=True)
    assert "need a GPU, the device is cpu" in refused()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "A100 is sm_80: FP8 products need sm_89 or newer" in refused("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    float8.check_available(torch.device("cuda"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.0")
    assert "torchao is 0.9.0, FP8 needs 0.18 or newer: pip install" in refused(emulate=True)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "not installed: pip install -e '.[fp8]'" in refused(emulate=True)


@pytest.mark.parametrize(
    "recipe, mode",
    [
        ("tensorwise", "none"),
        ("tensorwise", "full"),
        ("rowwise", "full"),
        pytest.param("rowwise", "none", marks=pytest.mark.slow),
        pytest.param("tensorwise", "selective", marks=pytest.mark.slow),
    ],
)
def test_blocks_of_one_kind_share_a_graph_without_breaks(recipe, mode):
    expected = gradients(make(recipe))
    torch._dynamo.reset()
    counters.clear()
    model = make(recipe, mode)
    compile_blocks(model.blocks, fullgraph=True, backend="aot_eager")
    actual = gradients(model)
    # The first layer has LRPE, the others do not.
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
    assert worst(actual, expected) < 1e-5


def tensor_parallel_gradients(group, recipe, shard_sequence):
    torch._dynamo.reset()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    results = []
    for is_compiled in (False, True):
        model = tensor_parallel(make(recipe), mesh, shard_sequence=shard_sequence)
        float8.check_sizes(model.blocks)
        if is_compiled:
            checkpoint_blocks(model.blocks, "full")
            compile_blocks(model.blocks, fullgraph=True, backend="aot_eager")
        results.append(gradients(model))
    return results


@pytest.mark.parametrize(
    "recipe, shard_sequence",
    [("tensorwise", True), pytest.param("rowwise", False, marks=pytest.mark.slow)],
)
def test_tensor_parallel_blocks_compute_what_one_rank_does(pool, recipe, shard_sequence):
    expected = gradients(make(recipe))
    exact = gradients(make(None))
    rounding = worst(expected, exact)
    for results in pool.run(tensor_parallel_gradients, recipe, shard_sequence, size=2):
        for actual in results:
            # Sums in another order move values to the neighbouring FP8 number.
            assert worst(actual, expected) < 0.5 * rounding
            assert worst(actual, exact) < 1.5 * rounding


def sizes_on_two_ranks(group):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    model = tensor_parallel(make(glu_dim=48), mesh)
    with pytest.raises(ValueError) as caught:
        float8.check_sizes(model.blocks)
    return str(caught.value), dist.get_rank(group)


def test_sizes_are_those_of_a_tensor_parallel_rank(pool):
    for text, _ in pool.run(sizes_on_two_ranks, size=2):
        assert "blocks.0.channel_mixer.w1 has 24 x 32 values on a rank (of 48 x 32)" in text


def gathered_gradients(group, mode):
    """Of FSDP that gathers in FP8, eager and compiled, and the graphs of the compiled blocks."""
    torch._dynamo.reset()
    counters.clear()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    results = []
    with pytest.MonkeyPatch.context() as patch:
        bytes_over_gloo(patch)
        for is_compiled in (False, True):
            model = make(None)
            float8.convert_blocks(model.blocks, "tensorwise", fsdp_all_gather=True, emulate=True)
            checkpoint_blocks(model.blocks, mode)
            if is_compiled:
                compile_blocks(model.blocks, fullgraph=True, backend="aot_eager")
            shard(model, mesh, blocks=model.blocks, exact=float32_blocks(model))
            results.append(gradients(model))
            for _ in range(is_compiled):
                # With scales computed before, and weights that were gathered before.
                model.zero_grad()
                float8.scales_in_one_reduction(model)
                results.append(gradients(model))
    return results, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_weights_gathered_in_fp8_compile_without_breaks(pool, mode):
    expected = gradients(make())
    for results, graphs in pool.run(gathered_gradients, mode, size=2):
        assert graphs == 2
        for actual in results:
            hidden = actual.pop("hidden")
            # Both ranks have the same tokens, and gradients are summed.
            actual = {name: each / 2 for name, each in actual.items()} | {"hidden": hidden}
            assert worst(actual, expected) < 1e-5
