"""The configuration of a TransNormerLLM, and its parameter and FLOP counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lasp.tnl.variants import ACTIVATIONS, DECAYS, NORMS

__all__ = ["TNLConfig"]


@dataclass(frozen=True, kw_only=True)
class TNLConfig:
    """Shape and initialisation of a TNL. The defaults are those of the released 385M model.

    Attributes:
        vocab_size: rows of the embedding, which is also the output head.
        dim: width d of the residual stream, and of all heads of the token mixer.
        num_layers: number of blocks.
        num_heads: heads H of the token mixer; dim / num_heads is the head dimension D.
        glu_dim: inner width of the channel mixer.
        activation: "silu", "none" or "1+elu", on queries and keys of linear layers only.
        lrpe_layers: the layers (from 0) whose queries and keys get LRPE positions; (0,) in released
            models. Softmax layers ignore it: they have RoPE.
        decay: of the linear layers. "fixed": TNL's constant per head and layer. "learned": one per
            token and head, computed from the layer's input (`lasp.tnl.learned_decay`); it starts at
            the fixed one, so that weights of a model with a fixed decay continue as they are, by
            `load_state_dict(weights, strict=False)`. "per_head": the fixed one without its factor
            per layer, the same in all layers. "none": no decay.
        layer_types: "L" for a linear, "S" for a softmax layer, from the first layer on; repeated
            until there are num_layers. The released models are "L"; "LLLLLLLS" is a hybrid.
        num_key_value_heads: heads of the keys and values in softmax layers, a divisor of num_heads;
            None: num_heads.
        rope_base: base of RoPE in softmax layers.
        scale_embedding: multiply embeddings by sqrt(dim).
        norm_eps: added to the mean square in every norm.
        init_std: standard deviation of the initial weights.
        pad_token_id: token whose embedding starts as zero and gets no gradient from look-ups;
            None: no such token.
        norm: every norm: "srms" (no weights), "rms" or "layer".
        output_gate: linear layers multiply the output of attention by a projection u of x.
        denominator: linear layers divide the output of attention by the sum of its weights, instead
            of norming it; for the activation "1+elu", whose weights are positive.
        glu_activation: of the channel mixer: "none", "silu" or "1+elu".
        position_embeddings: rows of a learned table of absolute positions, added to the tokens'
            embeddings: the longest sequence. 0: no table, and sequences of any length.
        dropout: probability of zero in training, of the embeddings and of each mixer's output
            (`lasp.tnl.dropout`).

    The released models have the defaults from `norm` on. Tensor parallelism, packed documents and
    conversion to the released layout refuse some of the others, with the reason.
    """

    vocab_size: int = 64000
    dim: int = 1024
    num_layers: int = 24
    num_heads: int = 8
    glu_dim: int = 2816
    activation: str = "silu"
    lrpe_layers: tuple[int, ...] = (0,)
    scale_embedding: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02
    pad_token_id: int | None = None
    layer_types: str = "L"
    num_key_value_heads: int | None = None
    rope_base: float = 10000.0
    decay: str = "fixed"
    norm: str = "srms"
    output_gate: bool = True
    denominator: bool = False
    glu_activation: str = "none"
    position_embeddings: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        # A config from TOML or JSON has a list.
        object.__setattr__(self, "lrpe_layers", tuple(self.lrpe_layers))
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "glu_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1.")
            # Far above any model; each layer is looked at below.
            most = 10_000 if name == "num_layers" else (1 << 31) - 1
            if value > most:
                raise ValueError(f"{name} is {value}: it must be at most {most:,}.")
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} does not divide into {self.num_heads} heads: choose num_heads "
                "among the divisors of dim (released models have dim / 128 heads)."
            )
        self._check_softmax_layers()
        self._check_variants()
        outside = [layer for layer in self.lrpe_layers if not 0 <= layer < self.num_layers]
        if outside or len(set(self.lrpe_layers)) != len(self.lrpe_layers):
            raise ValueError(
                f"lrpe_layers is {self.lrpe_layers}: name each layer at most once, counted from 0 "
                f"to num_layers - 1 = {self.num_layers - 1}."
            )
        # The attention operator takes keys and values of up to 256.
        if max(self.value_dim, *map(self.key_dim, range(self.num_layers))) > 256:
            raise ValueError(
                f"a head has {self.head_dim} values: the limit is 256, and 128 in layers with LRPE "
                "(it doubles them), 255 with a denominator. Use more heads."
            )
        for name in ("norm_eps", "init_std", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be positive.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}: give a token below vocab_size "
                f"{self.vocab_size}, or None."
            )

    def _check_variants(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                *others, last = (f'"{each}"' for each in known)
                raise ValueError(f"{name} is {value!r}: it must be {', '.join(others)} or {last}.")
        if self.denominator and self.activation != "1+elu":
            raise ValueError(
                f'denominator is set and activation is "{self.activation}": only that of "1+elu" '
                "keeps the weights positive, so that their sum can divide."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}: it must be in 0 <= dropout < 1.")
        rows = self.position_embeddings
        if type(rows) is not int or not 0 <= rows < 1 << 31:
            raise ValueError(
                f"position_embeddings is {rows!r}: it must be the whole number of tokens of the "
                "longest sequence, or 0 for none."
            )

    def _check_softmax_layers(self) -> None:
        kinds = self.layer_types
        known = isinstance(kinds, str) and kinds and not kinds.strip("LS")
        if not known or self.num_layers % len(kinds):
            raise ValueError(
                f"layer_types is {kinds!r}: it must be letters L (linear) and S (softmax), as many "
                f"as there are layers or a divisor of that ({self.num_layers})."
            )
        heads = self.num_key_value_heads
        fits = heads is None or (type(heads) is int and heads > 0 and not self.num_heads % heads)
        if not fits:
            raise ValueError(
                f"num_key_value_heads is {heads!r}: it must be a divisor of num_heads "
                f"{self.num_heads}, or None for as many."
            )
        if self.num_softmax_layers and self.head_dim % 2:
            raise ValueError(
                f"a head has {self.head_dim} values: RoPE in softmax layers rotates pairs of "
                "them, so it must be an even number."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TNLConfig:
        """A named shape ("tiny", "385m", "1b", "7b") with any field replaced by `overrides`.

        "385m" and "1b" have the shapes of the released checkpoints. "7b" is the released 6.8 B
        model, whose glu_dim was inferred from its parameter count. "tiny" is for tests and laptops.
        """
        if name not in _PRESETS:
            raise ValueError(f"no preset {name!r}: choose one of {', '.join(_PRESETS)}.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(f"no config field {unknown}: fields are {', '.join(sorted(known))}.")
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        """D: values per head of one query, key or value."""
        return self.dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Values of all heads of one key in a softmax layer."""
        return (self.num_key_value_heads or self.num_heads) * self.head_dim

    def is_softmax(self, layer: int) -> bool:
        """True if a layer's token mixer is softmax attention."""
        return self.layer_types[layer % len(self.layer_types)] == "S"

    @property
    def num_softmax_layers(self) -> int:
        return sum(self.is_softmax(layer) for layer in range(self.num_layers))

    def streaming_problem(self) -> str | None:
        """Why states of constant size cannot carry the past; None if they can."""
        if not self.num_softmax_layers:
            return None
        return (
            f"{self.num_softmax_layers} of {self.num_layers} layers are softmax attention "
            f"(layer_types {self.layer_types}), which needs the keys and values of all earlier "
            "tokens: no state of constant size holds the past."
        )

    def sequence_problem(self, tokens: int, *, packed: bool = False) -> str | None:
        """Why the model cannot read a sequence of so many tokens, `packed` from documents that are
        kept apart; None if it can."""
        rows = self.position_embeddings
        if rows and packed:
            return (
                "position_embeddings count along the row, so that documents packed into one "
                "would not start at position 0: pass documents as rows."
            )
        if rows and tokens > rows:
            return (
                f"a sequence has {tokens} tokens and position_embeddings is {rows}: use shorter "
                "ones, or a model with positions in its layers (LRPE, decay)."
            )
        return None

    def variants(self) -> dict[str, Any]:
        """The fields in which the architecture is none that was released, with their values."""
        found = {name: getattr(self, name) for name in _RELEASED}
        return {name: value for name, value in found.items() if value not in _RELEASED[name]}

    def uses_lrpe(self, layer: int) -> bool:
        """True if a layer is linear and its queries and keys get LRPE positions."""
        return layer in self.lrpe_layers and not self.is_softmax(layer)

    def key_dim(self, layer: int) -> int:
        """Values per head of the queries and keys in attention: 2D with LRPE, else D."""
        return self.head_dim * (2 if self.uses_lrpe(layer) else 1)

    @property
    def value_dim(self) -> int:
        """Values per head in linear attention: D, and 1 for the denominator if there is one."""
        return self.head_dim + self.denominator

    def num_parameters(self) -> int:
        """Parameters of the model, the tied embedding counted once."""
        positions = sum(self.uses_lrpe(layer) for layer in range(self.num_layers))
        vectors = positions + self.position_embeddings + self._num_norm_vectors()
        biases = self._num_learned_decays()
        return (self.vocab_size + vectors) * self.dim + self._block_matrices() + biases

    def flops_per_token(self, training: bool = True, seq_len: int | None = None) -> int:
        """Model FLOPs of one token (a multiply-add is 2), whatever the implementation.

        Forward = 2 * (entries of all weight matrices, the head included, the embedding look-up not)
                + sum over linear layers and heads of 4 * K * D
                + sum over softmax layers and heads of 4 * D * (seq_len + 1) / 2,
        where K is the layer's key dimension: 2KD to add k v^T to the state and 2KD to read q S
        (with a denominator D + 1 takes the place of D).
        That is the recurrent form; the extra work of a chunked kernel is not counted. In a softmax
        layer a token attends to (seq_len + 1) / 2 keys on average, at 2D for each score and 2D for
        each value; recomputation in a kernel's backward is not counted. Training is 3 times the
        forward.

        Args:
            seq_len: tokens of a sequence, for the softmax layers. None leaves out the terms that
                grow with it (packed documents of unknown lengths).
        """
        linear = [layer for layer in range(self.num_layers) if not self.is_softmax(layer)]
        keys = sum(self.key_dim(layer) for layer in linear)
        forward = 2 * (self.vocab_size * self.dim + self._block_matrices())
        forward += 4 * self.num_heads * keys * self.value_dim
        if seq_len is not None:
            forward += 2 * self.num_softmax_layers * self.dim * (seq_len + 1)
        return 3 * forward if training else forward

    def _block_matrices(self) -> int:
        """Entries of the weight matrices of all blocks."""
        softmax = self.num_softmax_layers
        grouped = 2 * self.kv_dim
        linear = 5 if self.output_gate else 4
        mixers = (self.num_layers - softmax) * linear * self.dim + softmax * (
            2 * self.dim + grouped
        )
        mixers += self._num_learned_decays()
        return self.dim * (mixers + 3 * self.num_layers * self.glu_dim)

    def _num_norm_vectors(self) -> int:
        """Weights and biases of all norms, in vectors of dim."""
        of_outputs = 0 if self.denominator else self.num_layers - self.num_softmax_layers
        norms = 2 * self.num_layers + of_outputs + 1
        return {"srms": 0, "rms": 1, "layer": 2}[self.norm] * norms

    def _num_learned_decays(self) -> int:
        """Decays per token that are computed from the input, over all layers."""
        linear = self.num_layers - self.num_softmax_layers
        return linear * self.num_heads if self.decay == "learned" else 0


_CHOICES = {
    "activation": ACTIVATIONS,
    "glu_activation": ACTIVATIONS,
    "norm": NORMS,
    "decay": DECAYS,
}
# What released models have. (Their decay is fixed; the decoder knows others too.)
_RELEASED: dict[str, tuple[Any, ...]] = {
    "activation": ("silu", "none"),
    "norm": ("srms",),
    "output_gate": (True,),
    "denominator": (False,),
    "glu_activation": ("none",),
    "position_embeddings": (0,),
}

_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 256, "dim": 128, "num_layers": 4, "num_heads": 4, "glu_dim": 352},
    "385m": {"dim": 1024, "num_layers": 24, "num_heads": 8, "glu_dim": 2816},
    "1b": {"dim": 2048, "num_layers": 16, "num_heads": 16, "glu_dim": 5632},
    "7b": {"dim": 4096, "num_layers": 30, "num_heads": 32, "glu_dim": 11008},
}
