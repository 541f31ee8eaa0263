"""What may change between a checkpoint and the run that resumes it.

Three kinds of settings, which together are all of launch/config.py:

- FIXED: what the model is, which samples it sees in which order, and what a step does to it.
  Another value is refused, unless checkpoint.allow_changes is set.
- NOTED: what is usually changed on purpose, such as the learning rate. Another value is printed.
- FREE: where and how fast the run goes, and what it writes. Losses do not depend on it, but for
  rounding.

Files and folders are compared by content: the model's config, the tokenizer, and the digests of
the data. What a checkpoint of an earlier version does not hold is not compared.
"""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from launch.data_digests import data_identity, describe_tokenizer
from launch.exit_codes import CheckpointError
from launch.tokenizer import tokenizer_from_spec
from launch.toml_config import flat
from launch.train_state import TrainState

FIXED = (
    "training.seed",
    "training.seq_len",
    "training.segment_gradient",
    "training.carry_state",
    "training.varlen",
    "optimizer.name",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
)
# By content.
COMPARED = ("model", "data.source", "data.folder", "data.folders")
NOTED = (
    "training.steps",
    # The order of samples does not depend on it.
    "training.global_batch_size",
    "training.max_norm",
    "training.mixed_precision_param",
    "training.mixed_precision_reduce",
    "optimizer.lr",
    "optimizer.weight_decay",
    "lr_scheduler",
    "quantize",
)
FREE = (
    "job",
    "data.verify",
    # Fixed where no gradient crosses from a segment to the one before.
    "training.segment_len",
    "training.segment_states",
    "training.local_batch_size",
    "training.loss_chunk_size",
    "training.max_nonfinite_steps",
    "parallelism",
    "checkpoint",
    "activation_checkpoint",
    "compile",
    "metrics",
    "validation",
    "sample",
    "profiling",
    "comm",
)
# Fields of a model's config that are used before the first step only.
_INITIAL = frozenset({"init_std"})
# What the order of samples depends on.
_ORDER = ("data", "training.seed", "training.seq_len", "training.carry_state")


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting with another value than in the checkpoint."""

    name: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.saved)} and is {_shown(self.now)}"


def check_changes(state: TrainState, path: Path, saved: dict[str, Any]) -> list[str]:
    """Compare a run before its first step with the state.json of the checkpoint it resumes.

    Returns:
        Lines to print: what has changed.

    Raises:
        CheckpointError: state.json is of no run, or a fixed setting has changed and
            checkpoint.allow_changes is not set.
    """
    _check_types(path, saved)
    fixed = model_changes(state, saved)
    noted: list[Change] = []
    if saved["step"]:
        fixed += tokenizer_changes(state, path, saved)
        before, now = _settings(path, saved), flat(dataclasses.asdict(state.config))
        now["training.global_batch_size"] = state.batching.global_batch_size
        fixed += _fixed_changes(state, saved, before, now)
        noted = [
            Change(name, before[name], now[name])
            for name in now
            if name in before and before[name] != now[name] and kind_of(name) == "noted"
        ]
    elif saved.get("tokenizer") is not None:
        fixed += tokenizer_changes(state, path, saved)
    lines = [f"changed:     {change}" for change in noted]
    if not fixed:
        return lines
    listed = "; ".join(map(str, fixed))
    if not state.config.checkpoint.allow_changes:
        kind = "model" if any(each.name.startswith("model.") for each in fixed) else "run"
        raise CheckpointError(
            f"{path} is of another {kind}: {listed}. Use its settings, or another "
            "job.dump_folder, or set --checkpoint.allow_changes to go on with the new ones."
        )
    lines.append(f"warning: checkpoint.allow_changes: {listed}")
    if any(change.name.startswith(_ORDER) for change in fixed):
        lines.append(
            "warning: samples come in another order, and the "
            f"{saved['consumed_samples']} already consumed are counted in the new one."
        )
    return lines


def kind_of(name: str) -> str:
    """ "fixed", "compared", "noted" or "free" for a setting of launch/config.py."""
    kinds = {"fixed": FIXED, "compared": COMPARED, "noted": NOTED, "free": FREE}
    found = [
        kind
        for kind, names in kinds.items()
        if any(name == each or name.startswith(f"{each}.") for each in names)
    ]
    assert len(found) == 1, f"{name} is {found}: decide whether a resumed run may change it"
    return found[0]


def model_changes(state: TrainState, saved: dict[str, Any]) -> list[Change]:
    """Differences of the model's family and config."""
    family = saved.get("family", "tnl")
    if family != state.config.model.family:
        return [Change("model.family", family, state.config.model.family)]
    # As JSON: tuples are lists there.
    now = json.loads(json.dumps(dataclasses.asdict(state.model.config)))
    before = saved.get("model", {})
    return [
        Change(f"model.{name}", before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value and name not in _INITIAL
    ]


def tokenizer_changes(state: TrainState, path: Path, saved: dict[str, Any]) -> list[Change]:
    """The tokenizer, if it is another one."""
    if "tokenizer" not in saved:
        return []
    spec = saved["tokenizer"]
    try:
        before = None if spec is None else describe_tokenizer(tokenizer_from_spec(spec))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} has a damaged tokenizer: {error}") from None
    now = describe_tokenizer(state.tokenizer)
    if before and now and not saved["step"]:
        # Of a released model, which token pads is a guess, and no document has one.
        before["pad_id"] = now["pad_id"]
    return [] if before == now else [Change("tokenizer", before, now)]


