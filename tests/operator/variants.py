"""The table of the conformance suite: a new kind of call joins it by one row.

A row says what is special about a call; the suite gives it lengths, ranks, exchanges and backends,
and cuts it. Everything else is ordinary: two sequences, five heads of decays from none to one that
forgets at once, no states from or to the outside, an even contiguous cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.lasp.sharded import Problem, documents_that, even


def no_decay(heads, tokens):
    return None


def strong_decay(heads, tokens):
    """No shard lets through anything of the state that enters it: all send before they receive."""
    return torch.full((heads,), -60.0)


def weak_decay(heads, tokens):
    return torch.linspace(-1e-3, -1e-5, heads)


def by_token(heads, tokens):
    """One per token: most keep nearly everything, some nothing."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 8, (1, tokens, heads), generator=generator)
    rates = torch.tensor([0.0, -1e-5, -1e-3, -1e-3, -0.03, -0.1, -1.0, -50.0])[chosen]
    return rates * torch.rand(rates.shape, generator=generator)


def weak_by_token(heads, tokens):
    return -1e-3 * torch.rand(1, tokens, heads, generator=torch.Generator().manual_seed(0))


def zero_by_token(heads, tokens):
    return torch.zeros(1, tokens, heads)


def strong_by_token(heads, tokens):
    """Nothing stays but in the first head, whose gradient is one that rounding does not drown."""
    rates = torch.full((1, tokens, heads), -50.0)
    rates[..., 0] = -1e-3
    return rates


def resets(heads, tokens):
    """The state starts anew at every fifth token or so, between weak decays."""
    rates = weak_by_token(heads, tokens)
    generator = torch.Generator().manual_seed(1)
    return rates.masked_fill(torch.rand(rates.shape, generator=generator) < 0.2, -torch.inf)


@dataclass(frozen=True)
class Variant:
    """One kind of call.

    decay: a function of (heads, tokens): log_decay, float32 [heads], None, or one per token
    [1, tokens, heads], which is then cut as the tokens are and gets a gradient. sizes: of keys and
    values; None: what suits the backend. shards: how many tokens each rank has, see `cut`.
    documents: where their boundaries are, see `documents_that`.
    """

    decay: Callable | None = None
    sizes: tuple[int, int] | None = None
    heads: int = 5
    initial: bool = False
    final: bool = False
    shards: str = "even"
    layout: str = "contiguous"
    documents: str | None = None

    def problem(self, length, size, exchange, dtype, sizes, batch):
        """The call at a length, over `size` ranks."""
        if self.layout == "zigzag":
            # Both chunks of a rank have the same length.
            length += length % 2
        lengths = cut(self.shards, length, size, self.layout)
        documents = self.documents and documents_that(self.documents, lengths, self.layout)
        return Problem(
            length,
            exchange,
            self.layout,
            None if self.shards == "even" else lengths,
            documents,
            initial=self.initial,
            dtype=dtype,
            rates=self.decay,
            final=self.final,
            heads=(self.heads, *(self.sizes or sizes)),
            batch=batch,
        )


def cut(shards, length, size, layout):
    """Tokens of each rank: "even", "uneven", or with "empty" ranks at the ends and in between."""
    parts = {
        "even": {},
        "uneven": {2: (0.95, 0.05), 3: (0.2, 0.7, 0.1), 4: (0.45, 0.05, 0.3, 0.2)},
        "empty": {2: (0, 1), 3: (0, 1, 0), 4: (0.4, 0, 0.6, 0)},
    }[shards].get(size)
    if parts is None:
        return even(length, size, layout)
    unit = 2 if layout == "zigzag" else 1
    lengths = [unit * round(part * length / unit) for part in parts]
    lengths[parts.index(max(parts))] += length - sum(lengths)
    return tuple(lengths)


