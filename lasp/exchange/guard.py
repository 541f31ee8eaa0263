"""Do the ranks mean the same thing? Asked before the first state travels.

Point-to-point messages carry no type: a sender and a receiver that disagree on shape or dtype get
silent garbage, or hang. So the ranks compare what they were called with, and if they disagree all
of them raise a ValueError. Calls on CPU tensors are all compared. On GPUs that would cost each call
a round trip, so a group compares each distinct call once; what may differ between ranks (the local
length) is no part of what makes a call distinct, so that all meet in the comparison together.
"""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup

from lasp.exchange.peers import all_gather_flat, device_types

__all__ = ["agree"]

# A comparison has one size, whatever is wrong: so many texts of so many bytes.
_TEXTS, _TEXT_BYTES = 8, 256
# Digests of the GPU calls that all ranks of a group have agreed on; gone with the group.
_agreed: WeakKeyDictionary[ProcessGroup, set[bytes]] = WeakKeyDictionary()


def agree(
    group: ProcessGroup, call: dict[str, object], *, every_time: bool, problem: str | None = None
) -> None:
    """Raise ValueError on every rank of `group` unless all pass the same `call`.

    Args:
        call: what must be equal on all ranks, by name; values are compared by their repr.
        every_time: compare even a call that the group has agreed on before.
        problem: what this rank found wrong with its own input, if anything: then all ranks raise.
    """
    digest = hashlib.sha256(repr(sorted(call.items())).encode()).digest()
    agreed = _agreed.setdefault(group, set())
    if problem is None and not every_time and digest in agreed:
        return
    # Ranks that agreed before are past comparing: waiting for them here would only delay the error.
    if problem is not None and agreed:
        raise ValueError(problem)
    texts = [problem or "", *(repr(call[name]) for name in sorted(call))]
    gathered = _gather_texts(texts, group)
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
    if not every_time:
        agreed.add(digest)


def _gather_texts(texts, group):
    """Each rank's texts, cut to a fixed size: equal on all ranks whatever they disagree on."""
    assert len(texts) <= _TEXTS, len(texts)
    texts = texts + [""] * (_TEXTS - len(texts))
    rows = [text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0") for text in texts]
    # By what the group can send, not by where the arguments are: those may be what is wrong.
    device = "cpu" if "cpu" in device_types(group) else "cuda"
    sent = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).to(device)
    received, work = all_gather_flat(sent, group)
    work.wait()
    table = received.cpu().numpy().reshape(-1, _TEXTS, _TEXT_BYTES)
    return [
        [bytes(row).rstrip(b"\0").decode(errors="replace") for row in of_rank] for of_rank in table
    ]
