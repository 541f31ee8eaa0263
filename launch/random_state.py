"""The random states of a rank as JSON, so that a resumed run draws what it would have drawn.

Numpy is not here: the launcher makes a generator from seed and position wherever it needs one.
"""

from __future__ import annotations

import random
from typing import Any

import torch

__all__ = ["capture", "restore"]


def capture(device: torch.device) -> dict[str, Any]:
    """The states of Python's and torch's generators."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "torch": _hex(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _hex(torch.cuda.get_rng_state(device))
    return state


def restore(states: list[dict[str, Any]], rank: int, ranks: int, device: torch.device) -> None:
    """Continue from the states of all ranks, as saved.

    A job of another size has no states of its own: every rank then takes those of rank 0.
    """
    state = states[rank if len(states) == ranks else 0]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
