"""Fresh memory full of NaN, so that an element nobody writes is seen."""

import torch

# What allocates without writing: (owner, name).
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


def poisoned(make):
    """`make`, returning NaN where it would return whatever memory holds."""

    def call(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return call
