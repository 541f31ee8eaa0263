"""Do the ranks mean the same thing? Asked before the first state travels.

Point-to-point messages carry no type: a sender and a receiver that disagree on shape or dtype get
silent garbage, or hang. So the ranks compare what they were called with, and if they disagree all
of them raise the same ValueError. On the CPU every call is compared. On a GPU a comparison stops
the host, so each distinct call is compared once per group; what may differ (the local length) is
no part of what makes a call distinct, so all ranks meet in the comparison together.
"""

from __future__ import annotations

import hashlib

import torch
from torch.distributed import ProcessGroup

from lasp.exchange.peers import all_gather_flat

__all__ = ["agree"]

_TEXT_BYTES = 256
# Digests of calls that all ranks of a group (by its unique name) have agreed on.
_agreed: set[tuple[str, bytes]] = set()


def agree(
    group: ProcessGroup, call: dict[str, object], device: torch.device, problem: str | None = None
) -> None:
    """Raise ValueError on every rank of `group` unless all pass the same `call`.

    Args:
        call: what must be equal on all ranks, by name; values are compared by their repr.
        device: where the group's backend can communicate.
        problem: what this rank found wrong with its own input, if anything: then all ranks raise.
    """
    digest = hashlib.sha256(repr(sorted(call.items())).encode()).digest()
    key = (group.group_name, digest)
    if problem is None and device.type != "cpu" and key in _agreed:
        return
    # Ranks that agreed before are past comparing: waiting for them here would only delay the error.
    if problem is not None and any(name == group.group_name for name, _ in _agreed):
        raise ValueError(problem)
    texts = [problem or "", *(repr(call[name]) for name in sorted(call))]
    gathered = _gather_texts(texts, group, device)
    if problem is not None:
        raise ValueError(problem)
    bad = [rank for rank, texts_of in enumerate(gathered) if texts_of[0]]
    if bad:
        raise ValueError(f"rank {bad[0]} of the group refused its input: {gathered[bad[0]][0]}")
    for i, name in enumerate(sorted(call), start=1):
        seen = {rank: texts_of[i] for rank, texts_of in enumerate(gathered)}
        if len(set(seen.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in seen.items())
            raise ValueError(
                f"the ranks of the group disagree on {name} ({listed}). All ranks that share a "
                "sequence must pass the same."
            )
    if device.type != "cpu":
        _agreed.add(key)


def _gather_texts(texts, group, device):
    """Each rank's texts, cut to a fixed size: equal on all ranks whatever they disagree on."""
    rows = [text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0") for text in texts]
    sent = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).to(device)
    received, work = all_gather_flat(sent, group)
    work.wait()
    table = received.cpu().numpy().reshape(-1, len(texts), _TEXT_BYTES)
    return [
        [bytes(row).rstrip(b"\0").decode(errors="replace") for row in of_rank] for of_rank in table
    ]
