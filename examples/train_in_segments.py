"""Your own training loop on one sequence that is too long for the GPU, in segments.

    python examples/train_in_segments.py --tokens 65536 --segment_len 4096

Loss and gradients are those of the whole sequence; memory is that of one segment.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from lasp.tnl import TNL, TNLConfig, TNLState
from parallel.streaming import backward_in_segments


def backward(
    model: TNL, tokens: torch.Tensor, labels: torch.Tensor, segment_len: int
) -> torch.Tensor:
    """Add the gradients of the mean loss over tokens [B, T] to the model's; returns that loss."""
    inputs, targets = tokens.split(segment_len, dim=1), labels.split(segment_len, dim=1)

    def run(index, states, *, states_only):
        before = None if states is None else TNLState(list(states), index * segment_len)
        if states_only:
            return None, model(inputs[index], states=before, states_only=True).layers
        logits, after = model(inputs[index], states=before, return_states=True)
        loss = F.cross_entropy(logits.flatten(0, 1), targets[index].flatten(), reduction="sum")
        return loss, after.layers

    loss, _ = backward_in_segments(run, len(inputs), loss_scale=1 / labels.numel(), keep_on="host")
    return loss / labels.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--segment_len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = TNL(TNLConfig.preset("tiny")).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(256, (1, arguments.tokens + 1), device=device)
    for step in range(1, arguments.steps + 1):
        optimizer.zero_grad()
        loss = backward(model, text[:, :-1], text[:, 1:], arguments.segment_len)
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
