"""The random states of a rank as JSON, so that a resumed run draws the same numbers.

Numpy's is not needed: the launcher makes a new generator from seed and position each time.
"""

import random
from typing import Any

import torch


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
    """Restore this rank's state from the saved states of all ranks.

    If the number of ranks has changed, every rank takes the state of rank 0.
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
