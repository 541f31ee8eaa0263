"""Generation continues as full forwards would."""

import dataclasses

import pytest
import torch

from lasp.tnl import TNL, TNLConfig, generate
from lasp.tnl.decoding import Decoder, Sampling
from lasp.tnl.generation import prefill, stream

CONFIG = TNLConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, glu_dim=48, init_std=0.2)
LEARNED = dataclasses.replace(CONFIG, decay="learned")
HYBRID = dataclasses.replace(CONFIG, layer_types="LSL", num_key_value_heads=2)


def make(dtype=torch.float32, config=CONFIG):
    torch.manual_seed(0)
    return TNL(config).to(dtype)


def prompt_of(batch, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(50, (batch, length), generator=generator)


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("config", [CONFIG, HYBRID, LEARNED], ids=["linear", "hybrid", "learned"])
@torch.no_grad()
def test_decoding_gives_the_logits_of_one_pass(length, dtype, tolerance, config):
    model, tokens = make(dtype, config), prompt_of(2, length + 20)
    expected = model(tokens)
    decoder, logits = Decoder(model, 2, context=length + 20), []
    for rows, states in prefill(model, list(tokens[:, :length]), chunk=32):
        decoder.load(states, rows)
    for t in range(length - 1, length + 20):
        decoder.tokens.copy_(tokens[:, t])
        decoder.step()
        logits.append(decoder.logits)
    error = (torch.stack(logits, 1) - expected[:, length - 1 :]).abs().max()
    assert error < tolerance * expected.abs().max()
    assert decoder.positions.tolist() == [length + 20] * 2


@pytest.mark.parametrize("config", [CONFIG, HYBRID, LEARNED], ids=["linear", "hybrid", "learned"])
@torch.no_grad()
def test_decoding_under_autocast(config):
    """The weights are float32, products bfloat16."""
    model, tokens = make(config=config), prompt_of(2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens).float()
        decoder, logits = Decoder(model, 2, context=30), []
        for rows, states in prefill(model, list(tokens[:, :20]), chunk=8):
            decoder.load(states, rows)
        for t in range(19, 30):
            decoder.tokens.copy_(tokens[:, t])
            decoder.step()
            logits.append(decoder.logits.float())
    error = (torch.stack(logits, 1) - expected[:, 19:]).abs().max()
    assert error < 0.05 * expected.abs().max()


@pytest.mark.parametrize("config", [CONFIG, HYBRID, LEARNED], ids=["linear", "hybrid", "learned"])
@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_prompts_of_any_lengths_continue_as_alone(config, chunk):
    model = make(torch.float64, config)
    prompts = [prompt_of(1, length)[0] for length in (9, 1, 3, 3, 20, 1, 40)]
    together = torch.stack(list(stream(model, prompts, 10, prefill_chunk=chunk)), 1)
    for prompt, new in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], 10)
        assert torch.equal(alone[0, len(prompt) :], new)


@pytest.mark.parametrize("config", [CONFIG, HYBRID], ids=["linear", "hybrid"])
@torch.no_grad()
def test_greedy_generation_repeats_the_argmax_of_full_forwards(config):
    model, tokens = make(torch.float64, config), prompt_of(2, 9)
    generated = model.generate(tokens, 12, prefill_chunk=4)
    assert torch.equal(generated, generate(model, tokens, 12))
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens)


def test_samples_follow_the_generator_and_top_k():
    model, tokens = make(), prompt_of(2, 9)

    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens, 15, temperature=1.5, generator=generator, **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), model.generate(tokens, 15))


def frequencies(**options):
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0]).expand(20000, -1)
    drawn = Sampling(temperature=0.7, **options)(logits, torch.Generator().manual_seed(0))
    return drawn.bincount(minlength=4) / 20000


# At temperature 0.7 the probabilities are 0.17, 0.74, 0.09 and 0.01, all four together 1.
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.8}, [0, 1]),
        ({"top_p": 0.95}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.8}, [1]),
        ({"top_k": 2, "top_p": 0.85}, [0, 1]),
    ],
)
def test_sampling_frequencies_follow_temperature_top_k_and_top_p(options, kept):
    logits = torch.full((4,), -torch.inf)
    logits[kept] = torch.tensor([1.0, 2.0, 0.5, -1.0])[kept] / 0.7
    counts = frequencies(**options)
    torch.testing.assert_close(counts, logits.softmax(0), rtol=0, atol=0.015)
    assert not counts[[i for i in range(4) if i not in kept]].any()


def test_end_of_sequence_stops_each_row():
    model, tokens = make(), prompt_of(3, 5)
    free = model.generate(tokens, 20)
    eos = free[0, 8].item()
    stopped = model.generate(tokens, 20, eos_token_id=eos)
    assert 6 <= stopped.shape[1] <= 25
    for row, reference in zip(stopped[:, 5:], free[:, 5:], strict=True):
        hits = (reference == eos).nonzero()
        end = hits[0].item() + 1 if len(hits) else 20
        assert torch.equal(row[:end], reference[: min(end, len(row))])
        assert (row[end:] == eos).all()
    # Once every row has ended, nothing more is generated.
    assert model.generate(tokens[:1], 20, eos_token_id=eos).shape[1] <= 9


def test_left_padded_prompts_generate_as_if_unpadded():
    model, tokens = make(torch.float64), prompt_of(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :7] = False
    together = model.generate(tokens, 10, padding_mask=mask, prefill_chunk=5)
    assert torch.equal(together[:1], model.generate(tokens[:1], 10))
    assert torch.equal(together[1:, 7:], model.generate(tokens[1:, 7:], 10))


def test_no_new_tokens():
    tokens = prompt_of(1, 3)
    assert torch.equal(make().generate(tokens, 0), tokens)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (0, {}, "at least one token"),
        (2, {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (2, {"temperature": -1.0}, "temperature is -1.0"),
        (2, {"top_k": 0}, "top_k is 0"),
        (2, {"top_p": 0.0}, "top_p is 0.0"),
        (2, {"top_p": 1.5}, "top_p is 1.5"),
        (2, {"prefill_chunk": 0}, "prefill_chunk is 0"),
        (2, {"padding_mask": torch.tensor([[True, False]])}, "pad on the left"),
        (2, {"padding_mask": torch.ones(1, 3)}, r"padding_mask is \(1, 3\)"),
    ],
)
def test_bad_options_are_refused(length, options, message):
    options = {"max_new_tokens": 1, **options}
    with pytest.raises(ValueError, match=message):
        make().generate(torch.zeros(1, length, dtype=torch.int64), **options)


def test_a_decoder_of_a_hybrid_needs_the_size_of_its_caches():
    with pytest.raises(ValueError, match="context is 0, and 1 layers are softmax attention"):
        Decoder(make(config=HYBRID), 2)
