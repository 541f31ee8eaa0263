"""Generation with a state of constant size: no growing cache, no limit on the length.

(In a hybrid, the keys and values of the softmax layers do grow.)

The prompt, but for its last token, is read in large chunks, for the states alone; `Decoder` reads
that token and all that follow.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from lasp.shard import SequenceShard
from lasp.tnl.decoding import Decoder, Sampling
from lasp.tnl.model import TNL, TNLState

__all__ = ["generate", "prefill", "stream"]

# Tokens that a chunk of a prompt has at most. A GPU is busy from a few thousand tokens on; on a CPU
# a longer chunk only takes more memory.
_CHUNK = {"cuda": 32768, "cpu": 2048}


def generate(
    model: TNL,
    prompt_tokens: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    padding_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
) -> torch.Tensor:
    """Prompts and their continuations, integers [B, T + new], new <= max_new_tokens.

    Args:
        model: in any dtype, on the device of the prompts.
        prompt_tokens: integers [B, T], T >= 1.
        max_new_tokens: at most this many tokens are added.
        temperature: 0 takes the most likely token; otherwise divides the logits before sampling.
        top_k: sample from the k most likely tokens; None: from all.
        top_p: sample from the fewest tokens whose probabilities, after temperature and top_k, sum
            to at least this; None: from all.
        eos_token_id: a sequence that has produced it is padded with it; generation ends when every
            sequence has.
        padding_mask: bool [B, T], False where a prompt is padded. Pad on the left: padding has no
            effect on the result.
        generator: for sampling, on the model's device; None: torch's global one.
        prefill_chunk: tokens of the prompt read at a time; bounds memory, does not change results.
            None: 32,768 on a GPU, 2,048 on a CPU.

    Raises:
        ValueError: an empty prompt, padding that is not on the left, or an option out of range.
    """
    if prompt_tokens.ndim != 2 or prompt_tokens.shape[1] == 0:
        raise ValueError(
            f"prompt_tokens has shape {tuple(prompt_tokens.shape)}: give [batch, tokens] with at "
            "least one token (start an empty text with your tokenizer's first-token id)."
        )
    prompts = list(prompt_tokens)
    if padding_mask is not None:
        prompts = _without_padding(prompt_tokens, padding_mask.bool())
    new = stream(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_token_id,
        generator=generator,
        prefill_chunk=prefill_chunk,
    )
    columns = [each[:, None] for each in new]
    if not columns:
        return prompt_tokens
    return torch.cat([prompt_tokens, torch.cat(columns, 1).to(prompt_tokens)], dim=1)


def stream(
    model: TNL,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
    group: ProcessGroup | None = None,
) -> Iterator[torch.Tensor]:
    """The continuations of prompts of any lengths, token by token, as soon as they are known.

    Args:
        prompts: B of them, each integers [T], T >= 1, on the model's device.
        group: ranks with equal models, which read a single prompt together, each a part of every
            chunk, and then all decode; None: this device reads all of it.

        All others as of `generate`.

    Yields:
        the next token of every prompt, int64 [B] on the CPU.

    Raises:
        ValueError: see `generate`; with a group, several prompts, or softmax layers.
    """
    chunk = _CHUNK.get(model.head_weight.device.type, 2048)
    chunk = chunk if prefill_chunk is None else prefill_chunk
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, prompts, max_new_tokens, sampling, chunk, group)
    return _stream(model, prompts, max_new_tokens, sampling, eos_token_id, generator, chunk, group)


def _stream(model, prompts, max_new_tokens, sampling, eos_token_id, generator, chunk, group):
    if max_new_tokens == 0 or not prompts:
        return
    context = max(map(len, prompts)) + max_new_tokens
    decoder = Decoder(model, len(prompts), sampling, generator=generator, context=context)
    for rows, states in prefill(model, prompts, chunk=chunk, group=group):
        decoder.load(states, rows)
    decoder.tokens.copy_(torch.stack([prompt[-1] for prompt in prompts]))
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for tokens in _steps(decoder, max_new_tokens):
        if eos_token_id is not None:
            tokens = tokens.masked_fill(finished, eos_token_id)
            finished |= tokens == eos_token_id
        yield tokens
        if finished.all():
            return


def _steps(decoder: Decoder, count: int) -> Iterator[torch.Tensor]:
    """The tokens of `count` steps, on the CPU; a GPU is one step ahead of what was yielded."""
    if decoder.tokens.device.type != "cuda":
        for _ in range(count):
            decoder.step()
            yield decoder.tokens.clone()
        return
    pending: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
    for _ in range(count):
        decoder.step()
        copy = torch.empty(decoder.tokens.shape, dtype=torch.int64, pin_memory=True)
        copy.copy_(decoder.tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        pending.append((copy, done))
        if len(pending) > 1:
            yield _arrived(*pending.popleft())
    yield from (_arrived(*each) for each in pending)


def _arrived(copy: torch.Tensor, done: torch.cuda.Event) -> torch.Tensor:
    done.synchronize()
    return copy


@torch.no_grad()
def prefill(
    model: TNL,
    prompts: Sequence[torch.Tensor],
    *,
    chunk: int = 2048,
    group: ProcessGroup | None = None,
) -> Iterator[tuple[list[int], TNLState]]:
    """Read all tokens but the last of every prompt, as several batches: for each the indices of its
    prompts, and their states.

    Short prompts of different lengths are packed as documents, `chunk` tokens or less at a time
    (with softmax layers or position embeddings, they are read one by one). Prompts of one token
    have states of zero and are left out.
    """
    lengths = {index: len(prompt) - 1 for index, prompt in enumerate(prompts) if len(prompt) > 1}
    config = model.config
    alike = config.num_softmax_layers > 0 or config.position_embeddings > 0
    for batch in _batches(lengths, chunk, alike):
        parts = [prompts[index][:-1] for index in batch]
        if len({len(part) for part in parts}) > 1:
            yield from _read_packed(model, parts, batch)
        else:
            yield batch, _read(model, torch.stack(parts), chunk, group)


def _batches(lengths: dict[int, int], chunk: int, alike: bool) -> Iterator[list[int]]:
    """Consecutive prompts of at most `chunk` tokens together, or a single longer one; `alike`: of
    one length."""
    batch: list[int] = []
    total = 0
    for index, length in lengths.items():
        if batch and (total + length > chunk or (alike and length != lengths[batch[0]])):
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += length
    if batch:
        yield batch


def _read_packed(model, prompts, rows) -> Iterator[tuple[list[int], TNLState]]:
    """The states of prompts that are read as documents of one row."""
    lengths = torch.tensor([len(each) for each in prompts])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    tokens = torch.cat(prompts)[None]
    states = model(tokens, cu_seqlens=bounds.to(tokens.device), states_only=True)
    for index, (row, end) in enumerate(zip(rows, bounds[1:].tolist(), strict=True)):
        # LRPE counts along the row; only differences of positions matter.
        yield [row], TNLState([layer[index : index + 1] for layer in states.layers], end)


def _read(model, tokens, chunk, group) -> TNLState:
    """The states after tokens [B, T], on every rank of the group."""
    states = None
    size = 1 if group is None else group.size()
    for start in range(0, tokens.shape[1], chunk * size):
        part = tokens[:, start : start + chunk * size]
        shard = None
        if size > 1:
            shard = SequenceShard.split(part.shape[1], group)
            part = shard.take(part)
        states = model(part, shard, states=states, states_only=True)
        if size > 1:
            # The last rank's are those of all tokens.
            layers = [layer.contiguous() for layer in states.layers]
            for layer in layers:
                dist.broadcast(layer, group=group, group_src=size - 1)
            states = TNLState(layers, start + shard.total)
    return states


def _without_padding(tokens: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    if mask.shape != tokens.shape:
        raise ValueError(
            f"padding_mask is {tuple(mask.shape)}: it must have the shape of the prompts, "
            f"{tuple(tokens.shape)}."
        )
    if not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError(
            "padding_mask is False after a token: pad on the left, and leave a token in each row."
        )
    return [row[keep] for row, keep in zip(tokens, mask, strict=True)]


def _check(model, prompts, max_new_tokens, sampling, chunk, group) -> None:
    for prompt in prompts:
        if prompt.ndim != 1 or not len(prompt) or prompt.is_floating_point():
            raise ValueError(
                f"a prompt is {prompt.dtype} {tuple(prompt.shape)}: give integers [tokens] with at "
                "least one token (start an empty text with your tokenizer's first-token id)."
            )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it cannot be negative.")
    problem = model.config.sequence_problem(max(map(len, prompts), default=0) + max_new_tokens)
    if problem is not None:
        raise ValueError(f"a prompt and max_new_tokens {max_new_tokens} are too long: {problem}")
    if not sampling.temperature >= 0:
        raise ValueError(
            f"temperature is {sampling.temperature}: it must be 0 (greedy) or positive."
        )
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(
            f"top_k is {sampling.top_k}: give at least 1, or None for the whole vocabulary."
        )
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}: give a number in 0 < top_p <= 1, or None.")
    if chunk < 1:
        raise ValueError(f"prefill_chunk is {chunk}: it must be at least 1.")
    if group is None:
        return
    problem = model.config.streaming_problem()
    if problem is not None or len(prompts) != 1:
        raise ValueError(
            f"group is given, whose ranks read one prompt together: {problem or ''}"
            f"{'' if len(prompts) == 1 else f' there are {len(prompts)} prompts.'}".rstrip()
        )


# So that `model.generate(...)` works, without `lasp.tnl.model` importing this module.
TNL.generate = generate