def _fixed_changes(
    state: TrainState, saved: dict[str, Any], before: dict[str, Any], now: dict[str, Any]
) -> list[Change]:
    names = list(FIXED)
    if "truncated" in (before.get("training.segment_gradient"), now["training.segment_gradient"]):
        names.append("training.segment_len")
    found = [
        Change(name, before[name], now[name])
        for name in names
        if name in before and before[name] != now[name]
    ]
    found += data_changes(state, saved)
    order, order_now = saved["sample_identity"][2:], sample_identity(state)[2:]
    if order != order_now and not any(each.name.startswith(_ORDER) for each in found):
        name = "data.folders (samples, weights)" if state.config.data.folders else "data (samples)"
        found.append(Change(name, order, order_now))
    return found


def data_changes(state: TrainState, saved: dict[str, Any]) -> list[Change]:
    """Folders with other tokens, or other boundaries of documents, than those trained on."""
    before = saved.get("data", {}).get("train")
    now = data_identity(None, state.train_source, None)["train"]
    if before is None or before == now:
        return []
    if len(before) != len(now):
        return [Change("data.folders", f"{len(before)} folders", f"{len(now)} folders")]
    found = []
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        # None: the tokens of a large file without digests.
        known = [key for key in {*old, *new} if None not in (old.get(key, 0), new.get(key, 0))]
        if any(old.get(key) != new.get(key) for key in known):
            folder = "data.folder"
            if state.config.data.folders:
                folder = f"data.folders {state.config.data.folders[number][0]}"
            found.append(Change(f"data: the content of {folder}", old, new))
    return found


def sample_identity(state: TrainState) -> list[Any]:
    """What the order of samples depends on besides the position."""
    training = state.config.training
    identity = [training.seed, training.seq_len, *state.train_source.identity]
    # Streams are read in order, one per sequence of a step.
    return identity + [state.batching.global_batch_size] * training.carry_state


def _settings(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    try:
        before = flat(tomllib.loads(saved.get("config", "")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / 'state.json'} has a damaged config: {error}.") from None
    training = dict(
        zip(("training.seed", "training.seq_len"), saved["sample_identity"], strict=False)
    )
    # TOML has lists.
    lists = {key: tuple(value) for key, value in before.items() if isinstance(value, list)}
    before = {**before, **lists, **training}
    name = "training.global_batch_size"
    if "global_batch_size" in saved:
        before[name] = saved["global_batch_size"]
    elif before.get(name) == -1:
        # It depends on the number of ranks, which earlier versions did not save.
        del before[name]
    return before


def _check_types(path: Path, saved: dict[str, Any]) -> None:
    """Raise CheckpointError for what no run writes; the hashes cannot tell who wrote it."""

    def require(condition: bool, name: str) -> None:
        if not condition:
            raise CheckpointError(
                f"{path / 'state.json'} is not of a run of this code: {name} is "
                f"{_shown(saved.get(name))}."
            )

    def count(name: str) -> bool:
        return type(saved.get(name)) is int and 0 <= saved[name] < 1 << 62

    require(count("step"), "step")
    require(isinstance(saved.get("family", ""), str), "family")
    require(isinstance(saved.get("model", {}), dict), "model")
    require(isinstance(saved.get("data", {}), dict), "data")
    train = saved.get("data", {}).get("train", [])
    require(isinstance(train, list) and all(isinstance(each, dict) for each in train), "data")
    if saved["step"]:
        require(count("consumed_samples"), "consumed_samples")
        identity = saved.get("sample_identity")
        require(isinstance(identity, list) and len(identity) >= 3, "sample_identity")
        states = saved.get("random")
        require(isinstance(states, list) and bool(states), "random")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
