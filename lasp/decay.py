"""Log-decay builders: how much each head forgets per token, as float32 [H] values <= 0.

The decay of lightning attention is a constant of the head (and, in TransNormerLLM, of the layer).
Simple GLA, gated retention and Mamba-2 have one per token, which their layers compute.
lambda = exp(log_decay). Published models disagree on the formula; each has its own function here.
Layers are counted from 0, over the whole model, and heads over all tensor-parallel ranks: build the
full vector, then slice it.

`Decay` is the operator's interface to the decay; the exchange sees only its factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch

from lasp import replay
from lasp.ops.host_values import check_token_decays, compute_once, decay_rates, filled

__all__ = ["Decay", "alibi", "alibi_slopes", "ling", "minimax", "retention", "tnl"]

# exp of anything less is zero.
_UNDERFLOW = {torch.float32: -104.0, torch.float64: -746.0}


class Decay:
    """The decay of a call: a constant per head, or a value per token and head.

    Args:
        log_decay: float32 [H], finite and <= 0, or [B, T, H], <= 0; None: no decay.
    """

    operand: torch.Tensor | None = None

    def __init__(self, log_decay: torch.Tensor | None) -> None:
        self.log_decay = log_decay
        self.by_token = log_decay is not None and log_decay.dim() > 1

    @cached_property
    def rates(self) -> tuple[float, ...] | str | None:
        """What ranks have to agree on: log_decay as host floats, or its kind.

        Raises:
            ValueError: values that are not allowed. Those of a decay per token are checked on the
                CPU only: on a GPU the host would wait for them in every call.
        """
        if self.log_decay is None or not self.by_token:
            return decay_rates(self.log_decay)
        check_token_decays(self.log_decay)
        return "one per token"

    @classmethod
    def of(cls, log_decay: torch.Tensor | Decay | None) -> Decay:
        """The decay itself, or that of a tensor."""
        return log_decay if isinstance(log_decay, Decay) else cls(log_decay)

    def bind(self, partition, backend) -> Decay:
        """Divide a decay per token as `partition` divides the tokens; returns self.

        Sets `operand`, the decay that functions of the backend take, once for all partitions of a
        call, which divide tokens in the same way.
        """
        self._partition, self._backend = partition, backend
        # Of a decay per token, by the rows.
        self._factors: dict[tuple[int, ...] | None, torch.Tensor] = {}
        if not self.by_token:
            self.operand = self.log_decay
        elif self.operand is None:
            self.operand = backend.prepare_decay(partition.fold(self.log_decay))
        return self

    def row_factors(self, states: torch.Tensor, *, reverse: bool) -> torch.Tensor:
        """What remains of states [rows, H, D, E] after the rows that they leave, of their dtype:
        [H, 1, 1] or [rows, H, 1, 1]."""
        if self.by_token:
            rows = self._partition.state_rows(entering=False, reverse=reverse)
            if rows not in self._factors:
                cu_seqlens = self._partition.cu_seqlens
                # Of the partition that is bound, which may have other rows than `states`.
                count, heads = states.shape[:2]
                if cu_seqlens is not None:
                    count = len(cu_seqlens) - 1 if rows is None else len(rows)
                factors = torch.empty(count, heads, 1, 1, dtype=states.dtype, device=states.device)
                sums = partial(self._backend.decay_sums, cu_seqlens=cu_seqlens, state_rows=rows)
                replay.note_call(partial(_write_factors, sums), self.operand, factors)
                self._factors[rows] = factors
            return self._factors[rows]
        lengths = self._partition.row_lengths()
        factor = self.factor if isinstance(lengths, int) else self.factors
        return factor(lengths, states)

    def chunk_factor(self, chunk: int, rows: torch.Tensor, *, reverse: bool) -> torch.Tensor | None:
        """What remains of a state that crosses a chunk in which it meets no boundary of a document;
        None: nothing does. `rows` are the states that leave the rows."""
        length = self._partition.chunk_lengths[chunk]
        if not self.by_token:
            return None if self.is_zero_after(length, rows.dtype) else self.factor(length, rows)
        factors = self.row_factors(rows, reverse=reverse)
        return self._partition.state_out(factors, chunk, reverse)

    def factor(self, length: int, states: torch.Tensor) -> torch.Tensor:
        """What remains of states [B, H, D, E] after `length` tokens: [H, 1, 1], of their dtype."""
        if self.log_decay is None:
            factor = filled(1.0, states.shape[1], states.dtype, states.device)[:, None, None]
            replay.note_constants(factor)
            return factor
        dtype = states.dtype

        def compute(log_decay: torch.Tensor) -> torch.Tensor:
            return torch.exp(log_decay.to(dtype)[:, None, None] * length)

        # A CUDA graph must hold no memory but its own.
        if not states.is_cuda or torch.cuda.is_current_stream_capturing():
            return compute(self.log_decay)
        # Two kernels less on the way of every state.
        stream = torch.cuda.current_stream(states.device).cuda_stream
        factor = compute_once(self.log_decay, ("factor", length, dtype, stream), compute)
        replay.note_constants(factor)
        return factor

    def factors(self, lengths: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """`factor` for rows of different `lengths`: int64 [N] -> [N, H, 1, 1]."""
        if self.log_decay is None:
            return states.new_ones(states.shape[1], 1, 1)
        lengths = lengths.to(states.device, non_blocking=True).to(states.dtype)
        log_decay = self.log_decay.to(states.dtype)[:, None, None]
        return torch.exp(lengths[:, None, None, None] * log_decay)

    def is_zero_after(self, length: int, dtype: torch.dtype) -> bool:
        """True if nothing remains of any state after `length` tokens, in `dtype`."""
        rates = self.rates
        return isinstance(rates, tuple) and max(rates) * length < _UNDERFLOW[dtype]


def _write_factors(
    sums: Callable[[torch.Tensor], torch.Tensor], operand: torch.Tensor, factors: torch.Tensor
) -> None:
    """Write exp of `sums(operand)` [rows, H] to factors [rows, H, 1, 1]."""
    totals = sums(operand).to(factors.dtype)
    torch.exp(totals, out=factors.view(totals.shape))


def alibi_slopes(num_heads: int) -> list[float]:
    """The ALiBi slopes 2^(-8 (h+1) / H), positive; for H not a power of two the published rule.

    That rule takes the slopes of the largest power of two below H and fills up with every second
    slope of the next one (arXiv 2108.12409, and the released TransNormerLLM code).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}: it must be at least 1.")
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def tnl(num_heads: int, layer: int, num_layers: int) -> torch.Tensor:
    """Log decay of TransNormerLLM's released checkpoints, of MiniMax's original code and of vLLM's
    MiniMax-Text-01, [H].

    -slope_h * (1 - layer / (num_layers - 1) + 1e-5): strong in the first layer, next to none in the
    last. A model of one layer takes the factor 1 + 1e-5.
    """
    _check_layer(layer, num_layers)
    factor = 1.0 - layer / max(num_layers - 1, 1) + 1e-5
    return -torch.tensor(alibi_slopes(num_heads), dtype=torch.float32) * factor


