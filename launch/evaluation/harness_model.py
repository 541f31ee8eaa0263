"""A checkpoint as a model of lm-evaluation-harness; see launch/evaluation/harness.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from launch.build import autocast_dtype
from launch.config import Config
from launch.evaluation.scoring import TextScorer
from launch.exit_codes import ConfigError
from launch.generate import find_device, load_model

_MAX_NEW_TOKENS = 256


@register_model("lasp_tnl")
class CheckpointLM(TemplateLM):
    """The model of a checkpoint, by `--model lasp_tnl --model_args checkpoint=PATH`.

    Args:
        checkpoint: a step folder, or the folder of a run's checkpoints.
        batch_size: texts that are processed at a time.
        device: cpu, cuda, cuda:N, or auto: a GPU if there is one.
        dtype: of the products: bfloat16, float32, or auto: bfloat16 on a GPU.
        chunk: tokens of a text that are processed at a time; texts may have any length.

    Raises:
        CheckpointError: no valid checkpoint, or one without a tokenizer.
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        chunk: int | str = 2048,
    ) -> None:
        super().__init__()
        config, numbers = Config(), {}
        for name, value in (("batch_size", batch_size), ("chunk", chunk)):
            if not str(value).isdecimal() or int(value) < 1:
                raise ConfigError(f"{name} is {value!r}: it must be a number of at least 1.")
            numbers[name] = int(value)
        if dtype not in ("auto", "bfloat16", "float32"):
            raise ConfigError(f"dtype is {dtype!r}: it must be auto, bfloat16 or float32.")
        config.training.mixed_precision_param = dtype
        # cuda:0 is the harness's default, whatever the machine has.
        self._device = find_device("auto" if device == "cuda:0" else device)
        self._checkpoint = checkpoint
        model, family, self._coder = load_model(Path(checkpoint), self._device)
        autocast = autocast_dtype(config, self._device)
        self._scorer = TextScorer(model, family, dtype=autocast, **numbers)

    @property
    def eot_token_id(self) -> int:
        """Ends every document; an empty context is the start of one, which follows another."""
        return self._coder.eod_id

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness caches requests."""
        return f"lasp_tnl {self._checkpoint}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; special ones are never added."""
        return self._coder.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = self._scorer.score([(context, tokens) for _, context, tokens in requests])
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text as a document of its own: with all of the text before a
        token as its context, whatever the length."""
        texts = [request.args[0] for request in requests]
        scores = self._scorer.score([([self.eot_token_id], self.tok_encode(t)) for t in texts])
        for text, (score, _) in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
        return [score for score, _ in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first of their stop texts."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for group in groups.values():
            texts = [requests[number].args[0] for number in group]
            given = requests[group[0]].args[1]
            options, until = _generate_options(given)
            contexts = [self.tok_encode(text) or [self.eot_token_id] for text in texts]
            new = self._scorer.generate(contexts, eos_token_id=self.eot_token_id, **options)
            for number, text, tokens in zip(group, texts, new, strict=True):
                results[number] = _cut(self._coder.decode(tokens), until)
                self.cache_hook.add_partial("generate_until", (text, given), results[number])
        return results


def _generate_options(generation_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of `TextScorer.generate`, and the stop texts, of a task's generation_kwargs. Raises
    ConfigError for a kind of sampling that is not known."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(generation_kwargs, _MAX_NEW_TOKENS))
    options, until = {"max_new_tokens": given.pop("max_gen_toks")}, given.pop("until")
    # Without them the rest has no effect.
    if given.pop("do_sample", False) and (temperature := float(given.pop("temperature", 0.0))):
        options["temperature"] = temperature
        options["top_k"] = int(given.pop("top_k", 0)) or None
        top_p = float(given.pop("top_p", 1.0))
        options["top_p"] = None if top_p == 1 else top_p
        if given:
            raise ConfigError(
                f"generation_kwargs {', '.join(map(repr, given))}: sampling knows temperature, "
                "top_k and top_p."
            )
    return options, [text for text in until if text]


def _cut(text: str, until: list[str]) -> str:
    for stop in until:
        text = text.split(stop, 1)[0]
    return text