VARIANTS = {
    "plain": Variant(),
    "no_decay": Variant(decay=no_decay, final=True),
    "weak_decay": Variant(decay=weak_decay, initial=True),
    "strong_decay": Variant(decay=strong_decay, initial=True, final=True),
    "one_head": Variant(heads=1, sizes=(1, 1), initial=True, final=True),
    "odd_sizes": Variant(heads=3, sizes=(33, 7), initial=True, final=True),
    "wide_keys": Variant(heads=2, sizes=(256, 128), initial=True, final=True),
    "wide_values": Variant(heads=2, sizes=(96, 200)),
    "initial_state": Variant(initial=True),
    "final_state": Variant(final=True),
    "both_states": Variant(initial=True, final=True),
    "packed_across": Variant(documents="across", initial=True, final=True),
    "packed_on": Variant(documents="on", initial=True, final=True),
    "packed_with_empty": Variant(documents="both", initial=True, final=True),
    "packed_plain": Variant(documents="across"),
    "uneven": Variant(shards="uneven", initial=True, final=True),
    "empty": Variant(shards="empty", initial=True, final=True),
    "uneven_packed": Variant(shards="uneven", documents="both", initial=True, final=True),
    "empty_packed": Variant(shards="empty", documents="across", final=True),
    "zigzag": Variant(layout="zigzag", initial=True, final=True),
    "zigzag_plain": Variant(layout="zigzag"),
    "zigzag_strong_decay": Variant(layout="zigzag", decay=strong_decay, final=True),
    "zigzag_uneven": Variant(layout="zigzag", shards="uneven", initial=True, final=True),
    "zigzag_empty": Variant(layout="zigzag", shards="empty", initial=True, final=True),
    "zigzag_packed_on": Variant(layout="zigzag", documents="on", initial=True, final=True),
    "zigzag_packed": Variant(layout="zigzag", documents="both", initial=True, final=True),
    "zigzag_packed_uneven": Variant(
        layout="zigzag", shards="uneven", documents="across", initial=True
    ),
    "zigzag_packed_through": Variant(layout="zigzag", documents="through"),
    "by_token": Variant(decay=by_token, initial=True, final=True),
    "by_token_plain": Variant(decay=by_token),
    "by_token_weak": Variant(decay=weak_by_token, initial=True, final=True),
    "by_token_zero": Variant(decay=zero_by_token),
    "by_token_strong": Variant(decay=strong_by_token),
    "by_token_resets": Variant(decay=resets, initial=True, final=True),
    "by_token_one_head": Variant(decay=by_token, heads=1, sizes=(1, 1), final=True),
    "by_token_odd_sizes": Variant(decay=by_token, heads=3, sizes=(33, 7), initial=True),
    "by_token_wide": Variant(decay=by_token, heads=2, sizes=(256, 128), initial=True, final=True),
    "by_token_packed": Variant(decay=by_token, documents="both", initial=True, final=True),
    "by_token_packed_plain": Variant(decay=by_token, documents="across"),
    "by_token_packed_weak": Variant(decay=weak_by_token, documents="on"),
    "by_token_uneven": Variant(decay=by_token, shards="uneven", initial=True, final=True),
    "by_token_uneven_packed": Variant(decay=by_token, shards="uneven", documents="both"),
    "by_token_empty": Variant(decay=by_token, shards="empty", initial=True, final=True),
    "by_token_empty_packed": Variant(decay=weak_by_token, shards="empty", documents="across"),
    "by_token_zigzag": Variant(decay=by_token, layout="zigzag", initial=True, final=True),
    "by_token_zigzag_plain": Variant(decay=weak_by_token, layout="zigzag"),
    "by_token_zigzag_packed": Variant(
        decay=weak_by_token, layout="zigzag", documents="both", initial=True, final=True
    ),
    "by_token_zigzag_packed_through": Variant(
        decay=weak_by_token, layout="zigzag", documents="through"
    ),
    "by_token_zigzag_uneven": Variant(
        decay=by_token, layout="zigzag", shards="uneven", documents="across"
    ),
}
