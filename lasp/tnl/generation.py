"""Generation with a state of constant size: no growing cache, no limit on the length.

(In a hybrid, the keys and values of the softmax layers do grow.)

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lasp.tnl.model import TNL, TNLState

__all__ = ["generate", "prefill", "sample"]


@torch.no_grad()
def generate(
    model: TNL,
    prompt_tokens: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    padding_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int = 2048,
) -> torch.Tensor:
    """Prompts and their continuations, integers [B, T + new], new <= max_new_tokens.

    Args:
        model: in any dtype, on the device of the prompts.
        prompt_tokens: integers [B, T], T >= 1.
        max_new_tokens: at most this many tokens are added.
        temperature: 0 takes the most likely token; otherwise divides the logits before sampling.
        top_k: sample from the k most likely tokens; None: from all.
        eos_token_id: a sequence that has produced it is padded with it; generation ends when every
            sequence has.
        padding_mask: bool [B, T], False where a prompt is padded. Pad on the left: padding before
            the first token has no effect on the result. Not for models with softmax layers.
        generator: for sampling, on the model's device; None: torch's global one.
        prefill_chunk: tokens of the prompt read at a time; bounds memory, does not change results.

    Raises:
        ValueError: an empty prompt, or an option out of range.
    """
    _check(prompt_tokens, max_new_tokens, temperature, top_k, prefill_chunk)
    if max_new_tokens == 0:
        return prompt_tokens
    logits, states = prefill(model, prompt_tokens, padding_mask, chunk=prefill_chunk)
    generated = [prompt_tokens]
    finished = torch.zeros(len(prompt_tokens), dtype=torch.bool, device=prompt_tokens.device)
    for count in range(1, max_new_tokens + 1):
        token = sample(logits, temperature, top_k, generator).to(prompt_tokens.dtype)
        if eos_token_id is not None:
            token = token.masked_fill(finished, eos_token_id)
            finished = finished | (token == eos_token_id)
        generated.append(token[:, None])
        if count == max_new_tokens or (eos_token_id is not None and bool(finished.all())):
            break
        logits, states = model(token[:, None], states=states, return_states=True)
        logits = logits[:, -1]
    return torch.cat(generated, dim=1)


def prefill(
    model: TNL,
    tokens: torch.Tensor,
    padding_mask: torch.Tensor | None = None,
    *,
    chunk: int = 2048,
    states: TNLState | None = None,
) -> tuple[torch.Tensor, TNLState]:
    """Read tokens [B, T], T >= 1, in chunks; the last token's logits [B, V] and the state."""
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        hidden, states = model(
            tokens[:, part],
            states=states,
            return_states=True,
            return_hidden=True,
            padding_mask=None if padding_mask is None else padding_mask[:, part],
        )
    return F.linear(hidden[:, -1], model.head_weight), states


def sample(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token per row of logits [B, V], int64 [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


# So that `model.generate(...)` works, without `lasp.tnl.model` importing this module.
TNL.generate = generate


def _check(prompt_tokens, max_new_tokens, temperature, top_k, prefill_chunk) -> None:
    if prompt_tokens.ndim != 2 or prompt_tokens.shape[1] == 0:
        raise ValueError(
            f"prompt_tokens has shape {tuple(prompt_tokens.shape)}: give [batch, tokens] with at "
            "least one token (start an empty text with your tokenizer's first-token id)."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it cannot be negative.")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or positive.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: give at least 1, or None for the whole vocabulary.")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk}: it must be at least 1.")
