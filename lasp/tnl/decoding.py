"""One token per sequence at a time, with states in place: `Decoder`.

On a GPU the whole token step, sampling included, is one CUDA graph, and linear blocks in 16 bits
run as five kernels each (`lasp.ops.triton.decode`). Elsewhere the model's layers run one by one.

Shapes: B sequences, V vocabulary, d model width, H heads, G key heads, D head dim, K key dim,
S tokens that a cache holds.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

import lasp
from lasp.tnl.layers import GatedLinearAttention, TNLBlock
from lasp.tnl.learned_decay import learned_decay
from lasp.tnl.model import TNL, TNLState
from lasp.tnl.positions import rotate_at

__all__ = ["Decoder", "Sampling"]

# Keys that one product of a softmax layer reads: many products fill a GPU, few of them one result.
_SPLIT = 512


class Sampling(NamedTuple):
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise divides the logits.
        top_k: choose among the k most likely tokens; None: among all.
        top_p: choose among the fewest tokens whose probabilities, after temperature and top_k, sum
            to at least top_p; None: among all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __call__(
        self, logits: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """One token per row of logits [B, V], int64 [B]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits, tokens = logits.float() / self.temperature, None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            # In falling order. All that follows looks at few tokens instead of all.
            logits, tokens = logits.topk(self.top_k, dim=-1)
        elif self.top_p is not None and self.top_p < 1:
            logits, tokens = logits.sort(dim=-1, descending=True)
        probabilities = logits.softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            # The first token always stays.
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)


