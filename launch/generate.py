"""Continue a prompt with a trained model.

    python launch/generate.py --checkpoint outputs/quickstart/checkpoint --prompt "def "

A checkpoint has all that is needed: weights, model config and tokenizer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

from launch.build import ModelFamily, get_family
from launch.checkpoint.store import Checkpoint, CheckpointStore, verify
from launch.config import check_sampling, check_text
from launch.exit_codes import CheckpointError, ConfigError, UserError
from launch.optimizer import load_model_tensors
from launch.tokenizer import Tokenizer, tokenizer_from_spec


@dataclass(kw_only=True)
class Arguments:
    """Continue a prompt with a trained model."""

    checkpoint: Path
    """A step folder, or the folder of a run's checkpoints (its newest valid one is taken)."""
    prompt: str = "def "
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0: always the most likely token."""
    top_k: int = 40
    """Sample among this many most likely tokens; 0: all."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, cuda:N. auto: a GPU if there is one."""


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, ModelFamily, Tokenizer]:
    """The model of a checkpoint, its family, and its tokenizer. Raises CheckpointError."""
    found: Checkpoint | None
    if (path / "manifest.json").exists():
        found = verify(path)
    else:
        found, refused = CheckpointStore(path).find("auto")
        if found is None:
            why = f" ({'; '.join(refused)})" if refused else ""
            raise CheckpointError(
                f"checkpoint {path} holds no valid checkpoint{why}: give a step folder, or the "
                "folder of a run's checkpoints, such as outputs/quickstart/checkpoint."
            )
    state = found.state()
    if state["tokenizer"] is None:
        raise CheckpointError(
            f"{found.path} was trained on random tokens, without a tokenizer: there is no text to "
            "continue."
        )
    # Older checkpoints do not name their family.
    family = get_family(state.get("family", "tnl"))
    with device:
        model = family.build(family.config_class(**state["model"]))
    load_model_tensors(model, found.open("model"))
    return model.eval(), family, tokenizer_from_spec(state["tokenizer"])


def sample_text(
    model: nn.Module,
    family: ModelFamily,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> str:
    """The prompt and its continuation, up to an end of document.

    Raises:
        ConfigError: an option that the family's `generate` refuses.
    """
    device = model.head_weight.device
    # An empty prompt is the start of a document, which follows the end of another.
    tokens = tokenizer.encode(prompt).tolist() or [tokenizer.eod_id]
    try:
        out = family.generate(
            model,
            torch.tensor([tokens], device=device),
            max_new_tokens,
            temperature=temperature,
            top_k=top_k or None,
            eos_token_id=tokenizer.eod_id,
            generator=torch.Generator(device).manual_seed(seed),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    new = out[0, len(tokens) :].tolist()
    if tokenizer.eod_id in new:
        new = new[: new.index(tokenizer.eod_id)]
    # Decoded together: a character may lie across the end of the prompt.
    return tokenizer.decode(tokens + new)


def find_device(name: str) -> torch.device:
    """The device called `name`. Raises ConfigError if there is none."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}: give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"device is {name}, but this machine has {gpus} GPUs: give cpu or auto.")
    return device


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="launch/generate.py")
    try:
        check_text("prompt", arguments.prompt)
        check_sampling("", arguments.max_new_tokens, arguments.temperature, arguments.top_k)
        if not 0 <= arguments.seed < 1 << 63:
            raise ConfigError(f"seed is {arguments.seed}: it must be at least 0 and below 2^63.")
        model, family, tokenizer = load_model(arguments.checkpoint, find_device(arguments.device))
        text = sample_text(
            model,
            family,
            tokenizer,
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