def alibi(num_heads: int) -> torch.Tensor:
    """Log decay -slope_h, the same in every layer, [H]: `tnl` without the layer's factor, as in
    TransNormerLLM's ablation (arXiv 2405.17381, table 5)."""
    return -torch.tensor(alibi_slopes(num_heads), dtype=torch.float32)


def minimax(num_heads: int, layer: int, num_layers: int) -> torch.Tensor:
    """Log decay of MiniMax-01 as in the transformers library, [H].

    It differs from `tnl` for head counts that are no power of two, and in the last layer.
    """
    _check_layer(layer, num_layers)
    factor = 1.0 - layer / (num_layers - 1 + 1e-5) + 1e-5
    slopes = [2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)]
    return -torch.tensor(slopes, dtype=torch.float32) * factor


def ling(num_heads: int, layer: int, num_layers: int) -> torch.Tensor:
    """Log decay of Ling and Ring linear (Bailing), 2.0 to 2.6, [H].

    The `tnl` formula with layer - 1 (-1 for the first layer), as in the code that is published with
    the weights (modeling_bailing_moe_v2_5.py of inclusionAI/Ring-V2.5). vLLM's bailing_moe_linear
    counts from the layer itself, which is `tnl`.
    """
    _check_layer(layer, num_layers)
    factor = 1.0 - (layer - 1) / max(num_layers - 1, 1) + 1e-5
    return -torch.tensor(alibi_slopes(num_heads), dtype=torch.float32) * factor


def retention(num_heads: int) -> torch.Tensor:
    """Log decay of RetNet, [H]: log(1 - 2^(-5 - h)) (arXiv 2307.08621, eq. 8)."""
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}: it must be at least 1.")
    rates = [math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)]
    return torch.tensor(rates, dtype=torch.float32)


def _check_layer(layer: int, num_layers: int) -> None:
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"layer is {layer}: layers are counted from 0 to num_layers - 1 = {num_layers - 1}."
        )
