"""A tiny model learns to recall pairs in about a minute on a CPU; how far back does it reach?

    python examples/recall.py

Associative recall is what states of constant size are worst at: all pairs share one state per head,
and a fixed decay fades them. The model is trained on gaps below --gap tokens and asked at longer
ones too.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from lasp.tnl import TNL, TNLConfig
from launch.data import IGNORE
from launch.evaluation.recall import RecallTask, gaps_up_to, recall_by_gap

TOKENS, BATCH, ROUNDS = 15, 16, 8
WARMUP = 50


def train(model: TNL, task: RecallTask, steps: int, gap: int, lr: float = 4e-3) -> float:
    """Train on gaps of 0 to `gap`, short ones more often; the loss of the last step.

    The gaps are 0 and 1 at first: once the model has found out that a value belongs to the key
    before it, which takes most of the time, it soon learns to keep it for longer.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.monotonic()
    for step in range(1, steps + 1):
        longest = (gap + 1) ** min(1.0, max(0.0, 2 * step / steps - 0.5))
        length = int(max(2.0, longest) ** torch.rand((), generator=generator).item()) - 1
        # Asked in several rounds: the more queries, the sooner the model finds what answers them.
        inputs, labels = task.sequences(BATCH, length, generator, rounds=ROUNDS)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(step / WARMUP, 1 - step / (steps + 1))
        optimizer.step()
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(f"step {step}: loss {loss.item():.4f}  ({seconds:.0f} s)", flush=True)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--gap", type=int, default=63, help="longest gap in training")
    parser.add_argument("--max_gap", type=int, default=2048, help="longest gap asked")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--decay", choices=("fixed", "learned"), default="fixed")
    parser.add_argument("--layer_types", default="L", help="S: softmax attention instead")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task = RecallTask.from_tokens(range(TOKENS), arguments.pairs)
    shape = dict(dim=64, num_layers=2, num_heads=4, glu_dim=128, init_std=0.05)
    kind = dict(decay=arguments.decay, layer_types=arguments.layer_types)
    model = TNL(TNLConfig(vocab_size=TOKENS, **shape, **kind))
    train(model, task, arguments.steps, arguments.gap)
    gaps = gaps_up_to(arguments.max_gap)
    counts = recall_by_gap(model.eval(), task, gaps, 64, torch.Generator().manual_seed(1))
    print(f"chance: {1 / len(task.values):.3f}, among the pairs {1 / arguments.pairs:.3f}")
    print(f"{'gap':>6} {'accuracy':>9} {'among pairs':>12}")
    for gap, each in zip(gaps, counts, strict=True):
        means = each.means()
        print(f"{gap:>6} {means['accuracy']:>9.3f} {means['accuracy_among_pairs']:>12.3f}")


if __name__ == "__main__":
    main()
