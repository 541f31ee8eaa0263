"""Decoding on a GPU: fused kernels, CUDA graphs, random numbers inside them."""

import dataclasses

import pytest
import torch

from lasp.tnl import TNL, TNLConfig
from lasp.tnl.decoding import Decoder, Sampling
from lasp.tnl.generation import prefill, stream

# More inputs than outputs, fewer, and as many; LRPE in layer 0; the released head size.
CONFIG = TNLConfig(vocab_size=1000, dim=512, num_layers=3, num_heads=4, glu_dim=1100, init_std=0.05)
HYBRID = dataclasses.replace(CONFIG, layer_types="LSL", num_key_value_heads=2)
LEARNED = dataclasses.replace(CONFIG, decay="learned")


def make(config=CONFIG, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return TNL(config).to("cuda", dtype).eval()


def logits_of(model, tokens, **options):
    """Of each of tokens [B, T], decoded one by one."""
    decoder, found = Decoder(model, len(tokens), context=tokens.shape[1], **options), []
    for column in tokens.unbind(1):
        decoder.tokens.copy_(column)
        decoder.step()
        found.append(decoder.logits.double().cpu())
    return decoder, torch.stack(found, 1)


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("config", [CONFIG, LEARNED, HYBRID], ids=["linear", "learned", "hybrid"])
@pytest.mark.parametrize("batch", [1, 2, 16, 17, 33, 64])
@torch.no_grad()
def test_fused_kernels_err_no_more_than_the_layers(config, batch):
    tokens = torch.randint(1000, (batch, 12), device="cuda")
    model = make(config)
    exact = TNL(config).double()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    expected = exact(tokens.cpu())
    decoder, fused = logits_of(model, tokens)
    assert decoder.is_fused
    again, repeated = logits_of(model, tokens)
    assert torch.equal(fused, repeated)
    assert all(map(torch.equal, decoder.states, again.states))
    _, eager = logits_of(model, tokens, use_graph=False)
    assert torch.equal(fused, eager)
    layers = model(tokens).double().cpu()
    assert error(fused, expected) < 1.5 * error(layers, expected)


def test_more_sequences_than_the_kernels_take():
    decoder = Decoder(make(), 65)
    assert not decoder.is_fused
    decoder.step()
    assert decoder.positions.tolist() == [1] * 65


@pytest.mark.parametrize("config", [CONFIG, LEARNED, HYBRID], ids=["linear", "learned", "hybrid"])
def test_float32_tokens_are_those_of_full_forwards(config, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = make(config, torch.float32)
    exact = TNL(config).double()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    tokens = torch.randint(1000, (2, 20))
    found = model.generate(tokens.cuda(), 15).cpu()
    with torch.no_grad():
        for _ in range(15):
            tokens = torch.cat([tokens, exact(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("config", [CONFIG, HYBRID], ids=["linear", "hybrid"])
def test_prompts_of_any_lengths_continue_as_alone(config):
    model = make(config, torch.float32)
    prompts = [torch.randint(1000, (length,), device="cuda") for length in (9, 1, 300, 40, 1)]
    together = torch.stack(list(stream(model, prompts, 8, prefill_chunk=128)), 1)
    for prompt, new in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt[None], 8)[0, len(prompt) :].cpu(), new)


@pytest.mark.parametrize("generator", [None, 1])
def test_samples_in_a_graph_follow_the_seed(generator):
    model = make()

    def draw(seed):
        if generator is None:
            torch.manual_seed(seed)
            options = {}
        else:
            options = {"generator": torch.Generator("cuda").manual_seed(seed)}
        decoder = Decoder(model, 4, Sampling(1.0, 200, 0.95), **options)
        tokens = []
        for _ in range(10):
            decoder.step()
            tokens.append(decoder.tokens.clone())
        return torch.stack(tokens)

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    # Every step draws anew.
    assert len(first.unique(dim=0)) > 5


@torch.no_grad()
def test_a_graph_does_not_read_casts_that_autocast_has_dropped():
    tokens = torch.randint(1000, (2, 6), device="cuda")
    model = make(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        model(tokens)
        decoder = Decoder(model, 2)
    # Memory of dropped casts is used again.
    filled = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    decoder.step()
    assert decoder.logits.isfinite().all()
    del filled


@torch.no_grad()
def test_states_of_a_long_prompt_enter_the_graph():
    model = make()
    tokens = torch.randint(1000, (5001,), device="cuda")
    decoder = Decoder(model, 1)
    for rows, states in prefill(model, [tokens], chunk=1024):
        decoder.load(states, rows)
    decoder.tokens.copy_(tokens[-1:])
    decoder.step()
    expected = model(tokens[None])[:, -1]
    assert error(decoder.logits.double(), expected.double()) < 0.03
    assert decoder.positions.tolist() == [5001]
