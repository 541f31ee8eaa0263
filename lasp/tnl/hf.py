"""TNL as a transformers model: import this module, and the Auto classes read folders of TNLs.

    import lasp.tnl.hf
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

`launch/convert.py` writes such folders. `generate` has the state as its cache, of constant size but
for softmax layers. Needs `pip install 'lasp[hf]'`.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lasp.tnl.config import TNLConfig
from lasp.tnl.convert import MODEL_TYPE
from lasp.tnl.layers import GatedLinearAttention
from lasp.tnl.learned_decay import DecayProjection
from lasp.tnl.model import TNL, TNLState
from lasp.tnl.positions import LRPE

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Cache,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
        initialization,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        f"lasp.tnl.hf needs transformers 5.23 or newer ({error}): pip install 'lasp[hf]'."
    ) from None

__all__ = ["TNLCache", "TNLForCausalLM", "TNLPretrainedConfig"]


class TNLPretrainedConfig(PretrainedConfig):
    """A TNLConfig as transformers stores it.

    Attributes:
        tnl: the fields of TNLConfig that differ from its defaults, or all. (They are not fields of
            this class because transformers gives names like layer_types a meaning of its own.)
    """

    model_type = MODEL_TYPE

    tnl: dict[str, Any] | None = None
    use_cache: bool = True
    # There is one matrix, not two that are tied.
    tie_word_embeddings: bool = False

    @property
    def tnl_config(self) -> TNLConfig:
        return TNLConfig(**(self.tnl or {}))

    # What tools that read models of any kind ask for.

    @property
    def vocab_size(self) -> int:
        return self.tnl_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.tnl = dataclasses.asdict(dataclasses.replace(self.tnl_config, vocab_size=value))

    @property
    def hidden_size(self) -> int:
        return self.tnl_config.dim

    @property
    def num_hidden_layers(self) -> int:
        return self.tnl_config.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.tnl_config.num_heads

    @property
    def initializer_range(self) -> float:
        return self.tnl_config.init_std


class TNLCache(Cache):
    """A `TNLState` as the cache of transformers' `generate`."""

    def __init__(self, config: TNLConfig) -> None:
        super().__init__(layers=[])
        self._config = config
        self.state: TNLState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return 0 if self.state is None else self.state.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    @property
    def is_linear(self) -> list[bool]:
        # False for "linear" would mean that a cache does not know how many tokens it has read.
        return [False]

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a TNL's state cannot forget its last tokens: read the shorter text again."
        )

    def reset(self) -> None:
        self.state = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i the one that was sequence beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda layer, dim: layer.index_select(dim, indices.to(layer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda layer, dim: layer.repeat_interleave(repeats, dim=dim))

    def _map(self, function) -> None:
        """Replace each layer's state by function(state, the dimension that counts sequences)."""
        if self.state is not None:
            layers = [
                function(layer, 1 if self._config.is_softmax(index) else 0)
                for index, layer in enumerate(self.state.layers)
            ]
            self.state = TNLState(layers, self.state.position)


class TNLForCausalLM(PreTrainedModel, GenerationMixin):
    """A `lasp.tnl.TNL`, as `model`, with the interface of transformers.

    Models with softmax layers take no padding; all others are padded on the left, or for a forward
    without generation on the right.
    """

    config_class = TNLPretrainedConfig
    base_model_prefix = "model"
    _no_split_modules = ["TNLBlock"]
    # Positions need it; see lasp.tnl.positions.LRPE.
    _keep_in_fp32_modules_strict = ["lrpe"]
    # Assisted generation would have to take tokens back.
    _is_stateful = True

    def __init__(self, config: TNLPretrainedConfig) -> None:
        super().__init__(config)
        self.model = TNL(config.tnl_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for what was in no file, and marks what was.
        if isinstance(module, GatedLinearAttention):
            # The decays are constants, which no file has.
            module._set_decay(module.log_decay.device)
        elif isinstance(module, LRPE):
            if not getattr(module.theta, "_is_hf_initialized", False):
                module.reset_parameters()
        elif isinstance(module, DecayProjection):
            initialization.zeros_(module.weight)
            initialization.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: TNLCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V], and the loss if there are labels.

        Args:
            input_ids: integers [B, T], the tokens after those that the cache has read.
            attention_mask: [B, T] or [B, past + T], 0 where a token is padding.
            labels: [B, T], shifted here as everywhere in transformers; -100 is ignored.
            use_cache: return the cache, updated; the default is no in training, else the config's.
            logits_to_keep: logits of this many last tokens only; 0: of all.
            options: `num_items_in_batch` and others of transformers' loss.

        Raises:
            ValueError: padding in a model with softmax layers, a cache of another kind, or outputs
                that a TNL does not have.
        """
        self._check(cache, options)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = TNLCache(self.model.config)
        hidden = self.model(
            input_ids,
            states=None if cache is None else cache.state,
            return_states=use_cache,
            return_hidden=True,
            padding_mask=self._padding_mask(attention_mask, input_ids.shape[1]),
        )
        if use_cache:
            hidden, cache.state = hidden
        # With 0 this is all of them.
        logits = F.linear(hidden[:, -logits_to_keep:], self.model.head_weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **options)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=cache if use_cache else None
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _check(self, cache: Any, options: dict[str, Any]) -> None:
        if cache is not None and not isinstance(cache, TNLCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}: pass that of an earlier output, or none."
            )
        refused = (
            "inputs_embeds",
            "output_attentions",
            "output_hidden_states",
            "past_key_values",
            "position_ids",
        )
        values = {name: options.pop(name, None) for name in refused}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if given:
            raise ValueError(
                f"{', '.join(given)}: a TNL takes input_ids, counts positions itself, returns no "
                "attention matrices or layer outputs, and its past is `cache`."
            )

    def _padding_mask(self, attention_mask: torch.Tensor | None, tokens: int):
        """bool [B, T], or None if no token can be padding."""
        if attention_mask is None:
            return None
        mask = attention_mask[:, -tokens:].bool()
        config = self.model.config
        if not (config.num_softmax_layers or config.position_embeddings):
            return mask
        # The host waits for this answer; these models take no mask at all.
        if not mask.all():
            part = "softmax layers" if config.num_softmax_layers else "position embeddings"
            raise ValueError(
                f"attention_mask has zeros, but this model's {part} do not support padding: pass "
                "texts of equal length, or one by one (batch size 1)."
            )
        return None

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """The state takes the place of the caches that `generate` knows."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}: leave it "
                "out, a TNL has its own."
            )
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = TNLCache(self.model.config)


AutoConfig.register(MODEL_TYPE, TNLPretrainedConfig)
AutoModelForCausalLM.register(TNLPretrainedConfig, TNLForCausalLM)