class Decoder:
    """Decodes `batch_size` sequences, one token of each per `step`.

    `load` sets what the sequences have read; `tokens` are the newest ones, which no state has seen.

    Args:
        model: in evaluation; its weights must stay where they are.
        batch_size: B.
        sampling: of the tokens; None: the most likely ones.
        generator: for sampling, on the model's device; None: torch's global one.
        context: tokens of each sequence that softmax layers can hold, and that position embeddings
            must have.
        use_graph: replay one CUDA graph per step; None: on GPUs, unless the model is sharded.

    Raises:
        ValueError: there are softmax layers, and no context, or fewer position embeddings.

    Attributes:
        tokens: [B] int64, of the next step's input, which are its output afterwards.
        positions: [B] int64, tokens that the states have seen.
        logits: [B, V], from which the newest tokens were chosen.
        states: one per layer: [B, H, K, D] float32, or keys and values [2, B, G, S, D].
    """

    def __init__(
        self,
        model: TNL,
        batch_size: int,
        sampling: Sampling | None = None,
        *,
        generator: torch.Generator | None = None,
        context: int = 0,
        use_graph: bool | None = None,
    ) -> None:
        if model.config.num_softmax_layers and context < 1:
            raise ValueError(
                f"context is {context}, and {model.config.num_softmax_layers} layers are softmax "
                "attention: say how many tokens their caches have to hold."
            )
        problem = model.config.sequence_problem(context)
        if problem is not None:
            raise ValueError(problem)
        self.model = model
        self.sampling = Sampling() if sampling is None else sampling
        self.generator = generator
        device = model.head_weight.device
        is_plain = not any(hasattr(p, "to_local") for p in model.parameters())
        self._counters: torch.Tensor | None = None
        self.tokens, self.positions = torch.zeros(2, batch_size, dtype=torch.int64, device=device)
        self.logits = torch.empty(0, device=device)
        self.states = _empty_states(model, batch_size, context)
        if device.type == "cuda" and is_plain and _fits_kernels(model, batch_size):
            self.use_kernels()
        self._graph: torch.cuda.CUDAGraph | None = None
        if use_graph is None:
            use_graph = device.type == "cuda" and is_plain
        if use_graph:
            self._capture()

    def use_kernels(self) -> None:
        """Run linear blocks by the fused kernels, as is chosen on GPUs where they apply."""
        from lasp.ops.triton.launch_config import MAX_DECODE_PROGRAMS
        from lasp.ops.triton.lrpe import turns

        device = self.tokens.device
        self._counters = torch.zeros(MAX_DECODE_PROGRAMS, dtype=torch.int32, device=device)
        rates = [getattr(block.token_mixer, "lrpe", None) for block in self.model.blocks]
        self._turns = [None if x is None else turns(x.theta.detach().squeeze(1)) for x in rates]

    @property
    def is_fused(self) -> bool:
        """True if linear blocks run by the fused kernels."""
        return self._counters is not None

    def load(self, states: TNLState, rows: Sequence[int]) -> None:
        """Set the states of some sequences, that have all read `states.position` tokens."""
        for own, new in zip(self.states, states.layers, strict=True):
            if own.dim() == 4:
                own[rows] = new
            else:
                own[:, rows, :, : new.shape[2]] = new.transpose(2, 3).to(own.dtype)
        self.positions[rows] = states.position

    @torch.no_grad()
    def step(self) -> None:
        """Read `tokens`, and set them to the next ones."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        self.logits = self._fused_logits() if self.is_fused else self._logits()
        if self.is_fused and self.sampling.temperature == 0:
            from lasp.ops.triton.decode import next_tokens

            next_tokens(self.logits, self.tokens, self.positions)
            return
        self.tokens.copy_(self.sampling(self.logits, self.generator))
        self.positions += 1

    def _capture(self) -> None:
        """Record one step; the states are zero before and after."""
        device = self.tokens.device
        graph = torch.cuda.CUDAGraph()
        with (
            _unchanged(self.generator, device),
            _without_autocast_cache(),
            torch.cuda.device(device),
            torch.no_grad(),
        ):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Compiles kernels and creates the libraries' handles, which a capture cannot.
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            if self.generator is not None:
                graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):
                self._step()
            for each in (*self.states, self.tokens, self.positions):
                each.zero_()
        self._graph = graph

    def _logits(self) -> torch.Tensor:
        """The layers of the model, one by one."""
        model = self.model
        x = model._embed(self.tokens[:, None], self.positions[:, None])
        for block, state in zip(model.blocks, self.states, strict=True):
            x = x + self._mix(block, x, state)
            x = x + block.channel_mixer(block.channel_norm(x))
        logits = F.linear(model.final_norm(x), model.head_weight)
        # Of a head sharded by vocabulary.
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        return logits[:, 0]

    def _mix(self, block: TNLBlock, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        mixer, x = block.token_mixer, block.token_norm(x)
        if not isinstance(mixer, GatedLinearAttention):
            return mixer.out_proj(self._softmax_attention(mixer, x, state).flatten(-2))
        q, k, v, *gate = mixer.project(x)
        if mixer.lrpe is not None:
            q, k = mixer.lrpe.at(q, k, self.positions)
        log_decay = mixer.log_decay
        if mixer.decay_proj is not None:
            log_decay = learned_decay(mixer.decay_proj(x), log_decay, mixer.decay_sharpness)[:, 0]
        o, _ = lasp.lightning_attention_step(
            q[:, 0], k[:, 0], v[:, 0], state, log_decay, inplace=True
        )
        return mixer.output(o[:, None], *gate)

    def _softmax_attention(self, mixer, x, cache) -> torch.Tensor:
        """o [B, 1, H, D]; the keys and values of this token join the cache."""
        q = mixer.q_proj(x).unflatten(-1, (-1, mixer.head_dim))
        k, v = mixer.kv_proj(x).unflatten(-1, (-1, 2, mixer.head_dim)).unbind(dim=-2)
        q, k = (rotate_at(each, self.positions, mixer.config.rope_base) for each in (q, k))
        # Under autocast, products have another dtype than the weights.
        q, k, v = (each.to(cache.dtype) for each in (q, k, v))
        rows = torch.arange(len(q), device=q.device)
        cache[0, rows, :, self.positions], cache[1, rows, :, self.positions] = k[:, 0], v[:, 0]
        return _attend_to_cache(q[:, 0], cache, self.positions)[:, None]

    def _fused_logits(self) -> torch.Tensor:
        """The same in few kernels: see `lasp.ops.triton.decode`."""
        from lasp.ops.triton import decode
        from lasp.ops.triton.decode import embed, mixer

        linear = functools.partial(decode.linear, counters=self._counters)
        model, eps = self.model, self.model.config.norm_eps
        scale = math.sqrt(model.config.dim) if model.config.scale_embedding else 1.0
        x, squares = embed(self.tokens, model.embedding.weight, scale)
        layers = zip(model.blocks, self.states, self._turns, strict=True)
        for block, state, turns in layers:
            mix, channel = block.token_mixer, block.channel_mixer
            normed = dict(squares=squares, eps=eps)
            if isinstance(mix, GatedLinearAttention):
                silu = mix.head_dim if mix.config.activation == "silu" else 0
                qkvu, _ = linear(x, mix.qkvu_proj.weight, silu=silu, **normed)
                log_decay = mix.log_decay
                if mix.decay_proj is not None:
                    u = mix.decay_proj(block.token_norm(x))
                    log_decay = learned_decay(u, log_decay, mix.decay_sharpness)
                qkvu = qkvu.view(len(x), -1, 4, mix.head_dim)
                gated, of_o = mixer(qkvu, state, log_decay, turns, self.positions)
                normed = dict(squares=of_o, eps=eps)
                weight = mix.out_proj.weight
                x, squares = linear(gated, weight, residual=x, with_squares=True, **normed)
            else:
                x = x + self._mix(block, x[:, None], state)[:, 0]
                squares = x.float().square().sum(-1, keepdim=True)
            inner, _ = linear(
                x, channel.w1.weight, gate=channel.w2.weight, squares=squares, eps=eps
            )
            x, squares = linear(inner, channel.w3.weight, residual=x, with_squares=True)
        normed = dict(squares=squares, eps=eps)
        logits, _ = linear(x, model.head_weight, dtype=torch.float32, **normed)
        return logits


def _empty_states(model: TNL, batch_size: int, context: int) -> list[torch.Tensor]:
    """Zero states, and caches of at least `context` tokens, of the heads held here."""
    weight = model.head_weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    tokens = -(-context // _SPLIT) * _SPLIT
    states = []
    for block in model.blocks:
        mixer = block.token_mixer
        if isinstance(mixer, GatedLinearAttention):
            shape, dtype = (batch_size, *mixer.state_shape), wide
        else:
            shape = (2, batch_size, mixer.num_key_heads, tokens, mixer.head_dim)
            dtype = weight.dtype
        states.append(torch.zeros(shape, dtype=dtype, device=weight.device))
    return states


def _fits_kernels(model: TNL, batch_size: int) -> bool:
    """True if the fused kernels can decode: the released architecture (`TNLConfig.variants`) in
    bfloat16, plain linear layers, and few sequences.

    (In float16 they would overflow: they multiply u by o before the norm.)
    """
    from lasp.ops.triton.launch_config import MAX_DECODE_ROWS

    matrices = [p for p in model.parameters() if p.dim() == 2]
    return (
        batch_size <= MAX_DECODE_ROWS
        and not model.config.variants()
        and all(p.dtype == torch.bfloat16 and p.is_contiguous() for p in matrices)
    )


def _attend_to_cache(q: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Softmax attention of one token per sequence: q [B, H, D] -> o [B, H, D].

    It sees the keys at positions 0..positions[b] of cache [2, B, G, S, D]. The cache is read in
    splits, all at once; the sums of a split are combined at the end.
    """
    B, H, D = q.shape
    G, S = cache.shape[2:4]
    wide = torch.promote_types(q.dtype, torch.float32)
    # [B, G, splits, keys, D]; queries that share a key head are rows of one product.
    k, v = cache.unflatten(3, (-1, _SPLIT))
    q = q.view(B, G, 1, H // G, D).expand(-1, -1, S // _SPLIT, -1, -1)
    scores = (q @ k.mT).to(wide) / math.sqrt(D)
    keys = torch.arange(S, device=q.device).view(-1, 1, _SPLIT)
    scores = scores.masked_fill(keys > positions.view(-1, 1, 1, 1, 1), -torch.inf)
    weights = (scores - scores.amax((2, 4), keepdim=True)).exp()
    o = (weights.to(v.dtype) @ v).to(wide).sum(2) / weights.sum((2, 4))[..., None]
    return o.reshape(B, H, D).to(cache.dtype)


@contextlib.contextmanager
def _unchanged(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside are drawn again afterwards."""
    if generator is None:
        before = torch.cuda.get_rng_state(device)
        yield
        torch.cuda.set_rng_state(before, device)
        return
    state = generator.get_state()
    yield
    generator.set_state(state)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Casts of weights inside are made anew: a graph would read the memory of cached ones."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
