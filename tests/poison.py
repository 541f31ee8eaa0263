"""Fresh memory full of NaN, so that an element that is never written is seen."""

import contextlib
from unittest import mock

import torch

from lasp import replay

# What allocates without writing: (owner, name).
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


def poisoned(make):
    """`make`, returning NaN where it would return whatever memory holds."""

    def call(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return call


@contextlib.contextmanager
def poison():
    """All allocations of this block return NaN."""
    with contextlib.ExitStack() as stack:
        for owner, name in ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        replayed = {device: poisoned(make) for device, make in replay.empty_strided.items()}
        stack.enter_context(mock.patch.dict(replay.empty_strided, replayed))
        yield
